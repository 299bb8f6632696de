"""What objects hold, remembered and put back: attributes and containers, nested, of any class.

Nothing is put back by an object's own methods, which may forbid it or do more than that, and what still holds the same
is not touched.
"""

from __future__ import annotations

import gc
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from fxwidth.runtime.namespaces import ClassSpace, SlotSpace, attributes_of, slots_of
from fxwidth.runtime.random_states import OWN_GENERATORS, Generator

_MISSING = object()
# What holds no other objects, or none that are a model's own. Modules are gone through one by one.
_CLOSED = (
    *(type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Generator),
    *(type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, weakref.ref),
    *(nn.Module, fx.Graph, fx.Node),
)
# Most of what modules hold is of these, or empty: a quicker look is enough.
SIMPLE = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device, types.FunctionType, types.MethodType})
_EMPTIABLE = frozenset({dict, OrderedDict, list, set})
# How far objects are followed into objects: a configuration in a configuration, but not all that a trainer holds.
_DEEPEST = 2
# The items of longer containers are data.
_LONGEST = 4096

Predicate = Callable[[Any], bool]


@dataclass(frozen=True)
class Change:
    """What is held otherwise than before.

    Attributes:
        owner: the object or class it hangs on, None for what is found by code alone.
        name: of an attribute or a global, empty for what is in a container.
        old: what was there.
        new: what is there.
        container: the container, or None.
    """

    owner: Any
    name: str
    old: Any
    new: Any
    container: Any = None

    @property
    def is_of_plain_data(self) -> bool:
        """Tell whether numbers, flags or texts are others now, and not merely other objects of the same value."""
        return is_plain(self.new) and (self.old is _MISSING or is_plain(self.old)) and self.old != self.new


