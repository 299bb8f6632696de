"""Objects that a model keeps, as configurations, changed in copies: whoever else holds them keeps them as they are.

All references within the model lead to the copy, and what leads to these is copied too. Objects that work on modules,
such as a trainer, are no part of a model: they go on holding what they held.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from fxwidth.rewriting.attributes import UnsettableError
from fxwidth.runtime.kept_objects import SIMPLE
from fxwidth.runtime.module_state import walk
from fxwidth.runtime.namespaces import attributes_of

# What a module keeps beside its own attributes: tensors, modules, hooks.
_MANAGED = frozenset(vars(nn.Module()))
_CLOSED = (nn.Module, Tensor, type, FunctionType)
_CONTAINERS = (dict, list, tuple)
_HOLDS_NOTHING = SIMPLE - {MethodType}
# How far objects are followed into objects and containers; the items of longer containers are data.
_DEEPEST, _LONGEST = 8, 4096

# An object, and its attributes with the values that they get.
Changed = tuple[Any, Mapping[str, Any]]


def changed_references(model: nn.Module, changes: Iterable[Changed]) -> list[tuple[nn.Module, str, Any]]:
    """Return the attributes of a model's modules by which objects are held that change, with what is to be held there.

    Raises:
        UnsettableError: an object cannot be copied, or its attribute not be set.
    """
    changed = {id(owner): (owner, values) for owner, values in changes}
    held = _Held(model, frozenset(changed))
    copies = _Copies(held, {key: values for key, (_, values) in changed.items()})
    return [(part, name, copies.of(value)) for part, name, _, value in _attributes(model) if id(value) in held.leading]


def set_in_copy(owner: Any, name: str, value: Any) -> None:
    """Set an attribute of an object that nobody else holds, also where it may not be set later, as in a frozen one."""
    try:
        setattr(owner, name, value)
    except AttributeError:
        object.__setattr__(owner, name, value)


def _attributes(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, Any]]:
    for path, part in walk(model):
        for name, value in vars(part).items():
            if name not in _MANAGED and type(value) not in _HOLDS_NOTHING:
                yield part, name, f"{path}.{name}" if path else name, value


class _Held:
    """What a model keeps in its attributes.

    Attributes:
        paths: where each object is, by identity.
        leading: the objects and containers that change, or by which such are held, by identity.
    """

    def __init__(self, model: nn.Module, changed: frozenset[int]) -> None:
        self.paths: dict[int, str] = {}
        self._values: dict[int, Any] = {}
        self._holders: dict[int, list[int]] = {}
        with_modules = self._followed(model)
        outside = self._upwards(with_modules, lambda _: True)
        self.leading = self._upwards(
            changed, lambda key: key not in outside or issubclass(type(self._values[key]), _CONTAINERS)
        )

    def _followed(self, model: nn.Module) -> set[int]:
        """Note who holds what; return who holds modules."""
        with_modules: set[int] = set()
        waiting = deque((value, path, 0) for _, _, path, value in _attributes(model))
        while waiting:
            value, path, depth = waiting.popleft()
            if id(value) in self.paths:
                continue
            self.paths[id(value)], self._values[id(value)] = path, value
            for name, part in _parts(value) if depth < _DEEPEST else ():
                if issubclass(type(part), nn.Module):
                    with_modules.add(id(value))
                elif type(part) not in _HOLDS_NOTHING:
                    self._holders.setdefault(id(part), []).append(id(value))
                    waiting.append((part, f"{path}{name}", depth + 1))
        return with_modules

    def _upwards(self, keys: Iterable[int], chosen: Callable[[int], bool]) -> set[int]:
        found = set(keys)
        waiting = list(found)
        while waiting:
            for key in self._holders.get(waiting.pop(), ()):
                if key not in found and chosen(key):
                    found.add(key)
                    waiting.append(key)
        return found


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what an object or a container holds, and how it is reached from there."""
    kind = type(value)
    if kind is MethodType:
        yield ".__self__", value.__self__
    elif kind is partial:
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif not issubclass(kind, _CLOSED) and not kind.__module__.startswith("torch."):
        if issubclass(kind, _CONTAINERS) and len(value) <= _LONGEST:
            items = dict.items(value) if issubclass(kind, dict) else enumerate(value)
            yield from ((f"[{key!r}]", item) for key, item in items)
        yield from ((f".{name}", item) for name, item in (attributes_of(value) or {}).items())


class _Copies:
    """The copies of what leads to objects that change, each made once."""

    def __init__(self, held: _Held, changes: Mapping[int, Mapping[str, Any]]) -> None:
        self._held = held
        self._changes = changes
        self._made: dict[int, Any] = {}

    def of(self, value: Any) -> Any:
        """Return what is to be held in the place of a value."""
        if id(value) not in self._held.leading:
            return value
        if id(value) not in self._made:
            made = self._rebuilt(value)
            # In a cycle it may be there by now.
            self._made.setdefault(id(value), self._copied(value) if made is None else made)
        return self._made[id(value)]

    def _rebuilt(self, value: Any) -> Any:
        """Return a copy of what cannot be changed once it is there; None for all else."""
        kind = type(value)
        if kind is MethodType:
            return MethodType(value.__func__, self.of(value.__self__))
        if kind is partial:
            return partial(self.of(value.func), *self.of(value.args), **self.of(value.keywords))
        if issubclass(kind, tuple):
            items = [self.of(item) for item in value]
            return kind(*items) if hasattr(kind, "_fields") else kind(items)
        return None

    def _copied(self, value: Any) -> Any:
        path = self._held.paths[id(value)]
        new = _copy_of(value, path)
        self._made[id(value)] = new
        if isinstance(value, (dict, list)):
            put: Any = dict.__setitem__ if isinstance(value, dict) else list.__setitem__
            for key, item in list(dict.items(value) if isinstance(value, dict) else enumerate(value)):
                if id(item) in self._held.leading:
                    put(new, key, self.of(item))
        for name, item in (attributes_of(value) or {}).items():
            if id(item) in self._held.leading:
                (attributes_of(new) or {})[name] = self.of(item)
        for name, number in self._changes.get(id(value), {}).items():
            try:
                set_in_copy(new, name, number)
            except Exception as error:
                raise UnsettableError(
                    f"'{path}.{name}' cannot be set to {number!r}: {type(error).__name__}: {error}. Let "
                    f"{type(value).__name__} take another number there, or keep the groups of that size by keep=[...]."
                ) from error
        return new


def _copy_of(value: Any, path: str) -> Any:
    """Return a shallow copy of an object, or tell where it has none."""
    try:
        new = copy.copy(value)
        why = None if new is not value and _is_apart(value, new) else "its copy is the object itself"
    except Exception as error:
        new, why = None, f"{type(error).__name__}: {error}"
    if why is not None:
        raise UnsettableError(
            f"'{path}' cannot be copied: {why}. A size in {type(value).__name__} would change, which others that hold "
            "the object must not see. Let copy.copy give another object, or keep the groups of that size by keep=[...]."
        )
    return new


def _is_apart(value: Any, new: Any) -> bool:
    own = attributes_of(value)
    return own is None or attributes_of(new) is not own
