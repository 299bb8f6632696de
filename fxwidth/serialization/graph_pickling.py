"""Pickling and copying of graph modules, so that what comes back is the same graph, with the same state.

The methods are put into the class of one module, which torch.fx makes for each, and whose `forward` it puts there too;
with them one that tells of state dicts of other widths.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakSet

from torch import Tensor, fx, nn

from fxwidth.errors import FxwidthError
from fxwidth.runtime.kept_objects import Kept
from fxwidth.runtime.module_state import walk
from fxwidth.serialization.graph_data import GraphData, data_of, graph_of

# Those of which nobody has asked yet.
_NEW: WeakSet[fx.GraphModule] = WeakSet()
_GRAPH, _COMPILED = "_graph", "_compiled_call_impl"


def pickle_as_data(module: fx.GraphModule) -> None:
    """Have a graph pickled and copied node by node, and the graphs in it likewise when that is done."""
    kind: Any = _own_class(type(module))
    # The class of anything else is shared with what is no concern of ours.
    assert isinstance(module, fx.GraphModule)
    if vars(kind).get("__reduce__") is not _reduced:
        kind.__reduce__, kind.__deepcopy__, kind.load_state_dict = _reduced, _deepcopied, _load_state_dict
        kind.__copy__ = _copied


def new_copies() -> list[fx.GraphModule]:
    """Return the graphs that have come out of a copy or a pickle since the last call."""
    found = list(_NEW)
    _NEW.clear()
    return found


def _reduced(module: fx.GraphModule) -> tuple[Any, ...]:
    """Return what pickle is to write."""
    _prepare(module)
    made = _base(type(module)), type(module).__name__
    return blank, made, (_attributes(module), data_of(module.graph)), None, None, fill


def _copied(module: fx.GraphModule) -> fx.GraphModule:
    """Return a graph module of the same graph, with the same tensors."""
    copied: fx.GraphModule = super(_own_class(type(module)), module).__copy__()
    pickle_as_data(copied)
    _NEW.add(copied)
    return copied


def _deepcopied(module: fx.GraphModule, memo: dict[int, Any]) -> fx.GraphModule:
    """Return a copy; of tensors that are results of computations, without what they were computed from."""
    _prepare(module)
    copied = blank(_base(type(module)), type(module).__name__)
    memo[id(module)] = copied
    for tensor in _computed(module):
        if id(tensor) not in memo:
            memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
            memo.setdefault(id(memo), []).append(tensor)  # as deepcopy does: an identity is of what is alive
    graph = copy.deepcopy(module.graph, memo)
    copied.__dict__.update(copy.deepcopy(_attributes(module), memo))
    copied.graph = graph
    pickle_as_data(copied)
    _NEW.add(copied)
    for hook in module._deepcopy_hooks:
        hook(copied)
    return copied


def _load_state_dict(module: fx.GraphModule, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Do what `nn.Module.load_state_dict` does; a state dict of other widths is refused before anything has changed."""
    own = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    sizes = {
        name: (tuple(value.shape), tuple(own[name].shape))
        for name, value in state_dict.items()
        if isinstance(value, Tensor) and name in own and value.shape != own[name].shape
    }
    if sizes:
        told = ", ".join(f"{name} is {there} there and {here} here" for name, (there, here) in list(sizes.items())[:3])
        more = f" and {len(sizes) - 3} more" if len(sizes) > 3 else ""
        raise FxwidthError(
            f"the state dict is of other widths than the graph: {told}{more}. Load what fxwidth.save has written by "
            "fxwidth.load, which resizes a fresh model; or resize this graph first, by the plan that led to those "
            "widths: fxwidth.resize(gm, plan)."
        )
    # Classes may be put before that of the graph, as fully_shard does it.
    return super(_own_class(type(module)), module).load_state_dict(state_dict, *args, **kwargs)


def blank(base: type[fx.GraphModule], name: str) -> fx.GraphModule:
    """Return a graph module with nothing in it, as pickle needs one before it can read what is in it."""
    module = base.__new__(base)
    type(module).__name__ = name
    return module


def fill(module: fx.GraphModule, state: tuple[dict[str, Any], GraphData]) -> None:
    """Give a graph module its attributes and its graph."""
    attributes, data = state
    module.__setstate__(attributes)
    module.graph = graph_of(data, attributes.get("_tracer_cls"))
    pickle_as_data(module)
    _NEW.add(module)


def unpicklable(module: fx.GraphModule) -> str | None:
    """Return the first part of a graph module that pickle cannot write, in words, or None."""
    for path, part in walk(module):
        place = f" of {path!r}" if path else ""
        if isinstance(part, fx.GraphModule):
            for node in data_of(part.graph).nodes:
                if not _can_pickle((node.target, node.args, node.kwargs)):
                    return f"what the node {node.name!r}{place} calls, {node.target},"
        if not _can_pickle(type(part)) and not isinstance(part, fx.GraphModule):
            return f"the class {type(part).__qualname__}{place}"
        for name, value in vars(part).items():
            if name not in (_GRAPH, "_modules") and not _can_pickle(value):
                return f"the attribute {name!r}{place}"
    return None


class _Tasting(pickle.Pickler):
    """Writes nothing of tensors, which can be large and can always be written, nor of modules, which are looked at."""

    def persistent_id(self, obj: Any) -> str | None:
        """Return what is written in the place of an object."""
        return "" if isinstance(obj, (Tensor, nn.Module)) else None


def _can_pickle(value: Any) -> bool:
    try:
        _Tasting(io.BytesIO()).dump(value)
    except Exception:
        return False
    return True


def _prepare(module: fx.GraphModule) -> None:
    for _, part in walk(module):
        if isinstance(part, fx.GraphModule):
            pickle_as_data(part)


def _own_class(kind: type) -> Any:
    """Return the class that torch.fx has made for a graph module alone."""
    return next((base for base in kind.__mro__ if base.__qualname__.rpartition(".")[2] == "GraphModuleImpl"), kind)


def _base(kind: type) -> Any:
    """Return the class of a graph module without the one that torch.fx has made for it alone."""
    own = _own_class(kind).__mro__
    return next(base for base in own if base.__qualname__.rpartition(".")[2] != "GraphModuleImpl")


def _attributes(module: fx.GraphModule) -> dict[str, Any]:
    return {name: value for name, value in module.__dict__.items() if name not in (_GRAPH, _COMPILED)}


def _computed(module: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors of a module, in its attributes and in what its hooks belong to, that are no leaves."""
    parts = {id(part): part for _, part in walk(module)}
    for part in list(parts.values()):
        for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values()):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, nn.Module):
                parts |= {id(inner): inner for _, inner in walk(owner)}
    kept = Kept()
    for part in parts.values():
        kept.add_attributes(part)
    return (tensor for tensor in kept.tensors if not tensor.is_leaf)
