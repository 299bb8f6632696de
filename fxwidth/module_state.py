"""What modules keep in plain attributes: tensors among them must outlive a run under fake tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from fxwidth.whole_ops import is_plain_layer

_MISSING = object()
# Substitution takes care of these.
_MANAGED = frozenset({"_parameters", "_modules"})


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


def undisturbed(module: nn.Module) -> AbstractContextManager[None]:
    """Give modules back what their code has overwritten with fake tensors: caches, and weights computed by hooks."""
    return _restoring(module, (True,))


def unchanged(module: nn.Module) -> AbstractContextManager[None]:
    """Give modules back what their code has overwritten with anything but fake tensors: counters, sizes of caches."""
    return _restoring(module, (False,))


def restored(module: nn.Module) -> AbstractContextManager[None]:
    """Give modules back all that their code has overwritten, be it with fake tensors or with anything else."""
    return _restoring(module, (True, False))


@contextmanager
def _restoring(module: nn.Module, of_fakes: tuple[bool, ...]) -> Iterator[None]:
    before = _state(module)
    try:
        yield
    finally:
        for part, attributes, contents in before:
            for name, value in list(part.__dict__.items()):
                if name not in _MANAGED and (len(of_fakes) == 2 or holds(value, FakeTensor) in of_fakes):
                    _put_back(part, name, attributes.get(name, _MISSING), contents)


def _state(module: nn.Module) -> list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]:
    """Return modules whose code may write to them, each with its attributes and copies of its containers."""
    parts = (part for _, part in walk(module) if not is_plain_layer(part))
    return [(part, part.__dict__.copy(), _contents(part)) for part in parts]


def _contents(part: nn.Module) -> dict[str, Any]:
    """Return copies of the containers that a module's code may write to."""
    return {
        name: value.copy()
        for name, value in part.__dict__.items()
        if isinstance(value, (dict, list)) and name not in _MANAGED
    }


def _put_back(part: nn.Module, name: str, old: Any, contents: dict[str, Any]) -> None:
    if old is _MISSING:
        del part.__dict__[name]
    elif part.__dict__[name] is not old:
        part.__dict__[name] = old
    if name not in contents or not (old or contents[name]):
        return
    if isinstance(old, list):
        old[:] = contents[name]
    else:
        old.clear()
        old.update(contents[name])


def stores(module: nn.Module, kind: type) -> Iterator[tuple[str, nn.Module]]:
    """Yield the path of each attribute or buffer that holds a value of a kind, and the submodule that keeps it."""
    for path, part in module.named_modules():
        for name, value in (*part._buffers.items(), *part.__dict__.items()):
            if name not in _MANAGED and name != "_buffers" and holds(value, kind):
                yield (f"{path}.{name}" if path else name), part


def holds(value: Any, kind: type) -> bool:
    """Tell whether a value is of a kind, or a list, tuple or dict with such a value in it."""
    if isinstance(value, (dict, list, tuple)):
        return any(holds(part, kind) for part in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, kind)
