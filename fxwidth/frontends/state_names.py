"""The names of a model's parameters and buffers: its graph has all of them, so that a state dict fits both."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from fxwidth.frontends.extra_state import keep_extra_state
from fxwidth.runtime.tensor_slots import named_tensors, register_at
from fxwidth.runtime.trace_guards import UntraceableError


def keep_names(model: nn.Module, module: fx.GraphModule) -> None:
    """Give a graph what it lacks of a model's parameters and buffers: what it never uses, and second names.

    Constants of the graph, and tensors that the model does not save, stay out of its state dict. A graph that is one
    call of the model has the parts of the model beside it, by their own names.

    Args:
        model: the module.
        module: its graph, which shares its tensors.

    Raises:
        UntraceableError: the graph has something else under one of the names.
    """
    if any(part is model for part in module.children()):
        _add_parts(model, module)
    own = named_tensors(module)
    for path, tensor in named_tensors(model).items():
        if own.get(path) is not tensor and register_at(module, path, tensor) is not tensor:
            raise UntraceableError(f"the graph has something else in the place of the model's {path}")
    keep_extra_state(model, module)
    saved = _saved(model)
    parts = set(map(id, model.modules()))
    for path, _ in list(module.named_buffers(remove_duplicate=False)):
        parent, _, name = path.rpartition(".")
        # Parts of the model that are called as they are go on as they are, whatever the name of the call.
        if path not in saved and id(owner := module.get_submodule(parent)) not in parts:
            owner._non_persistent_buffers_set.add(name)


def _add_parts(model: nn.Module, module: fx.GraphModule) -> None:
    calls = dict(module.named_children())
    for name in calls:
        delattr(module, name)
    # In front, since a parameter that has two names goes by the first of them.
    for name, part in {**dict(model.named_children()), **calls}.items():
        module.add_module(name, part)
    module._register_state_dict_hook(_once)
    module.register_load_state_dict_pre_hook(_for_both)


def _calls_of(module: nn.Module) -> list[str]:
    graph = module.graph
    assert isinstance(graph, fx.Graph)
    return [str(node.target) for node in graph.find_nodes(op="call_module")]


def _once(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Leave out of a state dict what it has under the names of the model already."""
    for call in _calls_of(module):
        for key in [key for key in state if key.startswith(f"{prefix}{call}.")]:
            if prefix + key.removeprefix(f"{prefix}{call}.") in state:
                del state[key]


def _for_both(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give the call what the parts beside it are given: they are the same."""
    for call in _calls_of(module):
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        for key, value in own.items():
            if not key.startswith(f"{call}."):
                state.setdefault(f"{prefix}{call}.{key}", value)


def _saved(model: nn.Module) -> set[str]:
    """Return the paths of the buffers that are in a model's state dict; `state_dict` itself may do more than tell."""
    return {
        f"{path}.{name}" if path else name
        for path, part in model.named_modules(remove_duplicate=False)
        for name in part._buffers.keys() - part._non_persistent_buffers_set
    }
