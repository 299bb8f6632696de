"""New parameters and buffers: old entries in their new places, what was dropped folded in, new channels filled."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor

from fxwidth.analysis.result import Analysis
from fxwidth.axes.factors import Factor
from fxwidth.axes.index_maps import IndexMaps, Indices
from fxwidth.errors import FxwidthError
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.growth.directions import Direction
from fxwidth.growth.new_entries import new_entries
from fxwidth.growth.recipes import Growth
from fxwidth.growth.tape_index import Slot
from fxwidth.reconstruction.folding import fold, variance_ratio
from fxwidth.recording.tape import Axes, OpCall
from fxwidth.rewriting.successors import gather
from fxwidth.statistics.moments import Moments
from fxwidth.weights.readers import Wiring, wiring_of
from fxwidth.weights.reparametrised import weight_values, with_solved_lengths
from fxwidth.work_progress import each

_NORMS = ("layer norm", "RMS norm")


def dim_maps(maps: IndexMaps, axes: Axes) -> list[Indices | None]:
    """Return the index map of each dim of a parameter, None where it stays."""
    return [maps.indices(axis) if maps.changes(axis) else None for axis in axes]


def resized_tensors(
    width_graph: WidthGraph,
    maps: IndexMaps,
    moments: Moments | None,
    folds: bool = True,
    norms: Mapping[str, float] | None = None,
    missed: dict[str, str] | None = None,
    directions: Direction = "orthogonal",
    rows: Mapping[Slot, Tensor] | None = None,
) -> tuple[dict[str, Tensor], IndexMaps]:
    """Return the tensors that change, by name, and the maps completed with the variance ratios of norms.

    Args:
        width_graph: the analysis at the old sizes.
        maps: the kept and new indices of each resized group.
        moments: what the readers see; None when nothing is dropped or nothing is known.
        folds: whether readers take over what they read from dropped channels.
        norms: variance ratios by the names of gains, where they are known already.
        missed: takes the readers and gains that were not fitted to what is dropped, and why.
        directions: the method by which new channels are made where they may be anything.
        rows: new entries that have been made already; see `growth.new_entries`.
    """
    analysis, wiring = width_graph.analysis, wiring_of(width_graph)
    missed = {} if missed is None else missed
    folded = fold(width_graph, maps, moments, missed) if moments is not None and folds else {}
    missed |= gains_kept(wiring, maps)
    ratios = _variance_ratios(wiring, maps, moments, norms or {})
    growths = width_graph.growths(maps)
    _refuse_stale_gains(analysis, growths, ratios)
    result = {}
    for name, entry in each(list(analysis.parameters.items()), "computing new tensors"):
        old = folded[name] if name in folded else weight_values(analysis, name)
        indices = dim_maps(maps, entry.axes)
        if any(kept is not None for kept in indices):
            gathered = gather(old, indices)
            result[name] = new_entries(analysis, growths, maps, name, gathered, directions, rows)
        elif name in folded:
            result[name] = old
    maps = maps.with_variance_ratios(ratios)
    for name, ratio in ratios_by_gain(analysis, maps).items():
        gain = result.get(name, analysis.parameters[name].tensor.detach())
        result[name] = gain * math.sqrt(ratio)
    result |= with_solved_lengths(analysis, maps, result)
    return result, maps


def _variance_ratios(
    wiring: Wiring, maps: IndexMaps, moments: Moments | None, known: Mapping[str, float]
) -> dict[int, float]:
    """Return the variance ratio of each norm whose gain can be rescaled, one for all calls that share a gain."""
    by_gain: dict[str, list[tuple[int, float]]] = defaultdict(list)
    shared_gains = gains_kept(wiring, maps).keys() - known.keys()
    for call in wiring.analysis.calls:
        gain = _gain(wiring.analysis, call)
        changed = [m for m in call.reductions if maps.changes(call.axes[m.tensor][m.dim])]
        if gain is not None and gain not in shared_gains and changed:
            by_gain[gain].append((call.index, variance_ratio(wiring.analysis.space, maps, moments, call)))
    result: dict[int, float] = {}
    for gain, entries in by_gain.items():
        found = math.exp(sum(math.log(max(ratio, 1e-12)) for _, ratio in entries) / len(entries))
        shared = known.get(gain, found)
        result |= dict.fromkeys((index for index, _ in entries), shared)
    return result


def _refuse_stale_gains(analysis: Analysis, growths: Mapping[Factor, Growth], ratios: Mapping[int, float]) -> None:
    """Check that each norm is rescaled whose rescaling makes growth exact: two packages say when that can be."""
    for growth in growths.values():
        for index in growth.norms:
            if growth.inexact is None and index not in ratios:
                raise FxwidthError(
                    f"growth would change what node {analysis.calls[index].node} computes, whose gain cannot be "
                    "rescaled as was thought. Leave that group out of the plan; please report this gap of fxwidth."
                )


def _gain(analysis: Analysis, call: OpCall) -> str | None:
    if not any(reduction.kind in _NORMS for reduction in call.reductions):
        return None
    weight = call.arguments.get("weight")
    return None if weight is None else analysis.names.get(weight)


def gains_kept(wiring: Wiring, maps: IndexMaps) -> dict[str, str]:
    """Return the gains of norms over channels that change which keep their values all the same, and why."""

    def as_gain(call: OpCall, tensor: Tensor) -> bool:
        return call.arguments.get("weight") is tensor and any(reduction.kind in _NORMS for reduction in call.reductions)

    result = {}
    for call in wiring.analysis.calls:
        gain = _gain(wiring.analysis, call)
        changed = any(maps.changes(call.axes[reduction.tensor][reduction.dim]) for reduction in call.reductions)
        if gain is not None and changed and not wiring.used_only(gain, as_gain):
            result[gain] = "it is used for something else too"
    return result


def ratios_by_gain(analysis: Analysis, maps: IndexMaps) -> dict[str, float]:
    """Return by the names of gains by what the variances that their norms see are multiplied in a resize.

    A ratio of one is among them: a file from which it is missing would have it guessed by the sizes.
    """
    result = {}
    for call in analysis.calls:
        gain = _gain(analysis, call) if maps.tells_variance(call.index) else None
        if gain is not None:
            result[gain] = maps.variance_ratio(call.index)
    return result
