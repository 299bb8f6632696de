"""All that a resize puts in place: tensors, graph, attributes, optimizer state, and its entry in the history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from fxwidth.analysis.free_outputs import outputs_after
from fxwidth.analysis.known_axes import KnownAxes, known_axes
from fxwidth.analysis.result import Analysis
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.costs.counts import flops_before_and_after
from fxwidth.errors import FxwidthError
from fxwidth.gradients.informed_rows import InformedRows
from fxwidth.options import ResizeOptions
from fxwidth.reconstruction.bn_recalibration import Recalibration
from fxwidth.reconstruction.copied_channels import copy_tables
from fxwidth.reconstruction.unfitted_uses import unfitted_uses
from fxwidth.recording.width_history import RESIZED, UNTOUCHED
from fxwidth.registration import name_of
from fxwidth.resizing.channel_selection import ChannelSelection
from fxwidth.resizing.optimizer_state import OptimizerUpdate, Replacement, plan_optimizer_update
from fxwidth.resizing.parameters import dim_maps, ratios_by_gain, resized_tensors
from fxwidth.resizing.requested import Known
from fxwidth.resizing.shared_memory import refuse_shared_memory
from fxwidth.rewriting.added_modules import remove_unused
from fxwidth.rewriting.attributes import AttributeEdits
from fxwidth.rewriting.graphs import RewrittenGraph, rewrite_graph
from fxwidth.rewriting.metadata import renew_metadata
from fxwidth.rewriting.originals import goes_along, leave_behind, original_of
from fxwidth.rewriting.successors import successor
from fxwidth.rewriting.transaction import Transaction
from fxwidth.rules.copies import channel_copies
from fxwidth.runtime.fake_tensors import fake_like
from fxwidth.runtime.finiteness import is_sound
from fxwidth.runtime.tensor_slots import set_slot, tensor_slots
from fxwidth.statistics.moments import Moments
from fxwidth.weights.readers import wiring_of


@dataclass(frozen=True)
class Edits:
    """What a resize will put in place; nothing has changed yet.

    Attributes:
        graph: the nodes, modules and constants at the new sizes.
        tensors: the new values of parameters and buffers that change, by name.
        replacements: those of them that become new objects.
        update: what happens to the optimizer.
        attributes: what happens to size attributes of modules.
        record: the entry in the history.
        axes: what the next analysis needs to know of groups of width one.
        maps: which channels of each dim stay.
    """

    graph: RewrittenGraph
    tensors: Mapping[str, Tensor]
    replacements: Mapping[str, Replacement]
    update: OptimizerUpdate | None
    attributes: AttributeEdits
    record: dict[str, Any]
    axes: KnownAxes | None
    maps: IndexMaps

    def put_in_place(self, module: fx.GraphModule, transaction: Transaction) -> None:
        """Give the module, and the model that it was traced from where that goes along, its new graph and tensors."""
        original = original_of(module)
        goes = self.record["original"] == RESIZED
        replaced = [one.old for one in self.replacements.values()]
        leave_behind(module, goes, replaced, self.attributes, transaction)
        slots = tensor_slots(module)
        for name, constant in self.graph.additions.constants.items():
            module.register_buffer(name, constant)
        for path, part in self.graph.additions.modules.items():
            owner = module.get_submodule(path.rpartition(".")[0])
            module.add_submodule(path, part.train(owner.training))
        module.graph = self.graph.graph
        in_original = dict(tensor_slots(original).values()) if original is not None and goes else {}
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
        corrected = recalibration.corrected({n: i for n, i in kept.items() if i is not None})
        for name, tensor in corrected.items():
            transaction.overwrite(slots[name][0], tensor)
        self.record["recalibrated"] = bool(corrected)


def prepare_edits(
    selection: ChannelSelection,
    moments: Moments | None,
    options: ResizeOptions,
    known: Known,
    informed: InformedRows,
) -> Edits:
    """Compute and check all that is to change.

    Args:
        selection: the channels to keep.
        moments: what readers see of the channels, in the bases that they have by now; None where that is unknown.
        options: those of the resize.
        known: what was known before.
        informed: the new rows that go by the data and the loss.

    Raises:
        FxwidthError: a node cannot follow, a value would not be finite, or the optimizer's state is unknown.
    """
    analysis = selection.evidence.width_graph.analysis
    new = _new_tensors(selection, moments, options, known, informed)
    replacements = _replacements(analysis, new.maps, new.tensors)
    fakes = {name: fake_like(analysis.mode, replacement.new) for name, replacement in replacements.items()}
    attributes = AttributeEdits()
    graph = rewrite_graph(analysis, new.maps, fakes, attributes)
    renew_metadata(analysis, graph, {name: replacement.new for name, replacement in replacements.items()})
    update = None
    if options.optimizer is not None:
        names = {entry.tensor: name for name, entry in analysis.parameters.items()}
        update = plan_optimizer_update(options.optimizer, list(replacements.values()), names)
    original = None
    if original_of(analysis.module) is not None:
        goes = goes_along(analysis, new.maps, fakes, new.tensors, attributes)
        original = RESIZED if goes else UNTOUCHED
    record = {
        "widths": {group.name: [group.width, len(own)] for group, own in selection.kept.items()},
        "parameters": _count_after(analysis, replacements),
        "flops": None if known.blind else _flops(selection),
        "evidence": moments.source if moments is not None else None,
        "selection": name_of(selection.evidence.selection),
        "folded": options.fold and moments is not None,
        "recalibrated": False,
        "lowered": dict(graph.lowered),
        "norms": ratios_by_gain(analysis, new.maps),
        "keeps_eps": known.keeps_eps,
        "copies": list(new.copies),
        "not_refitted": new.missed,
        "original": original,
        "outputs": outputs_after(analysis, new.maps),
        "directions": name_of(options.directions) if selection.growing else None,
        "not_informed": dict(informed.untold),
        "reader_step": None,
        **selection.told(),
        **({"kept": dict(known.kept)} if known.blind else {}),
    }
    axes = _axes_on_record(selection, new.maps)
    return Edits(graph, new.tensors, replacements, update, attributes, record, axes, new.maps)


@dataclass(frozen=True)
class _NewTensors:
    """What parameters and buffers become.

    Attributes:
        tensors: their values, by name, of those that change.
        maps: which entries stay, with the tables of copies of channels.
        copies: those tables.
        missed: what could not be fitted anew, and why, by name.
    """

    tensors: Mapping[str, Tensor]
    maps: IndexMaps
    copies: Sequence[Any]
    missed: dict[str, str]


def _new_tensors(
    selection: ChannelSelection,
    moments: Moments | None,
    options: ResizeOptions,
    known: Known,
    informed: InformedRows,
) -> _NewTensors:
    """Return what parameters and buffers become, checked to be finite."""
    width_graph = selection.evidence.width_graph
    analysis = width_graph.analysis
    missed: dict[str, str] = {}
    tensors, maps = resized_tensors(
        width_graph, selection.maps(), moments, options.fold, known.norms, missed, options.directions, informed.rows
    )
    if known.keeps_eps:
        maps = maps.with_same_eps()
    if not known.blind:
        refuse_shared_memory(analysis, tensors)
    if options.fold and moments is not None:
        rotated = [group.factor for group in selection.bases]
        missed = {**unfitted_uses(wiring_of(width_graph), maps, rotated), **missed}
    copies = copy_tables(analysis, maps, moments if options.fold else None) if known.copies is None else known.copies
    calls = channel_copies(analysis.calls)
    maps = maps.with_tables({call.index: table for call, table in zip(calls, copies, strict=True)})
    _refuse_infinite(analysis, tensors)
    return _NewTensors(tensors, maps, copies, missed)


def _axes_on_record(selection: ChannelSelection, maps: IndexMaps) -> KnownAxes | None:
    """Return what the next analysis needs to know of groups that are of width one after a resize, if there are any."""
    width_graph, kept = selection.evidence.width_graph, selection.kept
    narrow = {
        group.name: tuple((site.parameter, site.dim) for site in group.sites)
        for group in width_graph.groups
        if not group.is_lost and (len(kept[group]) if group in kept else group.width) == 1
    }
    return known_axes(width_graph.analysis, maps, narrow) if narrow or width_graph.analysis.lost else None


def _refuse_infinite(analysis: Analysis, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        old = analysis.parameters[name].tensor
        new = nn.Parameter(tensor, requires_grad=False) if isinstance(old, nn.Parameter) else tensor
        if is_sound(old) and not is_sound(new):
            raise FxwidthError(
                f"{name} would hold values that are not finite (NaN or infinity) after this resize, beyond the range "
                f"of {old.dtype}. Resize other groups, or bring the weights of this one's layers to a common scale."
            )


def _replacements(analysis: Analysis, maps: IndexMaps, tensors: Mapping[str, Tensor]) -> dict[str, Replacement]:
    result = {}
    for name, tensor in tensors.items():
        entry = analysis.parameters[name]
        indices = dim_maps(maps, entry.axes)
        if all(kept is None for kept in indices):
            continue
        new = successor(name, entry.tensor, tensor, indices)
        result[name] = Replacement(name, entry.tensor, new, indices)
    return result


def _flops(selection: ChannelSelection) -> list[int] | None:
    widths = {group.factor: len(own) for group, own in selection.kept.items()}
    return flops_before_and_after(selection.evidence.width_graph, widths)


def _count_after(analysis: Analysis, replacements: Mapping[str, Replacement]) -> list[int]:
    parameters = {
        name: entry.tensor for name, entry in analysis.parameters.items() if isinstance(entry.tensor, nn.Parameter)
    }
    before = sum(tensor.numel() for tensor in parameters.values())
    after = sum((replacements[name].new if name in replacements else t).numel() for name, t in parameters.items())
    return [before, after]
