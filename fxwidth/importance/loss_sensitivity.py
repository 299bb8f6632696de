"""What shrinking a group does to the loss, seen by running the network at its old sizes with the group shrunk."""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxwidth.analysis.roles import Role
from fxwidth.axes.factors import axis_size
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.gradients.gradient_run import loss_of
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.importance.estimates import Evidence, gather_evidence
from fxwidth.importance.sensitivity_fit import Rise, rates_of
from fxwidth.option_keywords import Loss
from fxwidth.reconstruction.folding import fold
from fxwidth.recording.readonly_runs import copies, left_as_it_is
from fxwidth.runtime.process_groups import of_all_ranks, rank_share
from fxwidth.runtime.pytrees import sample_count
from fxwidth.runtime.tensor_slots import substituted
from fxwidth.selection.error_curves import Errors, share_of
from fxwidth.selection.registry import Selection
from fxwidth.statistics.calibration_data import batches_from, targets_of
from fxwidth.work_progress import each

# The shares of what readers read that are taken away by probes: with less, noise exceeds the rise of the loss.
_PROBED_SHARES = (0.2, 0.4)
_WEIGHING = "weighing groups"
# Into how many parts a batch is divided to see how much the rise differs between samples.
_PARTS = 16
# About how many samples the loss is taken on.
_REMEMBERED = 256


class Remembered:
    """Batches that are passed on, of which the first ones are remembered.

    Args:
        data: any iterable of batches.
        limit: about how many samples are remembered.
    """

    def __init__(self, data: Iterable[Any], limit: int = _REMEMBERED) -> None:
        self.batches: list[Any] = []
        self._data = data
        self._limit = limit
        self._samples = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self._data:
            if self._samples < self._limit:
                self.batches.append(batch)
                self._samples += sample_count(batch)
            yield batch


def calibrated(
    width_graph: WidthGraph,
    groups: Sequence[ChannelGroup],
    data: Iterable[Any] | None,
    loss: Loss | None,
    selection: Selection,
    rotates: bool = False,
) -> tuple[Evidence, dict[ChannelGroup, Errors]]:
    """Return the evidence on a graph and the width curves of some groups, in units of the loss where that is given.

    Raises:
        FxwidthError: the data or the loss cannot be used.
    """
    if loss is None:
        evidence = gather_evidence(width_graph, data, selection, rotates)
        return evidence, {group: evidence.errors(group) for group in each(groups, _WEIGHING)}
    assert data is not None
    if isinstance(data, Tensor):
        data = list(batches_from(width_graph.analysis, data, None))
    seen = Remembered(data, rank_share(_REMEMBERED))
    # Weights alone are evidence enough for some methods: the batches are gone through for the loss all the same.
    evidence = gather_evidence(width_graph, seen, selection, rotates)
    if not seen.batches:
        collections.deque(itertools.islice(seen, 1), 0)
    batches = list(of_all_ranks("the batches for the loss", seen.batches))
    rates = loss_rates(evidence.unrotated(), groups, batches, loss)
    return evidence, {group: rates[group] * evidence.errors(group) for group in each(groups, _WEIGHING)}


def loss_rates(
    evidence: Evidence, groups: Sequence[ChannelGroup], batches: Sequence[Any], loss: Loss
) -> dict[ChannelGroup, float]:
    """Return by how much the loss rises per unit of each group's predicted error.

    Each group is shrunk by itself until readers miss a fifth, and two fifths, of what they read, and all groups
    together by the first; each time the loss is taken again on the same samples.

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
    base, sizes = _losses(evidence, pairs, loss, {})

    def rise(widths: Mapping[ChannelGroup, int]) -> Rise:
        losses, _ = _losses(evidence, pairs, loss, shrunk_in_place(evidence, widths))
        return _rise(sum(float(evidence.errors(group)[width]) for group, width in widths.items()), losses - base, sizes)

    probed = {group: _probed_widths(evidence.errors(group)) for group in groups}
    probes = each(list(probed.items()), "probing the loss")
    rises = {group: [rise({group: width}) for width in widths] for group, widths in probes}
    smallest = {group: widths[0] for group, widths in probed.items() if widths}
    return rates_of(rises, rise(smallest).mean if len(smallest) > 1 else None)


def _probed_widths(errors: Errors) -> list[int]:
    widths = dict.fromkeys(_probed_width(errors, share) for share in _PROBED_SHARES)
    return [width for width in widths if width is not None and errors[width] > 0]


def _probed_width(errors: Errors, share: float) -> int | None:
    """Return the largest width, but all channels, at which readers miss a share; one at least."""
    lacking = np.flatnonzero(share_of(errors) >= share)
    lacking = lacking[(lacking > 0) & (lacking < len(errors) - 1)]
    if len(lacking):
        return int(lacking[-1])
    return 1 if len(errors) > 2 else None


def _rise(error: float, rises: npt.NDArray[np.float64], sizes: npt.NDArray[np.float64]) -> Rise:
    """Return the mean of what parts of the data show, and how sure it is; of one part that is not known."""
    weights = sizes / sizes.sum()
    mean = float((weights * rises).sum())
    if len(rises) < 2:
        return Rise(error, mean, abs(mean))
    squares = float(np.square(weights * (rises - mean)).sum())
    return Rise(error, mean, math.sqrt(squares * len(rises) / (len(rises) - 1)))


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
        for contraction in roles.activation_products(call)
        for dim in contraction.left_dims
        for factor in analysis.space.factors(call.axes[contraction.left][dim])
    }


def _losses(
    evidence: Evidence, pairs: Sequence[tuple[list[Any], tuple[Any, ...]]], loss: Loss, tensors: Mapping[str, Tensor]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the losses of parts of the data, and their sizes in samples."""
    module = evidence.width_graph.analysis.module
    losses: list[float] = []
    sizes: list[float] = []
    # Every group is judged by the same state: what a model keeps of one run must not be there in the next.
    with left_as_it_is(module), torch.no_grad(), substituted(module, tensors):
        for values, targets in pairs:
            size = evidence.width_graph.analysis.samples_in(values)
            output = fx.Interpreter(module).run(*copies(values), enable_io_processing=False)
            for count, part in _divided((module.graph.process_outputs(output), targets), size):
                losses.append(float(loss_of(loss, *part)))
                sizes.append(count)
    return np.array(losses), np.array(sizes, dtype=np.float64)


def _divided(whole: Any, size: int) -> Iterator[tuple[int, Any]]:
    """Yield parts of a batch's outputs and targets and their sizes in samples; all of it where these are no rows."""
    if size < 2 or any(not isinstance(leaf, Tensor) or leaf.shape[:1] != (size,) for leaf in pytree.tree_leaves(whole)):
        yield max(1, size), whole
        return
    step = -(-size // _PARTS)
    for first in range(0, size, step):
        last = min(size, first + step)
        yield last - first, pytree.tree_map(lambda leaf, rows=slice(first, last): leaf[rows], whole)
