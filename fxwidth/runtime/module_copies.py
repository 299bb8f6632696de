"""Shallow copies of modules that a graph shares with a model: with attributes of their own, and the same tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MethodType
from typing import Any

from torch import nn

from fxwidth.runtime.module_state import walk

Copies = Mapping[int, nn.Module]


def shallow_copies(parts: Iterable[nn.Module]) -> dict[int, nn.Module]:
    """Return a copy of each of some modules by its `id`; what they hold of each other, the copies hold of copies."""
    shared = list(parts)
    copies: dict[int, nn.Module] = {id(part): part.__class__.__new__(part.__class__) for part in shared}
    for part in shared:
        slots = {name: dict(part.__dict__[name]) for name in ("_parameters", "_buffers", "_modules")}
        copies[id(part)].__dict__ = {name: moved(value, copies) for name, value in (part.__dict__ | slots).items()}
    return copies


def put_copies(module: nn.Module, copies: Copies) -> None:
    """Put the copies of submodules in their places in a module, which no copy holds yet."""
    for _, part in walk(module):
        for name, child in part._modules.items() if id(part) not in copies else ():
            if child is not None and id(child) in copies:
                part._modules[name] = copies[id(child)]


def moved(value: Any, copies: Copies) -> Any:
    """Return what a copied module keeps for what a module keeps: containers of its own, and copied modules in them."""
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
        return MethodType(value.__func__, copies.get(id(value.__self__), value.__self__))
    # Hooks are in an OrderedDict: that stays the same, so that one handle takes a hook out of both.
    if type(value) in (list, tuple, set):
        return type(value)(moved(one, copies) for one in value)
    return {key: moved(one, copies) for key, one in value.items()} if type(value) is dict else value