class Kept:
    """What some objects hold, and what the containers and the plain objects among that hold in turn.

    Attributes:
        tensors: those that were met.
        generators: those of random numbers in Python and numpy.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.generators: list[Generator] = []
        self._namespaces: list[_Namespace] = []
        self._containers: list[_Container] = []
        self._empty: list[Any] = []
        self._caches: list[Any] = []
        self._seen: set[int] = set()
        self._owner: Any = None

    def add_attributes(self, value: Any, shallow: frozenset[str] = frozenset()) -> None:
        """Remember the attributes of an object, and what is in them but for some, which are data."""
        own = vars(value)
        before = own.copy()
        self._owner = value
        self._namespaces.append(_Namespace(own, before, value))
        self._add_parts([item for name, item in before.items() if name not in shallow], 0)

    def add_value(self, value: Any) -> None:
        """Remember what is in a container or an object."""
        self._owner = None
        self._add_parts((value,), 0)

    def add_namespace(self, space: MutableMapping[str, Any]) -> None:
        """Remember what names stand for, and not what is in that."""
        self._namespaces.append(_Namespace(space, dict(space), None))

    def add_cache(self, cache: Any) -> None:
        """Take the cache of a function, which is emptied where values of a run that only looked have got into it."""
        self._caches.append(cache)

    def add_class(self, kind: type) -> None:
        """Remember the attributes of a class."""
        if id(kind) in self._seen:
            return
        self._seen.add(id(kind))
        space = ClassSpace(kind)
        before = dict(space)
        self._owner = kind
        self._namespaces.append(_Namespace(space, before, kind))
        self._add_parts(before.values(), 0)

    def put_back(self, chosen: Predicate) -> None:
        """Put back what is held otherwise now, where `chosen` says so of what is held in its place."""
        for namespace in self._namespaces:
            namespace.put_back(chosen)
        for container in self._containers:
            container.put_back(chosen)
        for value, _ in self._empty:
            if value and chosen(value):
                value.clear()
        for cache in self._caches:
            if holds_stand_ins(_cached(cache)):
                cache.cache_clear()

    def changes(self) -> Iterator[Change]:
        """Yield what is held otherwise now."""
        for namespace in self._namespaces:
            for name, value in list(namespace.space.items()):
                old = namespace.before.get(name, _MISSING)
                if old is not value:
                    yield Change(namespace.owner, name, old, value)
        for container in self._containers:
            now = container.kind.read(container.value)
            if not container.is_same(now):
                yield Change(container.owner, "", container.before, now, container.value)
        for value, owner in self._empty:
            if value:
                yield Change(owner, "", type(value)(), value, value)

    def _add_parts(self, values: Iterable[Any], depth: int) -> None:
        for value in values:
            if type(value) in SIMPLE:
                continue
            if type(value) in _EMPTIABLE and not value:
                self._empty.append((value, self._owner))
                continue
            if type(value) is tuple:
                self._add_parts(value, depth)
                continue
            # By its type alone: an object may answer any other question by code of its own.
            if issubclass(type(value), _CLOSED) or id(value) in self._seen:
                continue
            self._seen.add(id(value))
            if issubclass(type(value), Tensor):
                self.tensors.append(value)
            elif issubclass(type(value), OWN_GENERATORS):
                self.generators.append(value)
            elif issubclass(type(value), (tuple, frozenset)):
                self._add_parts(value, depth)
            else:
                self._add(value, depth)

    def _add(self, value: Any, depth: int) -> None:
        kind = next((kind for kind in _KINDS if issubclass(type(value), kind.base)), None)
        if kind is not None:
            container = _Container(value, kind, kind.read(value), self._owner)
            self._containers.append(container)
            if len(container.before) <= _LONGEST:
                is_mapping = isinstance(container.before, dict)
                self._add_parts(container.before.values() if is_mapping else container.before, depth)
        for space in (attributes_of(value), SlotSpace(value) if slots_of(type(value)) else None):
            if space is not None and depth < _DEEPEST:
                before = dict(space)
                self._namespaces.append(_Namespace(space, before, self._owner))
                self._add_parts(before.values(), depth + 1)


def is_plain(value: Any, *others: type) -> bool:
    """Tell whether a value is a number, a flag, a text or of some other types, or holds nothing else."""
    if issubclass(type(value), (list, tuple, set, dict)):
        return all(is_plain(part, *others) for part in (value.values() if isinstance(value, dict) else value))
    return issubclass(type(value), (bool, int, float, str, type(None), *others))


def holds(value: Any, *kinds: type) -> bool:
    """Tell whether a value is of one of some kinds, or a list, tuple or dict with such a value in it."""
    if issubclass(type(value), (dict, list, tuple)):
        return any(holds(part, *kinds) for part in (value.values() if isinstance(value, dict) else value))
    return issubclass(type(value), kinds)


def stand_ins(value: Any) -> list[FakeTensor]:
    """Return the fake tensors in a value, a list, a tuple or a dict."""
    if issubclass(type(value), (dict, list, tuple)):
        parts = value.values() if isinstance(value, dict) else value
        return [tensor for part in parts for tensor in stand_ins(part)]
    return [value] if issubclass(type(value), FakeTensor) else []


def holds_stand_ins(value: Any) -> bool:
    """Tell whether there is something in a value that stands for tensors in a run that only looks."""
    return holds(value, FakeTensor, fx.Proxy)


def _cached(cache: Any) -> list[Any]:
    """Return the keys and results in the cache of a function, which Python hands out only as what it refers to."""
    held = [part for part in gc.get_referents(cache) if part is not vars(cache)]
    results = [value for part in held if isinstance(part, dict) for value in (*part.keys(), *part.values())]
    return [*held, *results]


@dataclass(frozen=True)
class _Namespace:
    """The attributes of an object, and what they were."""

    space: Any
    before: Mapping[str, Any]
    owner: Any

    def put_back(self, chosen: Predicate) -> None:
        if len(self.space) == len(self.before) and all(map(is_, self.space.values(), self.before.values())):
            return
        now = dict(self.space)
        for name in [*self.before, *(name for name in now if name not in self.before)]:
            old, new = self.before.get(name, _MISSING), now.get(name, _MISSING)
            if old is new or not chosen(new):
                continue
            if old is _MISSING:
                del self.space[name]
            else:
                self.space[name] = old


@dataclass(frozen=True)
class _Container:
    """A container, and what was in it."""

    value: Any
    kind: _Kind
    before: Any
    owner: Any

    def put_back(self, chosen: Predicate) -> None:
        if not self.is_same(self.kind.read(self.value)) and chosen(self.value):
            self.kind.fill(self.value, self.before)

    def is_same(self, now: Any) -> bool:
        """Tell whether what is in it now is what was in it."""
        if len(now) != len(self.before):
            return False
        if isinstance(now, set):
            return all(map(is_, sorted(now, key=id), sorted(self.before, key=id)))
        same = all(map(is_, now, self.before))
        return same and (not isinstance(now, dict) or all(map(is_, now.values(), self.before.values())))


@dataclass(frozen=True)
class _Kind:
    """How the base class of a container reads and fills it."""

    base: type
    read: Callable[[Any], Any]
    fill: Callable[[Any, Any], object]


def _fill_ordered(value: OrderedDict[Any, Any], items: dict[Any, Any]) -> None:
    OrderedDict.clear(value)
    for key, item in items.items():
        OrderedDict.__setitem__(value, key, item)


def _fill_dict(value: dict[Any, Any], items: dict[Any, Any]) -> None:
    dict.clear(value)
    dict.update(value, items)


def _fill_set(value: set[Any], items: set[Any]) -> None:
    set.clear(value)
    set.update(value, items)


def _fill_deque(value: deque[Any], items: list[Any]) -> None:
    deque.clear(value)
    deque.extend(value, items)


def _fill_list(value: list[Any], items: list[Any]) -> None:
    list.__setitem__(value, slice(None), items)


def _read_ordered(value: OrderedDict[Any, Any]) -> dict[Any, Any]:
    return {key: dict.__getitem__(value, key) for key in OrderedDict.__iter__(value)}


# The most special ones first.
_KINDS = (
    _Kind(OrderedDict, _read_ordered, _fill_ordered),
    _Kind(dict, lambda value: dict(dict.items(value)), _fill_dict),
    _Kind(list, lambda value: list(list.__iter__(value)), _fill_list),
    _Kind(set, lambda value: set(set.__iter__(value)), _fill_set),
    _Kind(deque, lambda value: list(deque.__iter__(value)), _fill_deque),
)
