"""Nested values: what a model takes and returns, taken apart into tensors and put together again.

Containers that `torch.utils._pytree` knows are opened by it; any other object is opened by its attributes, where one of
them holds a tensor. So dicts, dataclasses, model outputs and caches need no registration.
"""

from __future__ import annotations

import copy
import types
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

_OPAQUE = (
    nn.Module,
    type,
    types.ModuleType,
    types.FunctionType,
    types.MethodType,
    torch.dtype,
    torch.device,
    str,
    bytes,
)
_MUTABLE = (list, dict, set)
# Symbolic sizes are computed from tensors, and proxies stand for them.
LEAVES = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, fx.Proxy)


@dataclass(frozen=True)
class Leaf:
    """The place of a tensor in the order of a flattened value, and whether it is inside of an object with a state.

    Containers and dataclasses are made to be read; of other objects (caches) only their own class knows the inside.
    """

    position: int
    is_state: bool = False


@dataclass(frozen=True)
class Constant:
    """A part without tensors, kept as it is."""

    value: Any


@dataclass(frozen=True)
class Container:
    """A list, tuple, dict or any other kind of container registered with pytree."""

    spec: pytree.TreeSpec
    parts: tuple[Structure, ...]


@dataclass(frozen=True)
class Instance:
    """An object of any other class: its items where it is a list or dict, and its attributes."""

    kind: type
    number: int
    items: Structure | None
    attributes: Mapping[str, Structure]


@dataclass(frozen=True)
class Again:
    """An object that occurs for a second time."""

    number: int


Structure = Leaf | Constant | Container | Instance | Again


def flatten(value: Any, kinds: tuple[type, ...] = LEAVES) -> tuple[list[Any], Structure]:
    """Return the tensors (or the parts of other kinds) of a nested value, in order, and what puts it together again."""
    flattener = _Flattener(kinds)
    structure = flattener.open(value)
    return flattener.leaves, structure


def flatten_each(values: Iterable[Any], kinds: tuple[type, ...] = LEAVES) -> tuple[list[Any], tuple[Structure, ...]]:
    """Return the tensors of several values, in order, and the structure of each."""
    flattener = _Flattener(kinds)
    structures = tuple(map(flattener.open, values))
    return flattener.leaves, structures


def rebuild(structure: Structure, leaves: Sequence[Any]) -> Any:
    """Return a new value of a structure around other leaves; lists and dicts in it are new ones too."""
    return _Rebuilder(leaves).make(structure)


def rebuild_each(structures: Iterable[Structure], leaves: Sequence[Any]) -> list[Any]:
    """Return new values of several structures around other leaves."""
    return list(map(_Rebuilder(leaves).make, structures))


def deep_tensors(value: Any) -> list[Tensor]:
    """Return the tensors of a nested value, in order; unlike `tensors_in`, it looks into objects of any class."""
    if isinstance(value, Tensor):
        return [value]
    return [leaf for leaf in flatten(value)[0] if isinstance(leaf, Tensor)]


def states_in(value: Any) -> list[Tensor]:
    """Return the tensors of a nested value that are inside of objects with a state, such as caches."""
    flattener = _Flattener((Tensor,))
    flattener.open(value)
    return flattener.states


def sample_count(value: Any) -> int:
    """Return the length of the first tensor in a nested value that has dims; one where none has."""
    return next((len(tensor) for tensor in deep_tensors(value) if tensor.dim()), 1)


def map_leaves(function: Callable[[Any], Any], value: Any, *kinds: type) -> Any:
    """Return a nested value with a function of each tensor, or of each part of other kinds, in its place."""
    leaves, structure = flatten(value, kinds or (Tensor,))
    return rebuild(structure, [function(leaf) for leaf in leaves]) if leaves else value


def has_attributes(value: Any) -> bool:
    """Tell whether a value has attributes of its own."""
    return bool(getattr(value, "__dict__", None))


