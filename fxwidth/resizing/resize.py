"""Carrying out a plan: everything is computed and checked first, then put in place, or nothing is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from fxwidth.analysis.known_axes import KnownAxes, known_axes
from fxwidth.analysis.least_widths import why_too_narrow
from fxwidth.axes.index_maps import NEW, IndexMaps, Indices
from fxwidth.errors import FxwidthError
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.importance.estimates import Evidence, gather_evidence, needs_moments, refuse_negative_variances, select
from fxwidth.planning.planner import Plan
from fxwidth.reconstruction.basis_change import rotated
from fxwidth.reconstruction.bn_recalibration import Recalibration, statistics_used_elsewhere
from fxwidth.recording.graph_meta import AXES, HISTORY, notes_of
from fxwidth.resizing.optimizer_state import OptimizerUpdate, Replacement, plan_optimizer_update
from fxwidth.resizing.parameters import dim_maps, ratios_by_gain, resized_tensors
from fxwidth.rewriting.added_modules import remove_unused
from fxwidth.rewriting.attributes import AttributeEdits
from fxwidth.rewriting.graphs import RewrittenGraph, rewrite_graph
from fxwidth.rewriting.metadata import renew_metadata
from fxwidth.rewriting.optimizers import check_optimizer
from fxwidth.rewriting.originals import RESIZED, UNTOUCHED, detach_original, goes_along, original_of, resized_together
from fxwidth.rewriting.successors import successor
from fxwidth.rewriting.transaction import Transaction
from fxwidth.runtime.fake_tensors import fake_like
from fxwidth.runtime.tensor_slots import is_sound, set_slot, tensor_slots
from fxwidth.selection.registry import check_selection
from fxwidth.statistics.calibration_data import replayed
from fxwidth.statistics.moments import Moments, has_values
from fxwidth.statistics.remembered_noise import forget_noise
from fxwidth.tracing import analyze_module, refuse_nan


def resize(
    gm: fx.GraphModule,
    plan: Plan | Mapping[str, int],
    *,
    optimizer: Optimizer | None = None,
    data: Iterable[Any] | None = None,
    selection: str = "greedy",
    recalibrate: bool | None = None,
    rotate: bool = True,
    fold: bool = True,
    exact: bool = True,
) -> fx.GraphModule:
    """Give channel groups new widths, in place.

    Dropped channels are folded into their readers by least squares; grown channels leave the function as it was.
    Parameters whose shape changes are replaced, in the module and in the optimizer, and so is their state; hooks,
    Python attributes, gradients, class and memory format go over to the new ones.

    The model that `gm` was traced from is resized with it if its own code does at the new widths what the graph does;
    else it stays as it was before, with parameters of its own from now on. `fxwidth.report` says which it was.

    Args:
        gm: a graph from `fxwidth.trace`, or any GraphModule that carries shapes.
        plan: group name -> new width; groups that are not named stay.
        optimizer: the optimizer that trains `gm` or a part of it.
        data: batches of inputs from which to see what the readers see: any iterable of tensors, of tuples that begin
            with the inputs, or of dicts of them by name; without them, that is estimated from the weights and batch
            norm statistics.
        selection: the method by which channels are chosen: "greedy" (forward, by what readers can be told), "cholesky"
            (pivoted), "leverage" (ridge leverage scores), "backward" (Optimal Brain Surgeon), "spectral_pruning"
            (Suzuki et al.), "magnitude" (largest weights), or "projection" (by the writers' singular vectors, from
            which alone readers are refitted then).
        recalibrate: whether to correct batch norm's running statistics by what the data show before and after; None
            for doing so where data are given.
        rotate: whether groups with nothing nonlinear between writers and readers, such as values and outputs of
            attention, queries and keys, and mobilenet's bottlenecks with their batch norms, are brought to the basis of
            their spectrum first; not done with an optimizer, whose state knows the old basis, nor without folding.
        fold: whether readers take over what they read from dropped channels.
        exact: whether to refuse the growth of groups whose new channels would change the function.

    Raises:
        FxwidthError: the plan, the data or the optimizer cannot be used; nothing has changed. So it is after any other
            exception, Ctrl-C included.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> fxwidth.resize(gm, {"0": 10}).get_parameter("2.weight").shape
        torch.Size([4, 10])
    """
    transaction = Transaction(*resized_together(gm), optimizer=optimizer)
    return transaction.run(
        lambda: resize_analyzed(
            WidthGraph(analyze_module(gm)),
            plan,
            optimizer=optimizer,
            data=data,
            selection=selection,
            recalibrate=recalibrate,
            rotate=rotate,
            fold=fold,
            exact=exact,
            transaction=transaction,
        )
    )


@dataclass(frozen=True)
class _Options:
    """Those of `resize`, and three more.

    Attributes:
        evidence: moments and a selection that are known already; data serve recalibration alone then.
        blind: whether the first channels of each group are kept without a look at values, which are about to be loaded.
        norms: the variance ratios of norms that were found with values, by the names of their gains.
    """

    optimizer: Optimizer | None = None
    data: Iterable[Any] | None = None
    selection: str = "greedy"
    evidence: Evidence | None = None
    recalibrate: bool | None = None
    rotate: bool = True
    fold: bool = True
    exact: bool = True
    blind: bool = False
    norms: Mapping[str, float] | None = None


def resize_analyzed(
    width_graph: WidthGraph,
    plan: Plan | Mapping[str, int],
    *,
    transaction: Transaction | None = None,
    **options: Any,
) -> fx.GraphModule:
    """Carry out a plan on a graph that has just been analysed.

    Args:
        width_graph: the analysed graph.
        plan: as for `resize`.
        transaction: that of which this is a part, which takes everything back on failure; by default one of its own.
        options: those of `resize`, and `evidence`, `blind` and `norms`; see `_Options`.

    Raises:
        FxwidthError: the plan or the data cannot be used.
    """
    chosen = _Options(**options)
    if transaction is not None:
        return _resize(width_graph, plan, chosen, transaction)
    whole = Transaction(*resized_together(width_graph.analysis.module), optimizer=chosen.optimizer)
    return whole.run(lambda: _resize(width_graph, plan, chosen, whole))


def _resize(
    width_graph: WidthGraph, plan: Plan | Mapping[str, int], options: _Options, transaction: Transaction
) -> fx.GraphModule:
    module = width_graph.analysis.module
    check_selection(options.selection)
    check_optimizer(options.optimizer, module)
    if options.recalibrate and options.data is None:
        raise FxwidthError("recalibrate=True needs data= to run the network on.")
    width_graph.refuse_outdated()
    groups = _checked(width_graph, plan, options.exact)
    if not groups:
        return module
    if not options.blind:
        refuse_nan(module)
        _refuse_too_narrow(width_graph, groups)
    data = replayed(options.data)
    # What can be trained stays so, wherever the resize is called: parameters, their gradients, and optimizer state.
    with torch.inference_mode(False):
        drops = any(width < group.width for group, width in groups.items())
        if drops and not options.blind:
            refuse_negative_variances(width_graph)
        evidence = _evidence(width_graph, groups, data, options)
        # Channels are chosen by the weights that the moments belong to.
        kept = {group: _kept(evidence, group, width) for group, width in groups.items()}
        moments = _turned(evidence, groups, transaction)
        wanted = options.recalibrate is not False and drops and not options.blind and has_values(width_graph)
        # Batch norms that a rotation changes are compared with what they are then; and modules take on new sizes with
        # what follows: the network is run as it was before that.
        recalibration = None
        if wanted and data is not None:
            recalibration = Recalibration(width_graph.analysis, data, statistics_used_elsewhere(width_graph))
        change = _prepare(evidence, moments, groups, kept, options)
        change.put_in_place(module, transaction)
        if recalibration is not None:
            change.recalibrate(module, recalibration, transaction)
            change.record["not_refitted"] |= statistics_used_elsewhere(width_graph)
        if change.update is not None:
            change.update.commit()
        forget_noise(module)
        notes = notes_of(module)
        # In one step: nothing can come between the two.
        notes |= {HISTORY: [*notes.get(HISTORY, ()), change.record], AXES: change.axes}
    return module


@dataclass(frozen=True)
class _Change:
    """All that a resize will put in place."""

    graph: RewrittenGraph
    tensors: Mapping[str, Tensor]
    replacements: Mapping[str, Replacement]
    update: OptimizerUpdate | None
    edits: AttributeEdits
    record: dict[str, Any]
    axes: KnownAxes | None

    def put_in_place(self, module: fx.GraphModule, transaction: Transaction) -> None:
        """Give the module, and the model that it was traced from where that goes along, its new graph and tensors."""
        original = original_of(module)
        if self.record["original"] == UNTOUCHED:
            detach_original(module, [one.old for one in self.replacements.values()], self.edits, transaction)
        slots = tensor_slots(module)
        for name, constant in self.graph.additions.constants.items():
            module.register_buffer(name, constant)
        for path, part in self.graph.additions.modules.items():
            owner = module.get_submodule(path.rpartition(".")[0])
            module.add_submodule(path, part.train(owner.training))
        module.graph = self.graph.graph
        shared = tensor_slots(original) if original is not None and self.record["original"] == RESIZED else {}
        in_original = {id(tensor): places for tensor, places in shared.values()}
        for name, tensor in self.tensors.items():
            old, places = slots[name]
            if name not in self.replacements:
                transaction.overwrite(old, tensor)
                continue
            for holder, attribute in (*places, *in_original.get(id(old), ())):
                set_slot(holder, attribute, self.replacements[name].new)
        remove_unused(module, transaction.undo)

    def recalibrate(self, module: fx.GraphModule, recalibration: Recalibration, transaction: Transaction) -> None:
        """Correct the running statistics of the module, which has been resized."""
        kept = {name: change.indices[0] for name, change in self.replacements.items() if len(change.indices) == 1}
        slots = tensor_slots(module)
        for name, tensor in recalibration.corrected({n: i for n, i in kept.items() if i is not None}).items():
            transaction.overwrite(slots[name][0], tensor)
        self.record["recalibrated"] = True


def _checked(width_graph: WidthGraph, plan: Plan | Mapping[str, int], exact: bool) -> dict[ChannelGroup, int]:
    """Return the groups that change and their new widths.

    Raises:
        FxwidthError: a name, a width, a pinned group or an inexact growth makes the plan unusable.
    """
    if not isinstance(plan, Mapping):
        raise FxwidthError(f"a plan maps group names to widths, but received {type(plan).__name__}.")
    result = {}
    for name, width in Plan(dict(plan)).items():
        group = width_graph[name]
        if width == group.width:
            continue
        if group.pinned is not None:
            raise FxwidthError(
                f"group {name!r} must keep its width {group.width}: {group.pinned}. Remove it from the plan."
            )
        if width > group.width and exact and group.inexact_growth is not None:
            raise FxwidthError(
                f"growing group {name!r} from {group.width} to {width} would change the function: "
                f"{group.inexact_growth}. Pass exact=False to grow it all the same."
            )
        result[group] = width
    return result


def _evidence(
    width_graph: WidthGraph, groups: Mapping[ChannelGroup, int], data: Iterable[Any] | None, options: _Options
) -> Evidence:
    """Return what is known of the channels, as far as it is needed."""
    selection = options.selection if options.evidence is None else options.evidence.selection
    if options.blind or not needs_moments(groups, selection, options.fold):
        return Evidence(width_graph, None, selection)
    if options.evidence is not None:
        return options.evidence
    rotates = options.rotate and options.fold and options.optimizer is None
    return gather_evidence(width_graph, data, selection, rotates)


def _refuse_too_narrow(width_graph: WidthGraph, groups: Mapping[ChannelGroup, int]) -> None:
    for group, width in groups.items():
        if width < min(group.width, group.least.width):
            raise FxwidthError(
                f"group {group.name!r} cannot shrink from {group.width} to {width}: {group.least.reason}. "
                f"Its least width is {group.least.width}."
            )
    narrow = why_too_narrow(width_graph.analysis, {group.factor: width for group, width in groups.items()})
    if narrow is not None:
        names = ", ".join(repr(group.name) for group in groups)
        raise FxwidthError(f"these widths do not go together: {narrow}. Keep one of {names} wider.")


def _turned(evidence: Evidence, groups: Mapping[ChannelGroup, int], transaction: Transaction) -> Moments | None:
    """Bring linear groups that lose channels to their new bases, and return the moments in these."""
    # All of them are found before any weight changes: readers of one group write another.
    turns = [evidence.rotation(group) for group, width in groups.items() if width < group.width]
    moments = evidence.moments
    for turned in turns:
        if turned is not None and moments is not None:
            moments = rotated(evidence.width_graph, turned, moments, transaction)
    return moments


def _prepare(
    evidence: Evidence,
    moments: Moments | None,
    groups: Mapping[ChannelGroup, int],
    kept: Mapping[ChannelGroup, Indices],
    options: _Options,
) -> _Change:
    width_graph = evidence.width_graph
    analysis = width_graph.analysis
    maps = IndexMaps(analysis.space, {group.factor: own for group, own in kept.items()})
    missed: dict[str, str] = {}
    tensors, maps = resized_tensors(width_graph, maps, moments, options.fold, options.norms, missed)
    _refuse_infinite(width_graph, tensors)
    replacements = _replacements(width_graph, maps, tensors)
    fakes = {name: fake_like(analysis.mode, replacement.new) for name, replacement in replacements.items()}
    edits = AttributeEdits()
    graph = rewrite_graph(analysis, maps, fakes, edits)
    renew_metadata(analysis, graph, {name: replacement.new for name, replacement in replacements.items()})
    update = None
    if options.optimizer is not None:
        names = {id(entry.tensor): name for name, entry in analysis.parameters.items()}
        update = plan_optimizer_update(options.optimizer, list(replacements.values()), names)
    original = None
    if original_of(analysis.module) is not None:
        original = RESIZED if goes_along(analysis, maps, fakes, tensors, edits) else UNTOUCHED
    record = {
        "widths": {group.name: [group.width, width] for group, width in groups.items()},
        "parameters": _count_after(width_graph, replacements),
        "evidence": moments.source if moments is not None else None,
        "selection": evidence.selection,
        "folded": options.fold and moments is not None,
        "recalibrated": False,
        "lowered": dict(graph.lowered),
        "norms": ratios_by_gain(width_graph, maps),
        "not_refitted": missed,
        "original": original,
    }
    return _Change(graph, tensors, replacements, update, edits, record, _axes_on_record(width_graph, groups, maps))


def _axes_on_record(width_graph: WidthGraph, groups: Mapping[ChannelGroup, int], maps: IndexMaps) -> KnownAxes | None:
    """Return what the next analysis needs to know of groups that are of width one after a resize, if there are any."""
    narrow = {
        group.name: tuple((site.parameter, site.dim) for site in group.sites)
        for group in width_graph.groups
        if groups.get(group, group.width) == 1 and not group.is_lost
    }
    return known_axes(width_graph.analysis, maps, narrow) if narrow or width_graph.analysis.lost else None


def _refuse_infinite(width_graph: WidthGraph, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        old = width_graph.analysis.parameters[name].tensor
        new = nn.Parameter(tensor, requires_grad=False) if isinstance(old, nn.Parameter) else tensor
        if is_sound(old) and not is_sound(new):
            raise FxwidthError(
                f"{name} would hold values that are not finite (NaN or infinity) after this resize, beyond the range "
                f"of {old.dtype}. Resize other groups, or bring the weights of this one's layers to a common scale."
            )


def _kept(evidence: Evidence, group: ChannelGroup, width: int) -> Indices:
    if width > group.width:
        kept: Indices = np.concatenate([np.arange(group.width), np.full(width - group.width, NEW)])
        return kept
    return select(evidence.width_graph, group, width, evidence)


def _replacements(width_graph: WidthGraph, maps: IndexMaps, tensors: Mapping[str, Tensor]) -> dict[str, Replacement]:
    result = {}
    for name, tensor in tensors.items():
        entry = width_graph.analysis.parameters[name]
        indices = dim_maps(width_graph, maps, name)
        if all(kept is None for kept in indices):
            continue
        new = successor(name, entry.tensor, tensor, indices)
        result[name] = Replacement(name, entry.tensor, new, indices)
    return result


def _count_after(width_graph: WidthGraph, replacements: Mapping[str, Replacement]) -> list[int]:
    parameters = {
        name: entry.tensor
        for name, entry in width_graph.analysis.parameters.items()
        if isinstance(entry.tensor, nn.Parameter)
    }
    before = sum(tensor.numel() for tensor in parameters.values())
    after = sum((replacements[name].new if name in replacements else t).numel() for name, t in parameters.items())
    return [before, after]
