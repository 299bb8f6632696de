"""Sizes of the batch that a capture has written into a graph as numbers: read from an input again.

Dynamo and make_fx capture what a model does with inputs of one size. What is learnt of a graph, by noise or by data,
takes other batches.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx

from fxwidth.analysis.result import Analysis
from fxwidth.errors import FxwidthError
from fxwidth.frontends.call_signature import Call
from fxwidth.frontends.placeholder_calls import bound_to_placeholders
from fxwidth.runtime.pytrees import deep_tensors
from fxwidth.tracing.analyze import analyze_module

# Ops whose arguments behind the first are the sizes of their result.
_SIZED = frozenset({"view", "reshape", "expand"})


def read_batch_of_input(module: fx.GraphModule, call: Call) -> None:
    """Have the numbers in a graph that are sizes of its batch read from the first input, if the graph runs so.

    Args:
        module: the graph; it is changed in place, and computes the same at this batch.
        call: an example call, batch first.
    """
    inputs, given = list(module.graph.find_nodes(op="placeholder")), bound_to_placeholders(module, call)
    if not inputs or not isinstance(given[0], Tensor) or not given[0].dim():
        return
    batch = given[0].shape[0]
    holds_batch = _with_batch(module, call) if batch > 1 else _first
    before = [(node, node.args) for node in module.graph.nodes]
    made: list[fx.Node] = []
    for node in list(module.graph.nodes):
        made += _live(node, inputs[0], batch, holds_batch)
    module.recompile()
    if made and not _does_the_same(module, given):
        for node, arguments in before:
            node.args = arguments
        for node in reversed(made):
            module.graph.erase_node(node)
        module.recompile()


def _live(node: fx.Node, source: fx.Node, batch: int, holds_batch: Callable[[fx.Node, int], bool]) -> list[fx.Node]:
    """Read the sizes of one node's result that hold the batch from an input; return the nodes that do so."""
    sizes = _sizes(node)
    places = [d for d, size in enumerate(sizes) if type(size) is int and size > 0 and size % batch == 0]
    places = [dim for dim in places if holds_batch(node, dim)]
    if not places:
        return []
    made, live = [], list(sizes)
    with node.graph.inserting_before(node):
        read = node.graph.call_method("size", (source, 0))
        made.append(read)
        for dim in places:
            live[dim] = read
            if sizes[dim] != batch:
                live[dim] = node.graph.call_function(operator.mul, (read, sizes[dim] // batch))
                made.append(live[dim])
    is_one = len(node.args) == 2 and isinstance(node.args[1], (tuple, list))
    node.args = (node.args[0], tuple(live)) if is_one else (node.args[0], *live)
    return made


def _sizes(node: fx.Node) -> Sequence[Any]:
    target: Any = node.target
    overload = isinstance(target, torch._ops.OpOverload)
    name = target if isinstance(target, str) else target._opname if overload else getattr(target, "__name__", "")
    if node.op not in ("call_method", "call_function") or name not in _SIZED or len(node.args) < 2 or node.kwargs:
        return ()
    behind = node.args[1]
    return behind if len(node.args) == 2 and isinstance(behind, (tuple, list)) else node.args[1:]


def _with_batch(module: fx.GraphModule, call: Call) -> Callable[[fx.Node, int], bool]:
    """Return what tells of a dim of a node's result whether it holds the batch, by the axes of the tape."""
    analysis: Analysis | None = None
    with suppress(FxwidthError):
        analysis = analyze_module(module, call)

    def holds(node: fx.Node, dim: int) -> bool:
        axes = next(iter(analysis.node_axes.get(node.name, ())), ()) if analysis is not None else ()
        return dim < len(axes) and any(factor.is_batch for factor in analysis.space.factors(axes[dim]))  # type: ignore[union-attr]

    return holds


def _first(_: fx.Node, dim: int) -> bool:
    """Tell that the first dim holds the batch: where that is one, no size tells."""
    return dim == 0


def _does_the_same(module: fx.GraphModule, given: Sequence[Any]) -> bool:
    """Tell whether a graph answers a batch with one more sample as it answers the batch."""
    with suppress(Exception), torch.no_grad():
        found = list(_answers(module, given))
        more = list(_answers(module, [_one_more(value, given[0].shape[0]) for value in given]))
        return all(map(_begins_with, more, found))
    return False


def _answers(module: fx.GraphModule, given: Sequence[Any]) -> Iterator[Tensor]:
    devices = sorted({value.device.index for value in given if isinstance(value, Tensor) and value.is_cuda})
    with torch.random.fork_rng(devices=devices):
        yield from deep_tensors(fx.Interpreter(module).run(*given, enable_io_processing=False))


def _one_more(value: Any, batch: int) -> Any:
    is_batch = isinstance(value, Tensor) and value.dim() and value.shape[0] == batch
    return torch.cat([value, value[:1]]) if is_batch else value


def _begins_with(more: Tensor, found: Tensor) -> bool:
    part = more[tuple(slice(size) for size in found.shape)]
    return part.shape == found.shape and torch.allclose(part.double(), found.double(), rtol=1e-3, atol=1e-4)
