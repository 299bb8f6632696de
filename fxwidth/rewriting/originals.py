"""The model that a graph was traced from: after a resize it is the resized model, or as it was, never half of each.

A graph shares parameters, and where it was traced symbolically also submodules, with its model. Whether the model's own
code works at the new sizes is tried out under fake tensors. Where it does, and does the same ops as the graph, the
model is resized with the graph. Where it does not, it is given what it had: the graph keeps the parameters, which an
optimizer knows, and the model gets copies. So do other graphs that share tensors with the two.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import chain
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, fx, nn

from fxwidth.analysis.op_signatures import differ, prescribed_signatures
from fxwidth.analysis.result import Analysis
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.errors import FxwidthError
from fxwidth.frontends.call_signature import UNKNOWN, Argument, invoke
from fxwidth.frontends.own_modes import PartModes, switch_modes
from fxwidth.rewriting.attributes import AttributeEdits, sizes_by_shape
from fxwidth.rewriting.copied_originals import models_of_copies
from fxwidth.rewriting.graph_calls import arguments_of_graph
from fxwidth.rewriting.model_runs import fakes_of, observed, run_model
from fxwidth.rewriting.optimizers import Optimizers
from fxwidth.rewriting.successors import twin
from fxwidth.rewriting.transaction import Transaction
from fxwidth.runtime.contexts import evaluating, quiet, training
from fxwidth.runtime.module_copies import moved, put_copies, shallow_copies
from fxwidth.runtime.module_state import restored, walk
from fxwidth.runtime.pytrees import flatten_each, rebuild_each
from fxwidth.runtime.tensor_slots import Slots, copies_of, overwrite, set_slot, substituted, tensor_slots


@dataclass(frozen=True)
class _Original:
    model: ref[nn.Module]
    arguments: tuple[Argument, ...]


# Not in the graph module, whose copies must not drag the model along.
_ORIGINALS: WeakKeyDictionary[fx.GraphModule, _Original] = WeakKeyDictionary()
# The first of each graph, also where the two have parted.
_TRACED: WeakKeyDictionary[fx.GraphModule, ref[nn.Module]] = WeakKeyDictionary()


def remember_original(module: fx.GraphModule, model: nn.Module, arguments: Sequence[Argument]) -> None:
    """Note of which model a graph is, and how that is called; the model is not kept alive."""
    _ORIGINALS[module] = _Original(ref(model), tuple(replace(argument, value=UNKNOWN) for argument in arguments))
    _TRACED.setdefault(module, ref(model))


def is_traced_from(module: fx.GraphModule, model: nn.Module) -> bool | None:
    """Tell whether a graph was traced from a model; None where it was copied since, and that is not known."""
    _find_models_of_copies()
    known = _TRACED.get(module)
    return None if known is None else known() is model


def original_of(module: fx.GraphModule) -> nn.Module | None:
    """Return the model that shares parameters with a graph that was traced from it, if it is still there."""
    _find_models_of_copies()
    known = _ORIGINALS.get(module)
    return None if known is None else known.model()


def _find_models_of_copies() -> None:
    for graph, model in models_of_copies():
        remember_original(graph, model, arguments_of_graph(graph))


def resize_transaction(
    *modules: nn.Module,
    optimizer: Optimizers | None = None,
    objects: Iterable[object] = (),
    holds: bool = False,
) -> Transaction:
    """Return a transaction of all that a resize of some modules may change: their models and other graphs of these.

    The arguments are those of `Transaction`.
    """
    originals = [original_of(module) for module in modules if isinstance(module, fx.GraphModule)]
    own = [*modules, *(original for original in originals if original is not None)]
    return Transaction(*own, *_other_graphs(own), optimizer=optimizer, objects=objects, holds=holds)


def _other_graphs(modules: Sequence[nn.Module]) -> list[fx.GraphModule]:
    """Return the traced graphs that share tensors with some modules, but for these."""
    if _sharing(modules):
        # Graphs are in cycles: those that nobody has any more must not get tensors of their own.
        gc.collect()
    return _sharing(modules)


def _sharing(modules: Sequence[nn.Module]) -> list[fx.GraphModule]:
    _find_models_of_copies()
    own = {id(tensor) for module in modules for tensor, _ in tensor_slots(module).values()}
    known = set(map(id, modules))
    found = []
    # Of no modules there is nothing to share: most steps of an Evolver resize none.
    for graph in list(_ORIGINALS) if own else ():
        tensors = chain(graph.parameters(), graph.buffers())
        if id(graph) not in known and not own.isdisjoint(map(id, tensors)):
            found.append(graph)
    return found


def goes_along(
    analysis: Analysis, maps: IndexMaps, fakes: Mapping[str, Tensor], changed: Iterable[str], edits: AttributeEdits
) -> bool:
    """Tell whether the model that a graph was traced from does at new sizes what the graph does.

    If so, the size attributes of its modules have been set.

    Args:
        analysis: the graph at the old sizes.
        maps: the index maps of the resize.
        fakes: the resized parameters and buffers as fake tensors, by name.
        changed: the names of all tensors that get other values.
        edits: takes the changes of module attributes.
    """
    original = original_of(analysis.module)
    assert original is not None
    slots = tensor_slots(original)
    names = {id(tensor): name for name, (tensor, _) in slots.items()}
    if any(id(analysis.parameters[name].tensor) not in names for name in changed):
        return False
    resized = {names[id(analysis.parameters[name].tensor)] for name in fakes}
    holders = {id(part) for name in resized for part, _ in slots[name][1]}
    start = edits.mark()
    stand_ins = fakes_of(slots, analysis, fakes)
    # Not where attributes are given back that the model's code may have written to.
    with substituted(original, stand_ins, slots, nullcontext):
        _apply(_sizes(original, holders), edits)
    with substituted(original, stand_ins, slots, restored):
        with evaluating(original):
            done = observed(analysis, original, _ORIGINALS[analysis.module].arguments)
        wanted = prescribed_signatures(analysis.calls, maps)
        follows = done is not None and differ(done, wanted) is None
        # It may have parts for training that the graph, which is of one mode, has not.
        trains = follows and _trains(analysis, original)
        # Again, for weights that a module computes when it is called.
        sizes = _sizes(original, holders)
    _apply(sizes, edits)
    if follows and not trains:
        # What never ran says nothing, as it needs targets; what fails on fake tensors alone may fail at other sizes.
        with edits.suspended():
            trains = not (_trained_on_fakes(analysis, original, slots) or _trained_on_values(analysis, original, slots))
    if not trains:
        edits.undo(start)
    return trains


def _sizes(original: nn.Module, holders: set[int]) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Return the size attributes of the modules that hold resized tensors, or in whose parts such are."""
    return [
        (part, sizes_by_shape(part))
        for _, part in walk(original)
        if any(id(inner) in holders for _, inner in walk(part))
    ]


