"""Models that are built from a configuration: built anew from a changed copy of it, without memory for parameters.

Which entries matter is told by the shapes of the parameters that come out, and by what differs in the modules.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from fxwidth.modules.changed_objects import set_in_copy
from fxwidth.modules.code_sizes import held_numbers
from fxwidth.modules.model_edits import Change, ModelEdits
from fxwidth.runtime.module_state import walk
from fxwidth.runtime.random_states import same_randomness
from fxwidth.runtime.tensor_slots import named_tensors

Shapes = dict[str, tuple[int, ...]]
# How deep configurations are in configurations.
_DEEPEST = 3


@dataclass(frozen=True)
class Entry:
    """An integer of a configuration: the attributes that lead to it, and its place where it is in a list."""

    path: tuple[str, ...]
    place: int | None = None

    def __str__(self) -> str:
        return ".".join(self.path) + ("" if self.place is None else f"[{self.place}]")


Changes = Mapping[Entry, int]


@dataclass
class Rebuilding:
    """Builds a model's class anew.

    Attributes:
        model: the model.
        config: its configuration.
        base: the model built from a copy of the configuration as it is.
    """

    model: nn.Module
    config: Any
    base: nn.Module
    _built: dict[tuple[tuple[Entry, int], ...], nn.Module | None] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> Rebuilding | None:
        """Return what builds a model anew, or None where its class does not take its configuration alone."""
        config = getattr(model, "config", None)
        if config is None or not hasattr(config, "__dict__") or isinstance(config, (nn.Module, type)):
            return None
        base = None
        with suppress(Exception):
            base = _made(type(model), copy.deepcopy(config))
        if base is None or [n for n, _ in base.named_parameters()] != [n for n, _ in model.named_parameters()]:
            return None
        return cls(model, config, base)

    def entries(self) -> dict[Entry, int]:
        """Return the integers of the configuration."""
        return dict(_entries(self.config, (), 0))

    def build(self, changes: Changes) -> nn.Module | None:
        """Return the model with some entries changed, without values; None where it cannot be built so."""
        own = self.entries()
        key = tuple(sorted(((e, v) for e, v in changes.items() if own[e] != v), key=lambda pair: str(pair[0])))
        if not key:
            return self.base
        if key not in self._built:
            config = copy.deepcopy(self.config)
            try:
                for owner, name, value in attributes_of_entries(config, dict(key)):
                    set_in_copy(owner, name, value)
            except Exception:
                self._built[key] = None
            else:
                self._built[key] = _made(type(self.model), config)
        return self._built[key]


def shapes_of(model: nn.Module) -> Shapes:
    """Return the shapes of a model's parameters by name."""
    return {name: tuple(one.shape) for name, one in model.named_parameters(remove_duplicate=False)}


def attributes_of_entries(config: Any, changes: Changes) -> Iterator[Change]:
    """Yield the attributes in which a configuration has some entries, with what they become."""
    found: dict[tuple[int, str], Change] = {}
    for entry, value in changes.items():
        owner = config
        for name in entry.path[:-1]:
            owner = getattr(owner, name)
        key = id(owner), entry.path[-1]
        if entry.place is not None:
            # Other places of the same list may have changed.
            known = found[key][2] if key in found else getattr(owner, entry.path[-1])
            value = type(known)([*known[: entry.place], value, *known[entry.place + 1 :]])
        found[key] = owner, entry.path[-1], value
    yield from found.values()


def take_differences(model: nn.Module, base: nn.Module, other: nn.Module, edits: ModelEdits) -> None:
    """Set what differs in the attributes of two models of a class, and of their configurations, in a third."""
    befores, afters = dict(walk(base)), dict(walk(other))
    for path, part in walk(model):
        if path in befores and path in afters:
            known = {(_key(befores[path], owner), name): value for owner, name, value in _held(befores[path])}
            after = {(_key(afters[path], owner), name): value for owner, name, value in _held(afters[path])}
            edits.apply_together(_changes(part, known, after))


