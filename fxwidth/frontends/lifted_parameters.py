"""Graphs whose parameters are inputs, as dynamo, aot_autograd and make_fx write them: the parameters put back in.

A placeholder that is fed an `nn.Parameter` is one. One that is fed an `nn.Buffer`, or that dynamo has named after an
entry of a module's buffers, is a buffer. All others stay inputs: the sizes of inputs are not the graph's to change.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from fxwidth.errors import FxwidthError
from fxwidth.frontends.call_signature import Call
from fxwidth.frontends.placeholder_calls import bound_to_placeholders, call_with
from fxwidth.runtime.tensor_slots import register_at

# What dynamo makes of L['self']._modules['conv1']._parameters['weight'], a path in terms of Python.
_OF_DYNAMO = re.compile(r"^l_.+?_(parameters|buffers)_(\w+?)_?$", re.IGNORECASE)
_PART = re.compile(r"_(?:modules|parameters|buffers)_")
# An own name may be that of something else in every graph.
_TAKEN = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph()))) - frozenset(dir(nn.Module()))


@dataclass(frozen=True)
class Bound:
    """A graph that holds the parameters which another graph takes as inputs.

    Attributes:
        module: the graph; its parameters and buffers are copies of those that were fed.
        call: what is left of the call.
        paths: the path of each parameter and buffer by the position of its placeholder in the other graph.
        inputs: the positions of the placeholders that are left, in order.
    """

    module: fx.GraphModule
    call: Call
    paths: Mapping[int, str]
    inputs: tuple[int, ...]


def with_parameters(module: fx.GraphModule, call: Call | None) -> Bound | None:
    """Return a copy of a graph that holds the parameters it is fed, or None where it is fed none.

    Args:
        module: a graph; it stays as it is.
        call: an example call, with the parameters themselves.

    Raises:
        FxwidthError: the graph does not take this call, or the parameters are fake tensors, which have no values.
    """
    if call is None or not any(isinstance(leaf, nn.Parameter) for leaf in pytree.tree_leaves(call.value)):
        return None
    placeholders, values = module.graph.find_nodes(op="placeholder"), bound_to_placeholders(module, call)
    paths = _paths(module, placeholders, values)
    for position, path in paths.items():
        if isinstance(values[position], FakeTensor):
            raise FxwidthError(
                f"input {placeholders[position].name!r} of the graph is fed a fake tensor for the parameter {path!r}, "
                "which has no values to go by; pass the parameters of the model themselves."
            )
    bound = _copy_without_placeholders(module, values, paths)
    left = tuple(position for position in range(len(values)) if position not in paths)
    return Bound(bound, call_with(bound, [values[position] for position in left]), paths, left)


def _paths(module: fx.GraphModule, placeholders: Sequence[fx.Node], values: Sequence[Any]) -> dict[int, str]:
    """Return the paths at which parameters and buffers are put, by the positions of their placeholders."""
    found: dict[int, str] = {}
    for position, (node, value) in enumerate(zip(placeholders, values, strict=True)):
        kind = _kind(node, value)
        if kind is not None:
            found[position] = _free_path(_path(str(node.target)), [*found.values()], module)
    return found


def _kind(node: fx.Node, value: Any) -> str | None:
    """Return what a placeholder is, "parameters" or "buffers"; None for an input."""
    if isinstance(value, nn.Parameter):
        return "parameters"
    if isinstance(value, nn.Buffer):
        return "buffers"
    named = _OF_DYNAMO.match(str(node.target))
    return "buffers" if named is not None and named[1] == "buffers" and isinstance(value, Tensor) else None


def _path(target: str) -> str:
    """Return the path of a parameter by the name of its placeholder.

    Example:
        >>> _path("L__self___modules_layer1_modules_0_parameters_weight_"), _path("primals_1"), _path("p_fc_weight")
        ('layer1.0.weight', 'p_primals_1', 'p_fc_weight')
    """
    if _OF_DYNAMO.match(target) is None:
        return target if target.startswith(("p_", "b_")) else f"p_{target}"
    _, *parts = _PART.split(target.removesuffix("_"))
    # Between two parts dynamo writes an underscore too.
    return ".".join([*(part.removesuffix("_") for part in parts[:-1]), parts[-1]])


def _free_path(path: str, paths: Sequence[str], module: nn.Module) -> str:
    """Return a path at which nothing stands yet, in which no part is the name of something else."""
    first, *_ = path.split(".")
    if first in _TAKEN or hasattr(module, first):
        path = f"p_{path}"
    known = {*paths, *(".".join(one.split(".")[:k]) for one in paths for k in range(1, one.count(".") + 1))}
    inner = {".".join(path.split(".")[:k]) for k in range(1, path.count(".") + 1)}
    number, free = 0, path
    while free in known or inner & set(paths):
        number += 1
        free, inner = f"{path.replace('.', '_')}_{number}", set()
    return free


def _copy_without_placeholders(
    module: fx.GraphModule, values: Sequence[Any], paths: Mapping[int, str]
) -> fx.GraphModule:
    """Return a copy of a graph in which some placeholders are parameters and buffers of its own."""
    # Weights that the graph holds itself are copied with it.
    copied = fx.GraphModule(copy.deepcopy(module), copy.deepcopy(module.graph), type(module).__name__)
    copied.meta = {key: value for key, value in module.meta.items() if not str(key).startswith("fxwidth_")}
    own: dict[int, Tensor] = {}
    placeholders = copied.graph.find_nodes(op="placeholder")
    for position, path in paths.items():
        value, node = values[position], placeholders[position]
        # One that is fed twice stays one.
        tensor = own.setdefault(id(value), _copy(value))
        register_at(copied, path, tensor)
        if node.users:
            with copied.graph.inserting_before(node):
                read = copied.graph.get_attr(path)
            read.meta = dict(node.meta)
            node.replace_all_uses_with(read)
        copied.graph.erase_node(node)
    _take_remaining(copied)
    copied.graph.lint()
    copied.recompile()
    return copied


def _copy(value: Tensor) -> Tensor:
    return copy.deepcopy(value) if isinstance(value, nn.Parameter) else value.detach().clone()


def _take_remaining(module: fx.GraphModule) -> None:
    """Have a graph around whose placeholders is a function of nested arguments take the placeholders themselves."""
    codegen = module.graph._codegen
    if not isinstance(codegen, fx.graph._PyTreeCodeGen):
        return
    names = [str(node.target) for node in module.graph.find_nodes(op="placeholder")]
    spec = pytree.tree_structure((tuple(range(len(names))), {}))
    info = codegen.pytree_info
    module.graph.set_codegen(fx.graph._PyTreeCodeGen(fx.graph._PyTreeInfo(names, spec, info.out_spec)))
