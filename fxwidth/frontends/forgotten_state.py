"""State that a model's code keeps in Python and a graph would not: counters, and tensors kept outside of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from fxwidth.runtime.kept_objects import Change, holds, is_plain
from fxwidth.runtime.module_state import Held, held_by
from fxwidth.runtime.pytrees import deep_tensors, flatten, map_leaves
from fxwidth.runtime.trace_guards import UntraceableError

# What a tracer itself puts on the module that it traces.
_OF_TRACER = "_tensor_constant"


def refuse_stores_inside(held: Held, failed: list[nn.Module]) -> None:
    """Check that no module has kept what it was traced with: the graph would not keep what it is run with.

    Args:
        held: what modules held before.
        failed: takes the module that does.

    Raises:
        UntraceableError: one has.
    """
    for change in held.own.changes():
        if holds(change.new, fx.Proxy):
            if isinstance(change.owner, nn.Module):
                failed.append(change.owner)
            raise UntraceableError(f"the model keeps what it computes in {_place(change)}, which a graph does not")


def refuse_stores_outside(held: Held) -> None:
    """Check that no proxy is kept outside of a model: the graph would not keep what it is run with.

    Raises:
        UntraceableError: one is.
    """
    for change in held.outside.changes():
        if holds(change.new, fx.Proxy):
            raise UntraceableError(f"the model keeps what it computes {_place(change)}, which a graph does not")


def refuse_computed_inside(model: nn.Module, held: Held, is_table: Callable[[Tensor], bool]) -> None:
    """Check that of what a model keeps while it is exported, all is a table that is made once.

    Raises:
        UntraceableError: it keeps what it computes.
    """
    # A parameter that is kept under another name as well, as recurrent layers do, is not computed.
    own = {id(parameter) for parameter in model.parameters()}
    registered = {id(slots) for part in model.modules() for slots in (part._parameters, part._buffers)}
    for change in held.own.changes():
        if id(change.container) not in registered:
            _refuse_computed(change, lambda tensor: id(tensor) in own or is_table(tensor))


def refuse_computed_outside(held: Held, is_table: Callable[[Tensor], bool]) -> None:
    """Check that of what an exported model has kept outside of it, all is a table that is made once.

    Raises:
        UntraceableError: it keeps what it computes.
    """
    for change in held.outside.changes():
        _refuse_computed(change, is_table)


def _refuse_computed(change: Change, is_known: Callable[[Tensor], bool]) -> None:
    numbers = _computed_numbers(change.new)
    if numbers or not all(map(is_known, deep_tensors(change.new))):
        raise UntraceableError(f"the model keeps what it computes in {_place(change)}, which a graph does not")


def _computed_numbers(value: Any) -> list[Any]:
    """Return the numbers in a nested value that an exported graph computes from tensors, and not from sizes."""
    leaves = flatten(value, (torch.SymFloat, torch.SymBool, torch.SymInt))[0]
    return [leaf for leaf in leaves if not isinstance(leaf, torch.SymInt) or free_unbacked_symbols(leaf)]


def refuse_progress(model: nn.Module, held: Held, code: str, again: Callable[[], str], failed: list[nn.Module]) -> None:
    """Check that no plain data of a model goes on from call to call, or leads to another graph.

    What is set by a first call and stays, as the sizes that a cache is made for, may be forgotten.

    Args:
        model: the module, which has been traced.
        held: what it held before.
        code: of the graph.
        again: traces the model as the first trace has left it; returns the code.
        failed: takes the part that keeps such data.

    Raises:
        UntraceableError: some does.
    """
    first = plain_changes(held.changes())
    if not first:
        return
    since = held_by(model)
    same = again() == code
    changes = plain_changes(since.changes())
    if same and not changes:
        return
    change = (changes or first)[0]
    parts = [part for part in model.modules() if part is change.owner or type(part) is change.owner]
    failed += parts[:1]
    raise progress(change)


def leave(changes: Iterable[Change]) -> None:
    """Put what a run has changed where an exporter has put back what was there before.

    Raises:
        UntraceableError: a container of the model has changed, which may have been put back or not.
    """
    for change in changes:
        if not change.name and change.owner is not None:
            raise progress(change)
        if isinstance(change.owner, nn.Module) and change.name in vars(change.owner):
            vars(change.owner)[change.name] = change.new


def same_changes(first: Iterable[Change], second: Iterable[Change]) -> bool:
    """Tell whether two runs have left the same behind."""
    left = [[(id(one.owner), one.name, one.new) for one in changes] for changes in (first, second)]
    return left[0] == left[1]


def progress(change: Change) -> UntraceableError:
    """Return the error that tells of data that goes on from call to call."""
    return UntraceableError(f"the model changes {_place(change)} from call to call, which a graph does not")


def plain_changes(changes: Iterable[Change]) -> list[Change]:
    """Return those of numbers, flags and texts; a size by which an exporter knows others is that of the examples."""
    # What is not plain may be all that an exporter knows, in which looking for sizes takes long.
    plain = [one for one in changes if is_plain(one.new, torch.SymInt) and not one.name.startswith(_OF_TRACER)]
    known = [replace(one, new=map_leaves(_size, one.new, torch.SymInt)) for one in plain]
    return [one for one in known if one.is_of_plain_data]


def _size(size: torch.SymInt) -> Any:
    return size.node.hint


def _place(change: Change) -> str:
    owner = change.owner
    name = repr(change.name) if change.name else "a container"
    if owner is None:
        return f"{name} outside of it"
    return f"{name} of {owner.__name__ if isinstance(owner, type) else type(owner).__name__}"
