"""The models of graphs that were copied or unpickled together with them.

No copy tells of that: a graph must not drag its model along, and either may be copied first. But what was copied
together shares tensors, so the model is looked for among all modules, once for each graph that shares anything.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn

from fxwidth.recording.graph_meta import CALL
from fxwidth.runtime.module_state import walk
from fxwidth.runtime.tensor_slots import named_tensors
from fxwidth.serialization.graph_pickling import new_copies


def models_of_copies() -> Iterator[tuple[fx.GraphModule, nn.Module]]:
    """Yield graphs that were copied since the last call, each with the model that was copied with it."""
    graphs = [graph for graph in new_copies() if CALL in graph.meta and _is_shared(graph)]
    modules = _modules() if graphs else []
    for graph in graphs:
        model = _model_of(graph, modules)
        if model is not None:
            yield graph, model


def _is_shared(graph: fx.GraphModule) -> bool:
    """Tell whether others than a graph hold its tensors or submodules, or may do so: most copies are made alone."""
    held: list[dict[str, Any]] = [
        slots for _, part in walk(graph) for slots in (part._parameters, part._buffers, part._modules)
    ]
    own = Counter(id(value) for slots in held for value in slots.values())
    alone = {"": object()}
    # How often each is held, compared as it is counted for what only one dict holds.
    beside = sys.getrefcount(alone[""]) - 1
    return any(
        slots[name] is not None and sys.getrefcount(slots[name]) - beside > own[id(slots[name])]
        for slots in held
        for name in slots
    )


def _modules() -> list[nn.Module]:
    # By its type alone: an object may answer any other question by code of its own.
    return [
        one
        for one in gc.get_objects()
        if issubclass(type(one), nn.Module) and not issubclass(type(one), fx.GraphModule) and "_modules" in vars(one)
    ]


def _model_of(graph: fx.GraphModule, modules: list[nn.Module]) -> nn.Module | None:
    """Return the module that has most of a graph's tensors by the names that they have there."""
    tensors = named_tensors(graph)
    owned = {id(part) for _, part in walk(graph)}
    first = {name.partition(".")[0] for name in tensors}
    best: tuple[int, nn.Module | None] = 0, None
    for module in modules:
        # Most of all modules are others, of which that is seen at once.
        if id(module) not in owned and not first.isdisjoint((*module._modules, *module._parameters)):
            count = sum(_at(module, name) is tensor for name, tensor in tensors.items())
            best = max(best, (count, module), key=lambda one: one[0])
    return best[1]


def _at(module: nn.Module, name: str) -> Tensor | None:
    """Return the parameter or buffer of a name, or None."""
    *path, attribute = name.split(".")
    part: nn.Module | None = module
    for step in path:
        part = part._modules.get(step) if part is not None else None
    return None if part is None else part._parameters.get(attribute, part._buffers.get(attribute))