def _changes(
    part: nn.Module, known: Mapping[tuple[str, str], Any], after: Mapping[tuple[str, str], Any]
) -> Iterator[Change]:
    for owner, name, value in list(_held(part)):
        key = (_key(part, owner), name)
        if key in known and key in after and known[key] != after[key] and value == known[key]:
            yield owner, name, after[key]


def _held(part: nn.Module) -> Iterator[tuple[Any, str, Any]]:
    yield from held_numbers(part)
    config = vars(part).get("config")
    if config is not None and hasattr(config, "__dict__"):
        for owner in _inner(config, 0):
            for name, value in list(vars(owner).items()):
                if not name.startswith("_") and isinstance(value, (int, float, list, tuple)):
                    yield owner, name, value


def _inner(config: Any, depth: int) -> Iterator[Any]:
    """Yield the configurations in a configuration."""
    for value in list(vars(config).values()):
        if _is_config(value) and depth < _DEEPEST:
            yield value
            yield from _inner(value, depth + 1)


def plain_objects(model: nn.Module) -> list[Any]:
    """Return the objects, such as configurations, in which modules keep numbers beside their own attributes."""
    owners = (owner for _, part in walk(model) for owner, *_ in _held(part) if owner is not part)
    return list({id(owner): owner for owner in owners}.values())


def _key(part: nn.Module, owner: Any) -> str:
    """Return where in a module an object is."""
    if owner is part:
        return ""
    waiting = [(name, value, 0) for name, value in vars(part).items()]
    while waiting:
        name, value, depth = waiting.pop(0)
        if value is owner:
            return name
        if depth < _DEEPEST and hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)):
            waiting += [(f"{name}.{inner}", one, depth + 1) for inner, one in vars(value).items() if _is_config(one)]
    return "?"


def _entries(config: Any, path: tuple[str, ...], depth: int) -> Iterator[tuple[Entry, int]]:
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if type(value) is int:
            yield Entry((*path, name)), value
        elif isinstance(value, (list, tuple)) and value and all(type(one) is int for one in value):
            yield from ((Entry((*path, name), place), one) for place, one in enumerate(value))
        elif _is_config(value) and depth < _DEEPEST:
            yield from _entries(value, (*path, name), depth + 1)


def _is_config(value: Any) -> bool:
    return hasattr(value, "__dict__") and "config" in type(value).__name__.lower() and not isinstance(value, type)


def _made(kind: type[nn.Module], config: Any) -> nn.Module | None:
    """Return a model as one is built that has been saved and is loaded: parameters on the meta device, buffers real."""
    with suppress(Exception), warnings.catch_warnings(), same_randomness(), _without_parameters():
        warnings.simplefilter("ignore")
        made: nn.Module = kind(_as_loaded(config))
        return made
    return None


@contextmanager
def _without_parameters() -> Iterator[None]:
    """Put every parameter that is made for a module on the meta device, before it is filled."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if isinstance(parameter, nn.Parameter) and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    disabled = logging.root.manager.disable
    with patch.object(nn.Module, "register_parameter", on_meta):
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)


def _as_loaded(config: Any) -> Any:
    """Return a configuration as it comes back from a file, where its class can tell."""
    if not (hasattr(config, "to_dict") and hasattr(type(config), "from_dict")):
        return config
    loaded = type(config).from_dict(config.to_dict())
    with suppress(Exception):
        loaded._attn_implementation = config._attn_implementation
    return loaded


def unsaved_tensors(model: nn.Module) -> set[str]:
    """Return the names of buffers that no state dict holds: a class makes them anew."""
    saved = model.state_dict(keep_vars=True)
    return {name for name in named_tensors(model) if name not in saved}


def made_otherwise(model: nn.Module, other: nn.Module) -> str | None:
    """Return the name of a buffer that no state dict holds and of which two models have made other numbers, or None."""
    known = named_tensors(model)
    for name in unsaved_tensors(other):
        own, one = known.get(name), named_tensors(other)[name]
        if own is None or own.is_meta or one.is_meta:
            continue
        if own.shape != one.shape or not torch.equal(own.to(one), one):
            return name
    return None
