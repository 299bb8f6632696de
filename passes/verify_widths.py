"""The pass that holds a resized graph to the replay oracle."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from fxwidth.analysis.input_specs import input_specs, real_inputs
from fxwidth.analysis.result import Analysis
from fxwidth.errors import FxwidthError
from fxwidth.passes.conditions import RESIZED, VERIFIED_WIDTHS
from fxwidth.passes.width_pass import WidthPass
from fxwidth.recording.graph_meta import RESIZED_FROM, VERIFIED, notes_of
from fxwidth.statistics.calibration_data import batches_from, refuse_other_than_batches, replayed
from fxwidth.verification.present_values import Found, compare_with_tape

# By the rounding of the model's own precision; what is wrong differs by much more.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3}
_OTHERS = 5e-2


class VerifyWidths(WidthPass):
    """Holds a graph to what it was before its last resize: op by op it must do what is prescribed at the new widths.

    Where channels were removed alone, its outputs are also those of the graph of before, at its old sizes, with the
    present weights at the places that have stayed, and zeros at the others. What was found is left in
    `gm.meta["fxwidth_verified"]`.

    Args:
        data: batches of inputs, of which the first one is used, of the size of the example; by default random numbers,
            and zeros where integers are taken.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.passes.ResizeWidths({"0": 10})(fxwidth.trace(net, torch.randn(2, 8))).graph_module
        >>> gm = fxwidth.passes.VerifyWidths()(gm).graph_module
        >>> sorted(gm.meta["fxwidth_verified"])
        ['by_ops', 'by_zeros', 'compared']
    """

    needs = (RESIZED,)
    gives = (VERIFIED_WIDTHS,)
    in_place = False

    def __init__(self, data: Iterable[Any] | None = None) -> None:
        super().__init__()
        refuse_other_than_batches(data)
        self._data = replayed(data)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Compare a graph with what it was.

        Args:
            graph_module: the graph; it stays as it is but for its `meta`.

        Raises:
            FxwidthError: it differs, or it cannot be told, as without values.
        """
        notes = notes_of(graph_module)
        before, maps = notes[RESIZED_FROM]
        found = Found(0.0, 0, None)
        if maps is not None:
            found = compare_with_tape(graph_module, before, maps, self._inputs(before, graph_module))
            _judge(graph_module, found)
        notes[VERIFIED] = {"by_ops": found.by_ops, "compared": found.compared, "by_zeros": found.by_zeros}
        return PassResult(graph_module, False)

    def _inputs(self, before: Analysis, graph_module: fx.GraphModule) -> list[Any]:
        if self._data is None:
            return real_inputs(graph_module, input_specs(graph_module, None), None)
        batch = next(iter(batches_from(before, self._data, before.samples_in(before.inputs))), None)
        if batch is None:
            raise FxwidthError("VerifyWidths: data= holds no batch; give it one, or leave data out.")
        return batch


def _judge(graph_module: fx.GraphModule, found: Found) -> None:
    precisions = {tensor.dtype for tensor in graph_module.parameters() if tensor.is_floating_point()}
    allowed = max((_TOLERANCES.get(one, _OTHERS) for one in precisions), default=_TOLERANCES[torch.float32])
    for difference, what in ((found.by_ops, "an op"), (found.by_zeros, "an output")):
        if difference is not None and not difference <= allowed:
            raise FxwidthError(
                f"VerifyWidths: {what} of the resized graph differs by {difference:.1e} of its size from what is "
                f"prescribed, where rounding explains {allowed:.0e}. The graph was changed since the resize, or this "
                "is a fault of fxwidth: keep the groups around it with keep=, and report it."
            )
    if not found.compared:
        raise FxwidthError(
            "VerifyWidths: no result could be compared, since all that the graph does depends on the values that it "
            "meets; leave the pass out, and compare outputs on data of your own."
        )