def _apply(sizes: Iterable[tuple[nn.Module, dict[str, Any]]], edits: AttributeEdits) -> None:
    for part, own in sizes:
        edits.apply(part, own)


def _trained_on_fakes(analysis: Analysis, original: nn.Module, slots: Slots) -> bool:
    with substituted(original, fakes_of(slots, analysis, {}), slots, restored):
        return _trains(analysis, original)


def _trained_on_values(analysis: Analysis, original: nn.Module, slots: Slots) -> bool:
    """Tell whether a model runs in training mode at the old sizes, on copies of its tensors."""
    if any(tensor.is_meta for tensor, _ in slots.values()):
        return False
    leaves, structures = flatten_each(analysis.inputs, (Tensor,))
    real = [torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device) for leaf in leaves]
    replaced = substituted(original, copies_of(slots), slots, restored)
    with suppress(Exception), torch.no_grad(), quiet(), replaced:
        with training(original):
            invoke(original, _ORIGINALS[analysis.module].arguments, rebuild_each(structures, real))
        switch_modes(original)
        return True
    return False


def _trains(analysis: Analysis, original: nn.Module) -> bool:
    """Tell whether a model runs in training mode, and can change its mode."""
    with suppress(Exception):
        with training(original):
            run_model(analysis, original, _ORIGINALS[analysis.module].arguments, lambda _: None)
        with analysis.mode, quiet():
            switch_modes(original)
        return True
    return False


