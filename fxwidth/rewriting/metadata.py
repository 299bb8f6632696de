"""What a graph's nodes carry of their values, for passes that come later: shapes and fake tensors of the new sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.passes.shape_prop import TensorMetadata, _extract_tensor_metadata
from torch.utils import _pytree as pytree

from fxwidth.analysis.result import Analysis
from fxwidth.rewriting.graphs import RewrittenGraph
from fxwidth.runtime.contexts import evaluating, quiet
from fxwidth.runtime.pytrees import deep_tensors
from fxwidth.runtime.tensor_slots import substituted, tensor_slots

# As torch.export, Dynamo and ShapeProp write them.
_FAKES, _SHAPES = ("val", "example_value"), "tensor_meta"


def renew_metadata(analysis: Analysis, rewritten: RewrittenGraph, new: Mapping[str, Tensor]) -> None:
    """Have the nodes of a rewritten graph tell what they are at the new sizes, where the old ones told what they were.

    Args:
        analysis: the graph before.
        rewritten: the new graph, whose nodes have the metadata of the old ones.
        new: the tensors that have changed, by name.
    """
    graph, values = rewritten.graph, rewritten.values
    keys = [key for key in (*_FAKES, _SHAPES) if any(key in node.meta for node in graph.nodes)]
    if not keys:
        return
    changed = [node for node in graph.nodes if node.op != "output" and not _same(analysis, node, values)]
    if set(keys) & set(_FAKES) or not _is_of_analysis(analysis, graph):
        values = _propagated(analysis.module, rewritten, new)
    for node in changed:
        known = node.meta if analysis.node_values.get(node.name) is not None else dict.fromkeys(keys)
        for key in [key for key in keys if key in known]:
            node.meta.pop(key, None)
            value = values.get(node)
            if deep_tensors(value) or (key in _FAKES and value is not None):
                node.meta[key] = _shapes(value) if key == _SHAPES else value


def _same(analysis: Analysis, node: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
    """Tell whether a node is what it was."""
    if node.name not in analysis.node_values or node not in values:
        return False
    old, new = deep_tensors(analysis.node_values[node.name]), deep_tensors(values[node])
    return len(old) == len(new) and all(
        one.shape == other.shape and one.stride() == other.stride() for one, other in zip(old, new, strict=True)
    )


def _is_of_analysis(analysis: Analysis, graph: fx.Graph) -> bool:
    """Tell whether the shapes that a graph carries are those of the inputs of its analysis."""
    for node, value in zip(graph.find_nodes(op="placeholder"), analysis.inputs, strict=False):
        known = node.meta.get(_SHAPES)
        if isinstance(known, TensorMetadata) and isinstance(value, Tensor) and tuple(known.shape) != value.shape:
            return False
    return True


def _propagated(module: fx.GraphModule, rewritten: RewrittenGraph, new: Mapping[str, Tensor]) -> dict[fx.Node, Any]:
    """Return what each node is on the inputs that a graph's metadata tell of; nothing where it does not run on them."""
    inputs = [_input(node) for node in rewritten.graph.find_nodes(op="placeholder")]
    mode = next((value.fake_mode for value in inputs if isinstance(value, FakeTensor)), None)
    mode = FakeTensorMode(allow_non_fake_inputs=True) if mode is None else mode
    values: dict[fx.Node, Any] = {}

    class Recording(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    lax = mode.allow_non_fake_inputs
    try:
        mode.allow_non_fake_inputs = True
        tensors = {name: new.get(name, tensor) for name, (tensor, _) in tensor_slots(module).items()}
        fakes = {name: mode.from_tensor(tensor, static_shapes=True) for name, tensor in tensors.items()}
        with rewritten.additions.in_place(), evaluating(module), substituted(module, fakes), quiet(), mode:
            Recording(module, graph=rewritten.graph).run(*map(_made, inputs), enable_io_processing=False)
    except Exception:
        # Without metadata a later pass asks; by that of other sizes it would be misled.
        return {}
    finally:
        mode.allow_non_fake_inputs = lax
    return values


def _input(node: fx.Node) -> Any:
    known = next((node.meta[key] for key in (*_FAKES, _SHAPES) if node.meta.get(key) is not None), None)
    return node.args[0] if known is None and node.args else known


def _made(known: Any) -> Any:
    """Return a value like what the metadata of an input tell, under the mode that is on."""
    if isinstance(known, TensorMetadata):
        return torch.empty_strided(known.shape, known.stride, dtype=known.dtype)
    return known


def _shapes(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, _extract_tensor_metadata, value)
