"""What modules keep: attributes, containers in them, fields of configurations, attributes of their classes.

Tensors among all that must outlive a run under fake tensors, and what code has written to must not stay so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from fxwidth.runtime.kept_objects import SIMPLE, Change, Kept, holds
from fxwidth.runtime.random_states import Generator, same_randomness
from fxwidth.runtime.reachable_state import called_functions, has_global_hooks, keep_reachable

# Substitution takes care of these.
_MANAGED = frozenset({"_parameters", "_modules"})
# What is noted about a graph is no state that its code writes to.
_NOTES = frozenset({"meta"})


_PLAIN_LAYERS = frozenset(
    f"torch.nn.modules.{name}"
    for name in ("activation", "batchnorm", "conv", "dropout", "flatten", "instancenorm", "linear", "normalization")
    + ("padding", "pixelshuffle", "pooling", "sparse", "upsampling")
)


def is_plain_layer(module: nn.Module) -> bool:
    """Tell whether only known code runs when a module is called: that of a layer of torch.nn, without hooks."""
    return type(module).__module__ in _PLAIN_LAYERS and not (module._forward_hooks or module._forward_pre_hooks)


class GraphPart(nn.Module):
    """A module that graphs are given beside those of the model; its own code writes to nothing and calls no other's."""


def walk(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return what `module.named_modules()` yields, quicker: no generator inside of a generator for every level."""
    found: dict[int, tuple[str, nn.Module]] = {}
    waiting = [("", module)]
    while waiting:
        path, part = waiting.pop()
        if id(part) in found:
            continue
        found[id(part)] = path, part
        inner = [(name, child) for name, child in part._modules.items() if child is not None]
        waiting += [(f"{path}.{name}" if path else name, child) for name, child in reversed(inner)]
    return list(found.values())


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked_part(module: nn.Module) -> str | None:
    """Return the class of the first part of a module that has hooks, but those by which torch computes weights."""
    for _, part in walk(module):
        for hook in (hook for name in _HOOKS for hook in part.__dict__[name].values()):
            code = hook if isinstance(hook, FunctionType) else type(hook)
            if not code.__module__.startswith("torch.nn.utils."):
                return type(part).__name__
    return None


def undisturbed(module: nn.Module) -> AbstractContextManager[list[Tensor]]:
    """Give modules back what their code has overwritten with fake tensors: caches, and weights computed by hooks."""
    return _restoring(_kept_by(module), lambda value: holds(value, FakeTensor))


def unchanged(module: nn.Module) -> AbstractContextManager[list[Tensor]]:
    """Give modules back what their code has overwritten with anything but fake tensors: counters, sizes of caches."""
    return _restoring(_kept_by(module), lambda value: not holds(value, FakeTensor))


@dataclass(frozen=True)
class Held:
    """What modules hold before their code is run.

    Attributes:
        tensors: parameters, buffers and tensors in attributes.
        unregistered: those that are neither parameters nor buffers, also outside of the modules.
        own: what is kept in the modules.
        outside: what their code reaches elsewhere.
    """

    tensors: list[Tensor]
    unregistered: list[Tensor]
    own: Kept
    outside: Kept

    @property
    def generators(self) -> list[Generator]:
        """Those of random numbers in Python and numpy."""
        return [*self.own.generators, *self.outside.generators]

    def changes(self) -> Iterator[Change]:
        """Yield what is held otherwise now."""
        yield from self.own.changes()
        yield from self.outside.changes()


def held_by(module: nn.Module) -> Held:
    """Return what modules hold now."""
    return _held(module, *kept_by([part for _, part in walk(module)]))


def _held(module: nn.Module, own: Kept, outside: Kept) -> Held:
    slots = [slots.values() for _, part in walk(module) for slots in (part._parameters, part._buffers)]
    registered = {id(tensor) for tensors in slots for tensor in tensors}
    others = [tensor for tensor in own.tensors if id(tensor) not in registered]
    # Weights of other models are large, and no forward pass writes to them.
    others += [one for one in outside.tensors if id(one) not in registered and not isinstance(one, nn.Parameter)]
    return Held(own.tensors, list({id(tensor): tensor for tensor in others}.values()), own, outside)


@contextmanager
def restored(module: nn.Module) -> Iterator[Held]:
    """Give modules back all that their code has overwritten, be it with fake tensors or with anything else.

    The values of parameters and buffers are in the care of others; that they have been written to is forgotten.
    """
    own, outside = _kept_by(module)
    held = _held(module, own, outside)
    with _restoring((own, outside), lambda _: True) as tensors:
        versions = list(map(_version, tensors))
        try:
            with same_values(held.unregistered):
                yield held
        finally:
            for tensor, version in zip(tensors, versions, strict=True):
                _set_version(tensor, version)


@contextmanager
def _restoring(kept: tuple[Kept, Kept], chosen: Callable[[Any], bool]) -> Iterator[list[Tensor]]:
    """Leave the global random states as they are, too."""
    own, outside = kept
    with same_randomness((*own.generators, *outside.generators)):
        try:
            yield own.tensors
        finally:
            own.put_back(chosen)
            outside.put_back(chosen)


_Values = list[tuple[Tensor, Tensor, int | None]]
# Of the runs under way: what they give back when they end, where whoever waits for them takes it.
_GIVEN_BACK: ContextVar[list[_Values] | None] = ContextVar("given_back", default=None)


@contextmanager
def same_values(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Give tensors back the values that code has written over, as if it had not."""
    before = [(tensor, tensor.detach().clone(), _version(tensor)) for tensor in tensors if not tensor.is_meta]
    unfinished = _GIVEN_BACK.get()
    if unfinished is not None:
        unfinished.append(before)
    has_ended = False
    try:
        yield
        has_ended = True
    finally:
        # What ends an op on its way may come between its writing and the count of that.
        _give_back([one for one in before if not has_ended or one[2] is None or one[0]._version != one[2]])
        if unfinished is not None:
            unfinished.pop()


@contextmanager
def values_taken(unfinished: list[_Values]) -> Iterator[None]:
    """Let a list hold, for a while, what runs that are under way will give back: all of it if they are ended."""
    token = _GIVEN_BACK.set(unfinished)
    try:
        yield
    finally:
        _GIVEN_BACK.reset(token)


def finish(unfinished: list[_Values]) -> None:
    """Give tensors back the values that ended runs have not; their versions may say already that they had."""
    for before in reversed(unfinished):
        _give_back(before)


def _give_back(before: _Values) -> None:
    with torch.inference_mode():
        for tensor, values, version in before:
            tensor.copy_(values)
            _set_version(tensor, version)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _set_version(tensor: Tensor, version: int | None) -> None:
    """Say that a tensor holds again what it held, so that what has been kept of it for a gradient is valid."""
    if version is not None and tensor._version != version:
        torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))


