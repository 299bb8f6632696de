"""What a graph is at present, by which its compiled code is found again."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxwidth.errors import FxwidthError

_TABLES = ("_modules", "_parameters", "_buffers")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class PresentNetwork:
    """What tells the network that a graph is at present from others: its code, its modules, the shapes of its tensors.

    What compiled code goes by besides, such as the eps of a norm, is guarded by `torch.compile` itself. Hooks of
    modules are not, so that they are among what tells networks apart.

    Args:
        module: the graph.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self._module = module
        self._tables: list[dict[str, Any]] = []
        self._glance: Any = None
        self._number = 0
        self._known: dict[Hashable, int] = {}

    @property
    def known(self) -> int:
        """How many networks there have been."""
        return len(self._known)

    def number(self) -> int:
        """Return the number of the network; it is looked up where a module, a tensor, a hook or the code is another.

        Raises:
            FxwidthError: a hook of the graph itself, or a forward put over its own, would not run.
        """
        code = _forward(self._module).__code__
        if self._glance is None or self._glance != (code, self._identities()):
            _refuse_own_hooks(self._module)
            parts = list(self._module.modules())
            self._tables = [getattr(part, table) for part in parts for table in (*_TABLES, *_HOOKS)]
            self._glance = code, self._identities()
            key = self._module.code, _names_in(self._module), *map(_part, parts)
            self._number = self._known.setdefault(key, len(self._known))
        return self._number

    def _identities(self) -> list[int]:
        # Most tables are empty, and each call pays for this.
        return [id(value) for table in self._tables if table for value in table.values()]


@dataclass(frozen=True, eq=False)
class _Held:
    """Something that is told from others by its identity, and is kept so that no other gets that."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def modes_of(module: fx.GraphModule) -> Hashable:
    """Return the modes in which a graph runs at present: code of one is of no use in the other."""
    return module.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def fresh_function(module: fx.GraphModule) -> MethodType:
    """Return the forward of a graph as a function with a code object of its own.

    `torch.compile` keeps what it has compiled with the code object, and gives up after a few versions of one.
    """
    forward = _forward(module)
    # A copy, so that code for another network has its own versions.
    code: CodeType = forward.__code__.replace()
    own = FunctionType(code, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__ = forward.__kwdefaults__
    return MethodType(own, module)


def _forward(module: fx.GraphModule) -> FunctionType:
    forward: Any = module.forward
    if not isinstance(forward, MethodType) or forward.__self__ is not module:
        raise FxwidthError(
            "the graph has a forward put over its own, which compiled code of the graph would not run; delete that, or "
            "compile it by torch.compile."
        )
    function: Any = forward.__func__
    assert isinstance(function, FunctionType)
    return function


def _names_in(module: fx.GraphModule) -> Hashable:
    """Return what the names in a graph's code stand for."""
    forward = _forward(module)
    used, known = forward.__code__.co_names, forward.__globals__
    return tuple(_Held(known[name]) for name in used if name in known and callable(known[name]))


def _part(part: nn.Module) -> Hashable:
    hooks = tuple((table, *map(_Held, getattr(part, table).values())) for table in _HOOKS if getattr(part, table))
    tensors = (*part._parameters.values(), *part._buffers.values())
    kind: Any = type(part)
    return kind, hooks, *(None if tensor is None else _kind(tensor) for tensor in tensors)


def _kind(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad


def _refuse_own_hooks(module: fx.GraphModule) -> None:
    for table in _HOOKS:
        for hook in getattr(module, table).values():
            name = getattr(hook, "__qualname__", type(hook).__name__)
            raise FxwidthError(
                f"the graph has a hook of its own ({name}, in {table.strip('_')}), which its compiled code would not "
                "run; take it off, or register it on a module inside of the graph, whose hooks are compiled with it."
            )
