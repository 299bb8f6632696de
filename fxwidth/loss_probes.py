"""What shrinking a group does to the loss, seen by running the network at its old sizes with the group shrunk."""

from __future__ import annotations

import collections
import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxwidth.calibration import batches_from, targets_of
from fxwidth.curves import Errors, share_of
from fxwidth.errors import FxwidthError
from fxwidth.evidence import Evidence, gather_evidence
from fxwidth.factors import axis_size
from fxwidth.folding import fold
from fxwidth.groups import ChannelGroup, WidthGraph
from fxwidth.index_maps import IndexMaps
from fxwidth.roles import Role
from fxwidth.structures import deep_tensors
from fxwidth.tape import evaluating, substituted

Loss = Callable[..., Tensor]

# The share of what readers hear that is taken away by the probe: well above noise, and still of the order of plans.
_PROBED_SHARE = 0.2
# No group is taken to matter less than this share of what the median group does.
_LEAST_SENSITIVITY = 0.05


class Remembered:
    """Batches that are passed on, of which the first ones are remembered.

    Args:
        data: any iterable of batches.
        limit: about how many samples are remembered.
    """

    def __init__(self, data: Iterable[Any], limit: int = 256) -> None:
        self.batches: list[Any] = []
        self._data = data
        self._limit = limit
        self._samples = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self._data:
            if self._samples < self._limit:
                self.batches.append(batch)
                self._samples += next((len(tensor) for tensor in deep_tensors(batch) if tensor.dim()), 1)
            yield batch


def calibrated(
    width_graph: WidthGraph,
    groups: Sequence[ChannelGroup],
    data: Iterable[Any] | None,
    loss: Loss | None,
    selection: str,
    rotates: bool = False,
) -> tuple[Evidence, dict[ChannelGroup, Errors]]:
    """Return the evidence on a graph and the width curves of some groups, in units of the loss where that is given.

    Raises:
        FxwidthError: the data or the loss cannot be used, or there is no such method of selection.
    """
    if loss is None:
        evidence = gather_evidence(width_graph, data, selection, rotates)
        return evidence, {group: evidence.errors(group) for group in groups}
    if data is None:
        raise FxwidthError("loss= needs data= to be taken on: batches of the inputs and what the loss compares with.")
    if isinstance(data, Tensor) or not isinstance(data, Iterable) or isinstance(data, (str, bytes, Mapping)):
        data = list(batches_from(width_graph.analysis, data, None))
    seen = Remembered(data)
    # Weights alone are evidence enough for some methods: the batches are gone through for the loss all the same.
    evidence = gather_evidence(width_graph, seen, selection, rotates)
    if not seen.batches:
        collections.deque(itertools.islice(seen, 1), 0)
    rates = loss_rates(evidence.unrotated(), groups, seen.batches, loss)
    return evidence, {group: rates[group] * evidence.errors(group) for group in groups}


def loss_rates(
    evidence: Evidence, groups: Sequence[ChannelGroup], batches: Sequence[Any], loss: Loss
) -> dict[ChannelGroup, float]:
    """Return by how much the loss rises per unit of each group's predicted error.

    Each group is shrunk by itself until readers miss a fifth of what they hear, and the loss is taken again.

    Args:
        evidence: what the width curves come from.
        groups: the groups to probe.
        batches: tuples that begin with the graph's inputs, or dicts that hold them by name.
        loss: called with the graph's output and what follows the inputs in a tuple, or the whole dict; returns a
            number per call, the mean over the batch.

    Raises:
        FxwidthError: the loss does not return one finite number.
    """
    analysis = evidence.width_graph.analysis
    pairs = [
        (values, targets_of(analysis, batch)) for batch in batches for values in batches_from(analysis, [batch], None)
    ]
    base = _mean_loss(evidence, pairs, loss, {})
    rates: dict[ChannelGroup, float] = {}
    for group in groups:
        errors = evidence.errors(group)
        width = _probed_width(errors)
        if width is None or errors[width] <= 0:
            continue
        rise = _mean_loss(evidence, pairs, loss, shrunk_in_place(evidence, {group: width})) - base
        rates[group] = rise / float(errors[width])
    typical = statistics.median([max(0.0, rate) for rate in rates.values()] or [1.0])
    floor = _LEAST_SENSITIVITY * typical or 1.0
    return {group: max(floor, rates.get(group, typical)) for group in groups}


def _probed_width(errors: Errors) -> int | None:
    """Return the largest width, but all channels, at which readers miss the probed share; one at least."""
    lacking = np.flatnonzero(share_of(errors) >= _PROBED_SHARE)
    lacking = lacking[(lacking > 0) & (lacking < len(errors) - 1)]
    if len(lacking):
        return int(lacking[-1])
    return 1 if len(errors) > 2 else None


def shrunk_in_place(evidence: Evidence, widths: Mapping[ChannelGroup, int]) -> dict[str, Tensor]:
    """Return parameters of the old sizes with which the network acts as if some groups had fewer channels.

    Readers take over what they read of the dropped channels, whose columns are zero then; where two activations are
    multiplied over a group, as queries and keys are, the rows that write the dropped channels are zero too. Norms over
    a group still see all of it: they act as before the resize, which rescales them to do nearly the same.
    """
    width_graph = evidence.width_graph
    kept = {group.factor: evidence.kept(group, width) for group, width in widths.items()}
    maps = IndexMaps(width_graph.analysis.space, kept)
    tensors = fold(width_graph, maps, evidence.moments)
    multiplied = _multiplied(evidence)
    for group in widths:
        roles = set(Role) if group.factor in multiplied else {Role.READER}
        for site in group.sites:
            if site.role not in roles:
                continue
            entry = width_graph.analysis.parameters[site.parameter]
            axis = entry.axes[site.dim]
            dropped = np.setdiff1d(np.arange(axis_size(axis)), maps.indices(axis))
            tensor = tensors.setdefault(site.parameter, entry.tensor.detach().clone())
            tensor.index_fill_(site.dim, torch.from_numpy(dropped).to(tensor.device), 0)
    return tensors


def _multiplied(evidence: Evidence) -> set[object]:
    """Return the factors over which two activations are multiplied."""
    analysis, roles = evidence.width_graph.analysis, evidence.width_graph.roles
    return {
        factor
        for call in analysis.calls
        for contraction in call.contractions
        if not roles.is_parameter(contraction.left) and not roles.is_parameter(contraction.right)
        for dim in contraction.left_dims
        for factor in analysis.space.factors(call.axes[id(contraction.left)][dim])
    }


def _mean_loss(
    evidence: Evidence, pairs: Sequence[tuple[list[Any], tuple[Any, ...]]], loss: Loss, tensors: Mapping[str, Tensor]
) -> float:
    module = evidence.width_graph.analysis.module
    total, samples = 0.0, 0
    with evaluating(module), torch.no_grad(), substituted(module, tensors):
        for values, targets in pairs:
            size = next((len(tensor) for tensor in deep_tensors(values) if tensor.dim()), 1)
            output = fx.Interpreter(module).run(*values, enable_io_processing=False)
            result = loss(module.graph.process_outputs(output), *targets)
            if not isinstance(result, Tensor) or result.numel() != 1 or not bool(result.isfinite()):
                raise FxwidthError(
                    f"loss= returned {result!r}; it must return one finite number, the mean over a batch, when called "
                    "with the model's output and what follows the inputs in a batch of data."
                )
            total += float(result) * size
            samples += size
    return total / max(1, samples)
