"""The graph of a program that takes and returns what the graph that was saved does, by nodes of its own."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.graph import CodeGen
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils import _pytree as pytree

from fxwidth.analysis.input_specs import device_of, known_shape
from fxwidth.analysis.result import TensorSpec
from fxwidth.frontends.call_signature import INPUTS_MODULE, OUTPUTS_MODULE, Inputs, Outputs, native
from fxwidth.frontends.exported_programs import plain_graph
from fxwidth.recording.graph_meta import INPUTS, notes_of
from fxwidth.runtime.pytrees import flatten, flatten_each, map_leaves

NOT_ONE = "leaves[{}].size()[0] != 1"
"""How a graph of `trace` says that it does not hold for a batch of one, by the number of a tensor."""


def called_alike(program: ExportedProgram, defaults: Mapping[str, Any], never_one: Sequence[int]) -> fx.GraphModule:
    """Return the graph of a program, which takes the arguments of the graph that was saved and answers like it.

    Args:
        program: takes all arguments by position.
        defaults: of those arguments that have some, by name.
        never_one: the numbers of the tensors whose first dim must not be one.
    """
    module = plain_graph(program)
    codegen: Any = module.graph._codegen
    spec = codegen.pytree_info
    own = parts = list(module.graph.find_nodes(op="placeholder"))
    arguments, named = _children(spec.in_spec)
    if named.num_leaves:
        return module
    if not all(argument.is_leaf() for argument in _children(arguments)):
        own = _whole_arguments(module, parts, spec.orig_args, arguments)
    for node in own:
        if node.target in defaults:
            node.args = (defaults[node.target],)
    _check_arguments(module, own, parts, never_one)
    _return_answer(module, spec.out_spec)
    module.graph.set_codegen(CodeGen())
    module.recompile()
    return module


def _children(spec: Any) -> Sequence[Any]:
    found: Sequence[Any] = spec.children() if hasattr(spec, "children") else spec.children_specs
    return found


def _whole_arguments(
    module: fx.GraphModule, parts: Sequence[fx.Node], names: Sequence[str], spec: Any
) -> list[fx.Node]:
    """Put one placeholder for each argument before those for the parts of arguments; return the new ones."""
    values = pytree.tree_unflatten([node.meta["val"] for node in parts], spec)
    for node in parts:
        # The names are those of the arguments again.
        node._rename(f"part_{node.name}")
    own = []
    with module.graph.inserting_before(next(iter(module.graph.nodes))):
        for name, value in zip(names, values, strict=True):
            node = module.graph.placeholder(name)
            node.meta["val"] = value
            own.append(node)
    device = device_of(module)
    notes_of(module)[INPUTS] = [
        map_leaves(lambda leaf: TensorSpec(known_shape(leaf), leaf.dtype, device), value) for value in values
    ]
    return own


def _check_arguments(
    module: fx.GraphModule, own: Sequence[fx.Node], parts: Sequence[fx.Node], never_one: Sequence[int]
) -> None:
    """Have the graph itself look at its arguments, as those of `trace` do, and take their tensors out of them."""
    leaves, structures = flatten_each([node.meta["val"] for node in own], (Tensor,))
    shapes = [[size if isinstance(size, int) else None for size in leaf.shape] for leaf in leaves]
    guards = [NOT_ONE.format(number) for number in never_one]
    module.add_submodule(INPUTS_MODULE, Inputs([str(node.target) for node in own], structures, shapes, guards))
    with module.graph.inserting_after(own[-1]):
        checked = module.graph.call_module(INPUTS_MODULE, tuple(own))
    if parts is own:
        return
    for node in own:
        # What else reads the value of a placeholder takes it for a tensor.
        del node.meta["val"]
    numbers = {id(leaf): number for number, leaf in enumerate(leaves)}
    for part in parts:
        value = part.meta["val"]
        if isinstance(value, Tensor):
            with module.graph.inserting_before(part):
                value = module.graph.call_function(operator.getitem, (checked, numbers[id(value)]))
            value.meta.update(part.meta)
        part.replace_all_uses_with(value)
        module.graph.erase_node(part)


def _return_answer(module: fx.GraphModule, spec: Any) -> None:
    """Have the graph itself put its results together, as those of `trace` do."""
    output = next(iter(module.graph.find_nodes(op="output")))
    results: Any = output.args[0]
    tensors = [torch.empty(0) if isinstance(result, fx.Node) else result for result in results]
    found, structure = flatten(_mutable(pytree.tree_unflatten(tensors, spec)))
    nodes = {id(tensor): node for tensor, node in zip(tensors, results, strict=True)}
    leaves = [nodes[id(tensor)] for tensor in found]
    is_plain, value = native(structure, leaves)
    if not is_plain:
        module.add_submodule(OUTPUTS_MODULE, Outputs(structure))
        with module.graph.inserting_before(output):
            value = module.graph.call_module(OUTPUTS_MODULE, tuple(leaves))
    output.args = (value,)


def _mutable(value: Any) -> Any:
    """Return what a graph returns in the containers of Python, of which its output node has held others."""
    if isinstance(value, dict) and type(value) in (dict, immutable_dict):
        return {key: _mutable(part) for key, part in value.items()}
    if type(value) in (list, tuple, immutable_list):
        return (tuple if type(value) is tuple else list)(map(_mutable, value))
    return value
