"""Where two structures of values differ, as text."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

from torch.utils import _pytree as pytree

from fxwidth.runtime.pytrees import Again, Constant, Container, Instance, Leaf, Structure, has_attributes


def difference(structure: Structure, other: Structure, place: str = "") -> str | None:
    """Return None when two values have the same structure and constants, or the first difference in words."""
    if isinstance(structure, Constant) and isinstance(other, Constant):
        return None if _same(structure.value, other.value) else f"{place} is {other.value!r}, not {structure.value!r}"
    if isinstance(structure, Leaf) and isinstance(other, Leaf):
        return None
    if isinstance(structure, Again) and isinstance(other, Again):
        return None
    if isinstance(structure, Container) and isinstance(other, Container):
        if structure.spec != other.spec and not _same_named_tuples(structure.spec, other.spec):
            return f"{place} has other keys or another length"
        pairs = zip(_keys(structure), structure.parts, other.parts, strict=True)
        found = (difference(one, two, f"{place}{key}") for key, one, two in pairs)
        return next((text for text in found if text is not None), None)
    if isinstance(structure, Instance) and isinstance(other, Instance) and _same_class(structure.kind, other.kind):
        return _difference_of_instances(structure, other, place)
    return f"{place} is {_noun(other)}, not {_noun(structure)}"


def _same_named_tuples(spec: pytree.TreeSpec, other: pytree.TreeSpec) -> bool:
    if spec.type is not namedtuple or other.type is not namedtuple:
        return False
    return _same_class(spec.context, other.context) and bool(spec.context._fields == other.context._fields)


def _same_class(one: type, other: type) -> bool:
    """Tell whether two classes are one, or made by the same code, as by a function that is called twice."""
    return one is other or (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


def _difference_of_instances(structure: Instance, other: Instance, place: str) -> str | None:
    if structure.attributes.keys() != other.attributes.keys() or (structure.items is None) != (other.items is None):
        return f"{place} has other attributes"
    for name, own in structure.attributes.items():
        text = difference(own, other.attributes[name], f"{place}.{name}")
        if text is not None:
            return text
    if structure.items is None or other.items is None:
        return None
    return difference(structure.items, other.items, place)


def _noun(structure: Structure) -> str:
    if isinstance(structure, Leaf):
        return "a tensor"
    if isinstance(structure, Constant):
        return repr(structure.value)
    kind = structure.spec.type if isinstance(structure, Container) else getattr(structure, "kind", object)
    if isinstance(structure, Container) and kind is namedtuple:
        kind = structure.spec.context
    return f"a {getattr(kind, '__name__', kind)}"


def _keys(container: Container) -> list[str]:
    names = container.spec.context if container.spec.type is dict else range(len(container.parts))
    return [f"[{name!r}]" for name in names]


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    try:
        return bool(one == other) or (has_attributes(one) and vars(one) == vars(other))
    except Exception:
        return False