def leave_behind(
    module: fx.GraphModule, resized: bool, replaced: Iterable[Tensor], edits: AttributeEdits, transaction: Transaction
) -> None:
    """Part a graph, and its model where that is resized too, from all that stays as it was, which keeps what it had.

    That is the model where its own code does not go along, and every other graph that shares tensors with the two. The
    graph keeps the tensors that change in value alone, and those that do not change, for an optimizer knows them:
    what stays gets copies. Attributes that have been set for the new sizes stay set in what is resized.

    Args:
        module: the graph.
        resized: whether the model that it was traced from is resized with it.
        replaced: the tensors in whose place the graph is about to get others.
        edits: the attributes that have been set.
        transaction: what has been written to so far, and takes the rest.
    """
    original = original_of(module)
    models = [] if original is None else [original]
    # What was garbage already is gone since the transaction was begun.
    others = _sharing([module, *models])
    if resized:
        # The modules are the model's: other graphs get copies of them, as they were before.
        with edits.suspended():
            for other in others:
                _separate(other, [module, *models])
        staying: list[nn.Module] = [*others]
        forgetting = others
    else:
        staying = [*models, *others]
        forgetting = [module] if models else []
        _separate(module, staying)
        edits.take_back(part for one in staying for _, part in walk(one))
    for graph in forgetting:
        transaction.undo.callback(_ORIGINALS.__setitem__, graph, _ORIGINALS[graph])
        del _ORIGINALS[graph]
    _give_back([module, *(models if resized else [])], staying, replaced, transaction)


def part_others(module: fx.GraphModule, model: nn.Module, transaction: Transaction) -> None:
    """Part a model from the graphs that share modules with it, but for one: they keep what they have, in copies."""
    for other in _sharing([model]):
        if other is module:
            continue
        _separate(other, [model])
        if original_of(other) is model:
            transaction.undo.callback(_ORIGINALS.__setitem__, other, _ORIGINALS[other])
            del _ORIGINALS[other]


def _give_back(
    moving: Sequence[nn.Module], staying: Sequence[nn.Module], replaced: Iterable[Tensor], transaction: Transaction
) -> None:
    """Give modules that stay the values that they had, and copies of the tensors that they share with others."""
    shared = {id(tensor) for one in moving for tensor, _ in tensor_slots(one).values()}
    given_up = {id(tensor) for tensor in replaced}
    copies: dict[int, Tensor] = {}
    for tensor, places in [slot for one in staying for slot in tensor_slots(one).values()]:
        before = transaction.before(tensor)
        if id(tensor) in given_up:
            if before is not tensor:
                overwrite(tensor, before)
        elif id(tensor) in shared:
            # What stays goes on sharing with what stays.
            if id(tensor) not in copies:
                copies[id(tensor)] = twin(tensor, before)
            for holder, attribute in places:
                set_slot(holder, attribute, copies[id(tensor)])


def _separate(module: nn.Module, others: Sequence[nn.Module]) -> None:
    """Put shallow copies in the place of the submodules that a graph shares with others."""
    own = {id(part) for _, part in walk(module)}
    shared = {id(part): (path, part) for other in others for path, part in walk(other) if id(part) in own}
    for path, part in shared.values():
        _refuse_own_forward(path, part)
    own_copies(module, [part for _, part in shared.values()])


def own_copies(module: nn.Module, parts: Iterable[nn.Module]) -> None:
    """Put shallow copies in the place of some submodules of a graph, with the same tensors."""
    copies = shallow_copies(parts)
    put_copies(module, copies)
    for _, part in walk(module):
        if isinstance(part, PartModes):
            part.parts = moved(part.parts, copies)


def _refuse_own_forward(path: str, part: nn.Module) -> None:
    forward = part.__dict__.get("forward")
    if forward is not None and not isinstance(forward, MethodType):
        raise FxwidthError(
            f"{path} has a forward put over that of its class, which a copy of it would not follow, and the model that "
            "was traced, or another graph of it, cannot do what the graph does at these widths. Delete that before the "
            "resize."
        )