_HANDED: ContextVar[tuple[nn.Module, tuple[Kept, Kept]] | None] = ContextVar("handed", default=None)


@contextmanager
def handing_on(module: nn.Module, kept: tuple[Kept, Kept]) -> Iterator[None]:
    """Let the next run of a module use what is known to be kept by it, which takes a while to find.

    Nothing may be changed until then. Runs within that one find tensors in the place of others, and look themselves.
    """
    token = _HANDED.set((module, kept))
    try:
        yield
    finally:
        _HANDED.reset(token)


def _kept_by(module: nn.Module) -> tuple[Kept, Kept]:
    handed = _HANDED.get()
    if handed is None or handed[0] is not module:
        return kept_by([part for _, part in walk(module)])
    _HANDED.set(None)
    return handed[1]


def kept_by(parts: Sequence[nn.Module]) -> tuple[Kept, Kept]:
    """Return what is kept by modules that their code, or that of others, may write to; and outside of them."""
    # Without code of others, nothing is written but what layers of torch write to themselves, which are buffers.
    if not has_global_hooks() and all(map(_runs_known_code, parts)):
        return Kept(), Kept()
    return kept_in(parts), keep_reachable(parts)


def kept_in(parts: Sequence[nn.Module]) -> Kept:
    """Return what is kept by modules in their attributes, and by their classes."""
    kept = Kept()
    for part in parts:
        kept.add_attributes(part, _NOTES if isinstance(part, fx.GraphModule) else frozenset())
    for kind in {kind for part in parts for kind in type(part).__mro__}:
        if not kind.__module__.startswith(("torch.", "builtins")):
            kept.add_class(kind)
    return kept


def _runs_known_code(part: nn.Module) -> bool:
    if isinstance(part, fx.GraphModule):
        return not (part._forward_hooks or part._forward_pre_hooks or called_functions(part))
    if isinstance(part, GraphPart):
        return not (part._forward_hooks or part._forward_pre_hooks)
    return type(part) is nn.Module or is_plain_layer(part)


def stores(module: nn.Module, kind: type) -> Iterator[tuple[str, nn.Module]]:
    """Yield the path of each attribute or buffer that holds a value of a kind, and the submodule that keeps it."""
    for path, part in walk(module):
        for name, value in (*part._buffers.items(), *part.__dict__.items()):
            if type(value) not in SIMPLE and name not in _MANAGED and name != "_buffers" and holds(value, kind):
                yield (f"{path}.{name}" if path else name), part
