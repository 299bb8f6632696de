"""Whether something that was only to be looked at was left alone: all that hangs on an object, before and after.

Needs neither pytest nor the package, so that benchmarks can use it too.
"""

from __future__ import annotations

import hashlib
import random
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, range, slice)
# What is compared by its identity alone: its inside is code, or belongs to others.
_OPAQUE = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, weakref.ref)
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_GLOBAL_HOOKS = [name for name in vars(nn.modules.module) if name.startswith("_global_") and name.endswith("_hooks")]


@dataclass(frozen=True)
class Snapshot:
    """What was found at every path from an object, and the objects found, which stay alive: they have identities."""

    found: dict[str, Any]
    alive: list[Any]


def snapshot(*roots: Any) -> Snapshot:
    """Return all that hangs on some objects: tensors, attributes, containers, hooks, modes; and the global state.

    A tensor is known by its identity, bits, version, layout, gradient and attributes; a container by its identity and
    items, in order; any other object by its identity, class and attributes. Of the classes of modules, their data
    attributes count too. The global state is that of random number generators, hooks of all modules and gradient mode.
    """
    walker = _Walker()
    for i, root in enumerate(roots):
        walker.visit(root, type(root).__name__ if len(roots) == 1 else f"{i}:{type(root).__name__}")
    walker.found["random state"] = _random_states()
    for name in _GLOBAL_HOOKS:
        walker.visit(dict(getattr(nn.modules.module, name)), f"torch.nn.modules.module.{name}", is_copy=True)
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
    walker.found["gradient mode"] = modes
    return Snapshot(walker.found, walker.alive)


def differences(before: Snapshot, after: Snapshot) -> list[str]:
    """Return one line for each path at which two snapshots differ."""
    lines = [f"{path}: gone" for path in before.found.keys() - after.found.keys()]
    lines += [f"{path}: new" for path in after.found.keys() - before.found.keys()]
    for path in before.found.keys() & after.found.keys():
        old, new = before.found[path], after.found[path]
        if old != new:
            lines.append(f"{path}: {_told(old, new)}")
    return sorted(lines)


@contextmanager
def untouched(*roots: Any) -> Iterator[None]:
    """Check that what runs inside leaves objects, and the global state, as they were.

    Raises:
        AssertionError: it does not; the first twenty differences are told.
    """
    before = snapshot(*roots)
    yield
    lines = differences(before, snapshot(*roots))
    if lines:
        raise AssertionError("\n".join(["what was only to be looked at has changed:", *lines[:20]]))


def _told(old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        return ", ".join(f"{key} was {old.get(key)}, is {new.get(key)}" for key in old if old.get(key) != new.get(key))
    return f"was {old}, is {new}"


class _Walker:
    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self.alive: list[Any] = []
        self._seen: dict[int, str] = {}

    def visit(self, value: Any, path: str, is_copy: bool = False) -> None:
        """Note a value, and all that hangs on it, by the way that leads there."""
        if isinstance(value, _PLAIN):
            self.found[path] = f"{type(value).__name__} {value!r}"
            return
        self.alive.append(value)
        if id(value) in self._seen:
            self.found[path] = f"the same as {self._seen[id(value)]}", id(value)
            return
        self._seen[id(value)] = path
        entry: dict[str, Any] = {"class": type(value).__qualname__, "identity": 0 if is_copy else id(value)}
        self.found[path] = entry
        if isinstance(value, Tensor):
            entry.update(_tensor(value))
            self.visit(value.grad if value.is_leaf else None, f"{path}.grad")
        elif isinstance(value, np.ndarray):
            entry.update(bits=_digest(np.ascontiguousarray(value)), shape=value.shape, dtype=str(value.dtype))
        elif isinstance(value, torch.Generator):
            entry.update(bits=_digest(value.get_state().numpy()))
        elif isinstance(value, fx.Graph):
            entry.update(text=str(value))
            return
        elif isinstance(value, _CONTAINERS):
            self._items(value, path, entry)
        if not isinstance(value, _OPAQUE):
            self._attributes(value, path)

    def _items(self, value: Any, path: str, entry: dict[str, Any]) -> None:
        # By the methods of the base classes: those of a subclass may forbid it, or do otherwise.
        if isinstance(value, dict):
            keys = list(OrderedDict.__iter__(value) if isinstance(value, OrderedDict) else dict.__iter__(value))
            entry["keys"] = list(map(_key, keys))
            items = [(_key(key), dict.__getitem__(value, key)) for key in keys]
        elif isinstance(value, (set, frozenset)):
            entry["elements"] = sorted(str(_key(item)) for item in value)
            items = []
        else:
            base = next(kind for kind in (list, tuple, deque) if isinstance(value, kind))
            items = [(str(i), item) for i, item in enumerate(base.__iter__(value))]
            entry["length"] = len(items)
        for key, item in items:
            self.visit(item, f"{path}[{key}]")

    def _attributes(self, value: Any, path: str) -> None:
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict):
            for name, item in list(own.items()):
                if not isinstance(value, Tensor) or name != "grad":
                    self.visit(item, f"{path}.{name}")
        for kind in type(value).__mro__:
            slots = kind.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                    self.visit(getattr(value, name), f"{path}.{name}")
            if isinstance(value, nn.Module) and not kind.__module__.startswith(("torch.", "builtins")):
                self._class_attributes(kind)

    def _class_attributes(self, kind: type) -> None:
        for name, item in list(vars(kind).items()):
            if name.startswith("__") or isinstance(item, _OPAQUE) or hasattr(item, "__get__"):
                continue
            self.visit(item, f"class {kind.__qualname__}.{name}")


def _key(key: Any) -> str:
    return repr(key) if isinstance(key, (*_PLAIN, tuple)) else f"{type(key).__name__} at {id(key)}"


def _tensor(value: Tensor) -> dict[str, Any]:
    plain = value.detach()
    entry: dict[str, Any] = {
        "shape": tuple(value.shape),
        "dtype": value.dtype,
        "device": value.device,
        "layout": value.layout,
        "requires_grad": value.requires_grad,
        "hooks": [id(hook) for hook in (getattr(value, "_backward_hooks", None) or {}).values()],
        "version": None if value.is_inference() else value._version,
    }
    if value.layout == torch.strided and value.device.type != "meta" and type(plain) in (Tensor, nn.Parameter):
        entry["stride"] = value.stride()
        entry["bits"] = _digest(plain.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return entry


def _digest(data: Any) -> str:
    return hashlib.blake2b(memoryview(data).cast("B"), digest_size=12).hexdigest()


def _random_states() -> dict[str, str]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - it is the global state that is looked at
    states = {
        "torch": _digest(torch.get_rng_state().numpy()),
        "numpy": f"{kind} {_digest(keys)} {rest}",
        "python": str(hash(random.getstate())),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for i, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"cuda:{i}"] = _digest(state.numpy())
    return states