class _Flattener:
    def __init__(self, kinds: tuple[type, ...]) -> None:
        self.leaves: list[Any] = []
        self.states: list[Any] = []
        self._kinds = kinds
        self._is_state = False
        self._numbers: dict[int, int] = {}

    def open(self, value: Any) -> Structure:
        if isinstance(value, self._kinds):
            self.leaves.append(value)
            if self._is_state:
                self.states.append(value)
            return Leaf(len(self.leaves) - 1, self._is_state)
        if not _holds(value, self._kinds, [] if torch.compiler.is_compiling() else {}):
            return Constant(value)
        if _is_container(value):
            parts, spec = pytree.tree_flatten(value, is_leaf=lambda part: part is not value)
            return Container(spec, tuple(map(self.open, parts)))
        if id(value) in self._numbers:
            return Again(self._numbers[id(value)])
        number = self._numbers[id(value)] = len(self._numbers)
        items = None
        if isinstance(value, dict):
            items = self.open(dict(value))
        elif isinstance(value, list):
            items = self.open(list(value))
        outside, self._is_state = self._is_state, self._is_state or not is_dataclass(value)
        attributes = {name: self.open(part) for name, part in named_attributes(value)}
        self._is_state = outside
        return Instance(type(value), number, items, attributes)


class _Rebuilder:
    def __init__(self, leaves: Sequence[Any]) -> None:
        self._leaves = leaves
        self._made: dict[int, Any] = {}

    def make(self, structure: Structure) -> Any:
        if isinstance(structure, Leaf):
            return self._leaves[structure.position]
        if isinstance(structure, Constant):
            # What the receiver may change must not be shared between calls.
            return copy.deepcopy(structure.value) if isinstance(structure.value, _MUTABLE) else structure.value
        if isinstance(structure, Container):
            return _put_together(structure.spec, map(self.make, structure.parts))
        if isinstance(structure, Again):
            return self._made[structure.number]
        # Not by its constructor, as below.
        kind: Any = structure.kind
        made = self._made[structure.number] = kind.__new__(kind)
        if structure.items is not None:
            items = self.make(structure.items)
            (dict.update if isinstance(made, dict) else list.extend)(made, items)
        for name, part in structure.attributes.items():
            object.__setattr__(made, name, self.make(part))
        return made


def _put_together(spec: pytree.TreeSpec, parts: Iterable[Any]) -> Any:
    if spec.type is namedtuple:
        # Not by its constructor, which may be one of its own: what that takes is not known, and it has done its work.
        return tuple.__new__(spec.context, parts)
    return pytree.tree_unflatten(parts, spec)


def _is_container(value: Any) -> bool:
    return not pytree.tree_structure(value, is_leaf=lambda part: part is not value).is_leaf()


def _holds(value: Any, kinds: tuple[type, ...], seen: dict[int, Any] | list[Any]) -> bool:
    if isinstance(value, kinds):
        return True
    # A fake tensor's attributes lead to all that was ever computed of sizes.
    if value is None or isinstance(value, (int, float, complex, Tensor, *_OPAQUE)) or _is_known(value, seen):
        return False
    return any(_holds(part, kinds, seen) for part in _parts(value))


def _is_known(value: Any, seen: dict[int, Any] | list[Any]) -> bool:
    """Tell whether a value was met before, and note it, so that its id is not given to another one."""
    if isinstance(seen, dict):
        known = id(value) in seen
        seen[id(value)] = value
        return known
    # By `is`, since torch.compile of torch 2.11 knows no `id` of a dict.
    known = any(value is one for one in seen)
    seen.append(value)
    return known


def _parts(value: Any) -> list[Any]:
    # A list: torch.compile cannot leave a generator that goes through another halfway.
    if _is_container(value):
        return pytree.tree_leaves(value, is_leaf=lambda part: part is not value)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [*items, *(part for _, part in named_attributes(value))]


def named_attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of an object by name, those in slots too."""
    yield from getattr(value, "__dict__", {}).items()
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)
