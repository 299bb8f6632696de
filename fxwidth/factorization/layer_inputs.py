"""The first two moments of what layers read, on data or on noise: of all their inputs, resizable or not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxwidth.errors import FxwidthError
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.recording.readonly_runs import copies, looking_on
from fxwidth.simplification.called_layers import CalledLayer
from fxwidth.statistics.calibration_data import batches_from, cut_anew
from fxwidth.statistics.data_impressions import impressions
from fxwidth.statistics.moment import Moment, effective_rows
from fxwidth.statistics.moments import statistics_of_noise
from fxwidth.statistics.observation_points import find_probes
from fxwidth.statistics.synthetic_inputs import noise_draws
from fxwidth.work_progress import each

# Of wider layers the moments take too much memory: 128 MB each.
WIDEST = 4096
_SAMPLES, _AT_ONCE, _WORK = 1024, 64, 2e10
# What directions count that few inputs have not shown, as a share of the mean of the others, at one row per channel.
_UNSEEN = 1e-3


def input_moments(
    width_graph: WidthGraph, layers: Sequence[CalledLayer], data: Iterable[Any] | None
) -> dict[str, Moment]:
    """Return the moments of what layers read, by the names of their nodes; none of layers wider than `WIDEST`.

    Args:
        width_graph: the graph, which is run in evaluation and left as it was.
        layers: the layers.
        data: batches as for `fxwidth.resize`, of which the first 1024 samples are used; None for noise.

    Raises:
        FxwidthError: the data do not fit, are none, or lead to numbers that are not finite.
    """
    analysis = width_graph.analysis
    sums = {layer.node.name: _Sums(layer) for layer in layers if _width(analysis.node_values, layer) <= WIDEST}
    if not sums:
        return {}
    if data is not None:
        _run(width_graph, cut_anew(analysis, batches_from(analysis, data, _SAMPLES), _AT_ONCE), sums)
    else:
        with statistics_of_noise(width_graph):
            draws = noise_draws(analysis, find_probes(width_graph), 0, _WORK)
            _run(width_graph, list(impressions(analysis, draws, _WORK, 0)), sums)
    return {name: own.moment() for name, own in sums.items()}


@dataclass
class _Sums:
    """Sums over the vectors that a layer reads."""

    layer: CalledLayer
    samples: int = 0
    rows: int = 0
    total: Tensor | None = None
    products: Tensor | None = None

    def add(self, value: Tensor, samples: int) -> None:
        wide = value.detach().double()
        rows = wide.reshape(-1, wide.shape[-1]) if self.layer.is_linear else wide.transpose(0, 1).flatten(1).T
        self.samples += samples
        self.rows += len(rows)
        self.total = rows.sum(0) + (0 if self.total is None else self.total)
        self.products = rows.T @ rows + (0 if self.products is None else self.products)

    def moment(self) -> Moment:
        """Return mean and covariance, in which what was not seen counts a little.

        Raises:
            FxwidthError: a number is not finite.
        """
        if self.total is None or self.products is None:
            raise FxwidthError("FactorizeLinear: data= holds no batch; pass at least one.")
        mean = self.total / self.rows
        covariance = self.products / self.rows - mean.outer(mean)
        if not bool(covariance.isfinite().all()):
            raise FxwidthError(
                f"the inputs of node {self.layer.node.name!r} are not finite for these data; check the model's "
                "parameters and the scale of the data."
            )
        found = Moment(mean, covariance, self.rows, self.samples, torch.finfo(covariance.dtype).eps)
        unseen = _UNSEEN * len(mean) / effective_rows(found) * float(covariance.diagonal().mean())
        covariance.diagonal().add_(unseen)
        return found


def _run(width_graph: WidthGraph, batches: Iterable[Sequence[Any]], sums: dict[str, _Sums]) -> None:
    analysis = width_graph.analysis
    with looking_on(analysis.module), torch.no_grad():
        for values in each(batches, "looking at what layers read"):
            runner = _Reader(analysis.module, sums, analysis.samples_in(values))
            runner.run(*copies(values), enable_io_processing=False)


class _Reader(fx.Interpreter):
    """Runs a graph, and adds up what some of its layers are given."""

    def __init__(self, module: fx.GraphModule, sums: dict[str, _Sums], samples: int) -> None:
        super().__init__(module)
        self._sums, self._samples = sums, samples

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        sums = self._sums.get(n.name)
        if sums is not None:
            value = self.env[sums.layer.source]
            # A layer may write to what it reads only after that.
            sums.add(value if sums.layer.is_linear or value.dim() > 1 else value[None], self._samples)
        return super().run_node(n)


def _width(values: dict[str, Any], layer: CalledLayer) -> int:
    value = values[layer.source.name]
    return int(value.shape[-1 if layer.is_linear else 1])
