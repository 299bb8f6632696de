"""Carrying out a plan: everything is computed and checked first, then put in place, or nothing is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxwidth.analysis.known_axes import KnownAxes, known_axes
from fxwidth.axes.index_maps import NEW, IndexMaps, Indices
from fxwidth.errors import FxwidthError
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.importance.estimates import Evidence, gather_evidence, needs_moments, refuse_negative_variances, select
from fxwidth.options import ResizeKeywords, ResizeOptions, options_from, tells_options
from fxwidth.reconstruction.basis_change import Rotation, rotated
from fxwidth.reconstruction.bn_recalibration import Recalibration, statistics_used_elsewhere
from fxwidth.recording.graph_meta import AXES, HISTORY, notes_of
from fxwidth.resizing.optimizer_state import OptimizerUpdate, Replacement, plan_optimizer_update
from fxwidth.resizing.parameters import dim_maps, ratios_by_gain, resized_tensors
from fxwidth.resizing.requested import Requested, refuse_too_narrow, requested
from fxwidth.rewriting.added_modules import remove_unused
from fxwidth.rewriting.attributes import AttributeEdits
from fxwidth.rewriting.graphs import RewrittenGraph, rewrite_graph
from fxwidth.rewriting.metadata import renew_metadata
from fxwidth.rewriting.optimizers import Optimizers, check_optimizer
from fxwidth.rewriting.originals import RESIZED, UNTOUCHED, goes_along, leave_behind, original_of, resized_together
from fxwidth.rewriting.successors import successor
from fxwidth.rewriting.transaction import Transaction
from fxwidth.runtime.fake_tensors import fake_like
from fxwidth.runtime.tensor_slots import is_sound, set_slot, tensor_slots
from fxwidth.selection.registry import selection_name
from fxwidth.statistics.calibration_data import replayed
from fxwidth.statistics.moments import Moments, has_values
from fxwidth.statistics.remembered_noise import forget_noise
from fxwidth.tracing import analyze_module, refuse_nan


@tells_options(ResizeOptions)
def resize(
    gm: fx.GraphModule,
    plan: Mapping[str, int | Sequence[int]],
    *,
    optimizer: Optimizers | None = None,
    **options: Unpack[ResizeKeywords],
) -> fx.GraphModule:
    """Give channel groups new widths, in place.

    Dropped channels are folded into their readers by least squares; grown channels leave the function as it was.
    Parameters whose shape changes are replaced, in the module and in the optimizer, and so is their state; hooks,
    Python attributes, gradients, class and memory format go over to the new ones.

    The model that `gm` was traced from is resized with it if its own code does at the new widths what the graph does;
    else it stays as it was before, with parameters of its own from now on. `fxwidth.report` says which it was. Other
    graphs that were traced from the model, or from a part of it, stay as they were before in the same way.

    Args:
        gm: a graph from `fxwidth.trace`, or any GraphModule that carries shapes.
        plan: group name -> new width, or the channels to keep, ascending, as in `{"conv1": 24, "conv2": [0, 2, 5]}`;
            groups that are not named stay.
        optimizer: the optimizer that trains `gm` or a part of it; a list where several do, each for its parameters.
        data: batches of inputs from which to see what the readers see: any iterable of tensors, of tuples that begin
            with the inputs, or of dicts of them by name; without them, that is estimated from the weights and batch
            norm statistics.
        selection: the method by which channels are chosen: "greedy" (forward, by what readers can be told), "cholesky"
            (pivoted), "leverage" (ridge leverage scores), "backward" (Optimal Brain Surgeon), "spectral_pruning"
            (Suzuki et al.), "magnitude" (largest weights), or "projection" (by the writers' singular vectors, from
            which alone readers are refitted then); or a function `(group, width_graph) -> scores`, one number per
            channel, of which the highest stay: `group.sites` tells where the channels lie in the parameters.
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
        >>> gm = fxwidth.resize(gm, {"0": [0, 3, 5]})
        >>> fxwidth.report(gm).resizes[-1]["kept"]
        {'0': [0, 3, 5]}
        >>> gm = fxwidth.resize(gm, {"0": 2}, selection=lambda group, graph: [0.1, 0.3, 0.2])
        >>> fxwidth.report(gm).resizes[-1]["kept"]
        {'0': [1, 2]}
    """
    resize_with(gm, plan, options_from(ResizeOptions, {"optimizer": optimizer, **options}))
    return gm


def resize_with(gm: fx.GraphModule, plan: Mapping[str, int | Sequence[int]], options: ResizeOptions) -> None:
    """Do what `resize` does, with options that have been checked."""
    transaction = Transaction(*resized_together(gm), optimizer=options.optimizer)
    transaction.run(
        lambda: resize_analyzed(WidthGraph(analyze_module(gm)), plan, options, transaction=transaction),
    )


@dataclass(frozen=True)
class _Known:
    """What is known before a resize.

    Attributes:
        evidence: moments and a selection; data serve recalibration alone then.
        blind: whether channels are kept without a look at values, which are about to be loaded.
        norms: the variance ratios of norms that were found with values, by the names of their gains.
        kept: which channels the values that are about to be loaded have kept, for the record.
    """

    evidence: Evidence | None = None
    blind: bool = False
    norms: Mapping[str, float] | None = None
    kept: Mapping[str, Sequence[int]] = field(default_factory=dict)


def resize_analyzed(
    width_graph: WidthGraph,
    plan: Mapping[str, int | Sequence[int]],
    options: ResizeOptions | None = None,
    *,
    transaction: Transaction | None = None,
    **known: Any,
) -> fx.GraphModule:
    """Carry out a plan on a graph that has just been analysed.

    Args:
        width_graph: the analysed graph.
        plan: as for `resize`.
        options: those of `resize`; by default its defaults.
        transaction: that of which this is a part, which takes everything back on failure; by default one of its own.
        known: `evidence`, `blind`, `norms` and `kept`; see `_Known`.

    Raises:
        FxwidthError: the plan or the data cannot be used.
    """
    options, before = options or ResizeOptions(), _Known(**known)
    if transaction is not None:
        return _resize(width_graph, plan, options, before, transaction)
    whole = Transaction(*resized_together(width_graph.analysis.module), optimizer=options.optimizer)
    return whole.run(lambda: _resize(width_graph, plan, options, before, whole))


def _resize(
    width_graph: WidthGraph,
    plan: Mapping[str, int | Sequence[int]],
    options: ResizeOptions,
    known: _Known,
    transaction: Transaction,
) -> fx.GraphModule:
    module = width_graph.analysis.module
    check_optimizer(options.optimizer, module)
    width_graph.refuse_outdated()
    asked = requested(width_graph, plan, options.exact)
    if not asked.widths:
        return module
    if not known.blind:
        refuse_nan(module)
        refuse_too_narrow(width_graph, asked)
    data = replayed(options.data)
    # What can be trained stays so, wherever the resize is called: parameters, their gradients, and optimizer state.
    with torch.inference_mode(False):
        drops = any(width < group.width for group, width in asked.widths.items())
        if drops and not known.blind:
            refuse_negative_variances(width_graph)
        evidence = _evidence(width_graph, asked, data, options, known)
        # Channels are chosen by the weights that the moments belong to.
        kept = {group: _kept(evidence, group, width, asked) for group, width in asked.widths.items()}
        turns = _turns(evidence, asked)
        moments = _turned(evidence, turns, transaction)
        wanted = options.recalibrate is not False and drops and not known.blind and has_values(width_graph)
        # Batch norms that a rotation changes are compared with what they are then; and modules take on new sizes with
        # what follows: the network is run as it was before that.
        recalibration = None
        if wanted and data is not None:
            recalibration = Recalibration(width_graph.analysis, data, statistics_used_elsewhere(width_graph))
        change = _prepare(evidence, moments, kept, options, known)
        change.record.update(_channels_on_record(kept, asked, turns, known))
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
        replaced = [one.old for one in self.replacements.values()]
        leave_behind(module, self.record["original"] == RESIZED, replaced, self.edits, transaction)
        slots = tensor_slots(module)
        for name, constant in self.graph.additions.constants.items():
            module.register_buffer(name, constant)
        for path, part in self.graph.additions.modules.items():
            owner = module.get_submodule(path.rpartition(".")[0])
            module.add_submodule(path, part.train(owner.training))
        module.graph = self.graph.graph
        shared = tensor_slots(original) if original is not None and self.record["original"] == RESIZED else {}
        in_original = dict(shared.values())
        for name, tensor in self.tensors.items():
            old, places = slots[name]
            if name not in self.replacements:
                transaction.overwrite(old, tensor)
                continue
            for holder, attribute in (*places, *in_original.get(old, ())):
                set_slot(holder, attribute, self.replacements[name].new)
        remove_unused(module, transaction.undo)

    def recalibrate(self, module: fx.GraphModule, recalibration: Recalibration, transaction: Transaction) -> None:
        """Correct the running statistics of the module, which has been resized."""
        kept = {name: change.indices[0] for name, change in self.replacements.items() if len(change.indices) == 1}
        slots = tensor_slots(module)
        for name, tensor in recalibration.corrected({n: i for n, i in kept.items() if i is not None}).items():
            transaction.overwrite(slots[name][0], tensor)
        self.record["recalibrated"] = True


def _evidence(
    width_graph: WidthGraph, asked: Requested, data: Iterable[Any] | None, options: ResizeOptions, known: _Known
) -> Evidence:
    """Return what is known of the channels, as far as it is needed."""
    selection = options.selection if known.evidence is None else known.evidence.selection
    if known.blind or not needs_moments(asked.widths, selection, options.fold, asked.channels):
        return Evidence(width_graph, None, selection)
    if known.evidence is not None:
        return known.evidence
    return gather_evidence(width_graph, data, selection, options.rotates)


def _turns(evidence: Evidence, asked: Requested) -> dict[ChannelGroup, Rotation]:
    """Return the new bases of linear groups that lose channels, but for those whose channels the plan names."""
    # All of them are found before any weight changes: readers of one group write another.
    shrinking = (group for group, width in asked.widths.items() if width < group.width and group not in asked.channels)
    found = {group: evidence.rotation(group) for group in shrinking}
    return {group: turned for group, turned in found.items() if turned is not None}


def _turned(evidence: Evidence, turns: Mapping[ChannelGroup, Rotation], transaction: Transaction) -> Moments | None:
    """Bring groups to their new bases, and return the moments in these."""
    moments = evidence.moments
    for turned in turns.values():
        assert moments is not None
        moments = rotated(evidence.width_graph, turned, moments, transaction)
    return moments


def _channels_on_record(
    kept: Mapping[ChannelGroup, Indices], asked: Requested, turns: Mapping[ChannelGroup, Rotation], known: _Known
) -> dict[str, Any]:
    """Return what the history tells of channels; in a new basis there are no old ones."""
    found = {group.name: own[own != NEW].tolist() for group, own in kept.items() if group not in turns}
    return {
        "kept": dict(known.kept) if known.blind else found,
        "rotated": [group.name for group in turns],
        "named": [group.name for group in asked.channels],
    }


def _prepare(
    evidence: Evidence,
    moments: Moments | None,
    kept: Mapping[ChannelGroup, Indices],
    options: ResizeOptions,
    known: _Known,
) -> _Change:
    width_graph = evidence.width_graph
    analysis = width_graph.analysis
    maps = IndexMaps(analysis.space, {group.factor: own for group, own in kept.items()})
    missed: dict[str, str] = {}
    tensors, maps = resized_tensors(width_graph, maps, moments, options.fold, known.norms, missed)
    _refuse_infinite(width_graph, tensors)
    replacements = _replacements(width_graph, maps, tensors)
    fakes = {name: fake_like(analysis.mode, replacement.new) for name, replacement in replacements.items()}
    edits = AttributeEdits()
    graph = rewrite_graph(analysis, maps, fakes, edits)
    renew_metadata(analysis, graph, {name: replacement.new for name, replacement in replacements.items()})
    update = None
    if options.optimizer is not None:
        names = {entry.tensor: name for name, entry in analysis.parameters.items()}
        update = plan_optimizer_update(options.optimizer, list(replacements.values()), names)
    original = None
    if original_of(analysis.module) is not None:
        original = RESIZED if goes_along(analysis, maps, fakes, tensors, edits) else UNTOUCHED
    record = {
        "widths": {group.name: [group.width, len(own)] for group, own in kept.items()},
        "parameters": _count_after(width_graph, replacements),
        "evidence": moments.source if moments is not None else None,
        "selection": selection_name(evidence.selection),
        "folded": options.fold and moments is not None,
        "recalibrated": False,
        "lowered": dict(graph.lowered),
        "norms": ratios_by_gain(width_graph, maps),
        "not_refitted": missed,
        "original": original,
    }
    return _Change(graph, tensors, replacements, update, edits, record, _axes_on_record(width_graph, kept, maps))


def _axes_on_record(width_graph: WidthGraph, kept: Mapping[ChannelGroup, Indices], maps: IndexMaps) -> KnownAxes | None:
    """Return what the next analysis needs to know of groups that are of width one after a resize, if there are any."""
    narrow = {
        group.name: tuple((site.parameter, site.dim) for site in group.sites)
        for group in width_graph.groups
        if not group.is_lost and (len(kept[group]) if group in kept else group.width) == 1
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


def _kept(evidence: Evidence, group: ChannelGroup, width: int, asked: Requested) -> Indices:
    if group in asked.channels:
        return asked.channels[group]
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
