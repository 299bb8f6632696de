"""Attributes of objects and classes, globals and shared variables as mappings, without asking an object's own code."""

from __future__ import annotations

import types
from collections.abc import Iterator, MutableMapping
from typing import Any

_MISSING = object()


def attributes_of(value: Any) -> dict[str, Any] | None:
    """Return the attributes of an object, without asking its own code."""
    read: Any = type(value).__getattribute__
    try:
        own = (object.__getattribute__ if type(read) is types.FunctionType else read)(value, "__dict__")
    except AttributeError:
        return None
    return own if isinstance(own, dict) else None


class SlotSpace(MutableMapping[str, Any]):
    """The attributes of an object that are in slots."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._slots = slots_of(type(owner))

    def __getitem__(self, name: str) -> Any:
        try:
            return self._slots[name].__get__(self._owner)
        except AttributeError as error:
            raise KeyError(name) from error

    def __setitem__(self, name: str, value: Any) -> None:
        self._slots[name].__set__(self._owner, value)

    def __delitem__(self, name: str) -> None:
        self._slots[name].__delete__(self._owner)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._slots if self.get(name, _MISSING) is not _MISSING)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def slots_of(kind: type) -> dict[str, Any]:
    """Return the slots of a class written in Python."""
    bases = [base for base in kind.__mro__ if "__slots__" in vars(base)]
    return {n: s for base in bases for n, s in vars(base).items() if isinstance(s, types.MemberDescriptorType)}


class ClassSpace(MutableMapping[str, Any]):
    """The attributes of a class, but those by which Python itself works."""

    def __init__(self, kind: type) -> None:
        self._kind = kind

    def __getitem__(self, name: str) -> Any:
        return vars(self._kind)[name]

    def __setitem__(self, name: str, value: Any) -> None:
        type.__setattr__(self._kind, name, value)

    def __delitem__(self, name: str) -> None:
        type.__delattr__(self._kind, name)

    def __iter__(self) -> Iterator[str]:
        return (name for name in list(vars(self._kind)) if not (name.startswith("__") or name == "_abc_impl"))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class NamedSpace(MutableMapping[str, Any]):
    """Some of the names in a namespace."""

    def __init__(self, space: dict[str, Any], names: set[str]) -> None:
        self._space, self._names = space, names

    def __getitem__(self, name: str) -> Any:
        return self._space[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._space[name] = value

    def __delitem__(self, name: str) -> None:
        del self._space[name]

    def __iter__(self) -> Iterator[str]:
        return iter([name for name in self._names if name in self._space])

    def __len__(self) -> int:
        return sum(name in self._space for name in self._names)


class CellSpace(MutableMapping[str, Any]):
    """A variable that functions share."""

    def __init__(self, cell: types.CellType) -> None:
        self._cell = cell

    def __getitem__(self, name: str) -> Any:
        return self._cell.cell_contents

    def __setitem__(self, name: str, value: Any) -> None:
        self._cell.cell_contents = value

    def __delitem__(self, name: str) -> None:
        del self._cell.cell_contents

    def __iter__(self) -> Iterator[str]:
        return iter(["cell_contents"] if len(self) else [])

    def __len__(self) -> int:
        try:
            self._cell.cell_contents  # noqa: B018 - it raises where there is nothing
        except ValueError:
            return 0
        return 1
