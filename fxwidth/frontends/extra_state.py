"""What modules of a model put into its state dict beside tensors: the graph, which has not their code, keeps it too."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from fxwidth.runtime.module_state import walk

_KEY, _KEPT = "_extra_state", "_fxwidth_extra_state"


def keep_extra_state(model: nn.Module, module: nn.Module) -> None:
    """Have a graph's modules write and take the extra state of those of its model, where they are not the same."""
    own = dict(walk(module))
    for path, part in walk(model):
        if type(part).get_extra_state is nn.Module.get_extra_state or own.get(path) is part:
            continue
        holder = _made(module, path)
        holder.__dict__[_KEPT] = copy.deepcopy(part.get_extra_state())
        holder._register_state_dict_hook(_write)
        holder.register_load_state_dict_pre_hook(_take)


def _made(module: nn.Module, path: str) -> nn.Module:
    """Return the module at a path, where there is nothing an empty one."""
    for name in path.split(".") if path else ():
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = getattr(module, name)
    return module


def _write(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    state[prefix + _KEY] = module.__dict__[_KEPT]


def _take(
    module: nn.Module, state: dict[str, Any], prefix: str, _: Any, strict: bool, missing: list[str], *__: Any
) -> None:
    if prefix + _KEY in state:
        module.__dict__[_KEPT] = state.pop(prefix + _KEY)
    elif strict:
        missing.append(prefix + _KEY)
