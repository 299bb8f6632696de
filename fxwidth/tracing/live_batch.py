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

from fxwidth.errors import FxwidthError
from fxwidth.frontends.call_signature import Call
from fxwidth.frontends.placeholder_calls import bound_to_placeholders
from fxwidth.runtime.pytrees import deep_tensors
from fxwidth.tracing.analyze import analyze_module

# Ops whose arguments are the sizes of their result, all of them or those behind the first.
_MADE = frozenset({"arange", "zeros", "ones", "full", "empty"})
_SIZED = frozenset({"view", "reshape", "expand", "new_zeros", "new_ones", "new_full", "new_empty"})
# Tells whether a dim of a node's result holds the batch.
_Holds = Callable[[fx.Node, int], bool]


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
    by_axes = _by_axes(module, call)
    # The axes of what is made of no input, such as positions, do not tell; and none do where the batch is one.
    attempts: list[_Holds] = [by_axes, lambda node, dim: by_axes(node, dim) or _is_first(node, dim, batch)]
    for holds_batch in attempts[batch == 1 :]:
        if _reads_batch(module, inputs[0], given, holds_batch):
            return


def _reads_batch(module: fx.GraphModule, source: fx.Node, given: Sequence[Any], holds_batch: _Holds) -> bool:
    """Have sizes that hold the batch read from an input; tell whether the graph runs so, else all is as it was."""
    before = [(node, node.args) for node in module.graph.nodes]
    made = [one for node, _ in before for one in _live(node, source, given[0].shape[0], holds_batch)]
    module.recompile()
    if not made or _does_the_same(module, given):
        return True
    for node, arguments in before:
        node.args = arguments
    for node in reversed(made):
        module.graph.erase_node(node)
    module.recompile()
    return False


def _live(node: fx.Node, source: fx.Node, batch: int, holds_batch: _Holds) -> list[fx.Node]:
    """Read the sizes of one node's result that hold the batch from an input; return the nodes that do so."""
    start, sizes = _sizes(node)
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
    is_one = isinstance(node.args[start], (tuple, list))
    node.args = (*node.args[:start], tuple(live), *node.args[start + 1 :]) if is_one else (*node.args[:start], *live)
    return made


def _sizes(node: fx.Node) -> tuple[int, Sequence[Any]]:
    """Return at which argument of a node the sizes of its result begin, and these; none where it takes none."""
    if node.op not in ("call_method", "call_function"):
        return 0, ()
    name = _name(node)
    start = 0 if name in _MADE else 1
    if name not in _MADE | _SIZED or len(node.args) <= start or (name == "arange" and len(node.args) > 1):
        return 0, ()
    first = node.args[start]
    return start, first if isinstance(first, (tuple, list)) else node.args[start:]


def _name(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._opname)
    return target if isinstance(target, str) else str(getattr(target, "__name__", ""))


def _is_first(node: fx.Node, dim: int, batch: int) -> bool:
    """Tell whether a size is the first one, and just the batch."""
    return dim == 0 and _sizes(node)[1][0] == batch


def _by_axes(module: fx.GraphModule, call: Call) -> _Holds:
    """Return what tells of a dim of a node's result whether it holds the batch, by the axes of the tape."""
    try:
        analysis = analyze_module(module, call)
    except FxwidthError:
        return lambda *_: False

    def holds(node: fx.Node, dim: int) -> bool:
        axes = next(iter(analysis.node_axes.get(node.name, ())), ())
        return dim < len(axes) and any(factor.is_batch for factor in analysis.space.factors(axes[dim]))

    return holds


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
