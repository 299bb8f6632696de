"""Of which dims the numbers are that a graph computes from sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx

from fxwidth.axes.factor_space import FactorSpace
from fxwidth.axes.factors import Axis
from fxwidth.recording.tape import Axes

ELEMENTS = frozenset({"numel", "sym_numel", "nelement"})
SIZES = frozenset({"size", "sym_size", "getattr", "len"})


def function_name(node: fx.Node) -> str:
    """Return the name of what a node calls, without overload and underscores."""
    return getattr(node.target, "__name__", str(node.target)).strip("_").partition(".")[0]


def dims_read(node: fx.Node, value_of: Callable[[Any], Any], axes_of: Callable[[Tensor], Axes]) -> Axes | None:
    """Return the dims that a node reads a number or sizes of; None of one that computes with numbers alone.

    Args:
        node: one whose value is a number, or sizes.
        value_of: the values of nodes.
        axes_of: the axes of a tensor.
    """
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if isinstance(value_of(source), Tensor):
        axes = axes_of(value_of(source))
        name = function_name(node)
        dim = 0 if name == "len" else node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return (axes[dim],) if name in SIZES and isinstance(dim, int) else axes
    shape = source.args[0] if source.args else None
    if function_name(node) == "getitem" and isinstance(node.args[1], int) and isinstance(shape, fx.Node):
        return (axes_of(value_of(shape))[node.args[1]],) if isinstance(value_of(shape), Tensor) else None
    return None


def of_other_inputs(
    number: fx.Node, values: Mapping[fx.Node, Any], space: FactorSpace, axes_of: Callable[[Tensor], Axes]
) -> bool:
    """Tell whether a number may be another for other inputs, whatever the widths are.

    So are those that are computed from the length or the batch of an input, or read from the values of tensors. Half of
    the channels is none: it follows a resize.

    Args:
        number: the node that computes it.
        values: those of the nodes so far.
        space: that of the axes.
        axes_of: the axes of a tensor.
    """

    def is_of_input(axis: Axis) -> bool:
        return all(factor.is_batch for factor in space.factors(axis))

    seen, waiting = {number}, [number]
    while waiting:
        node = waiting.pop()
        axes = dims_read(node, values.get, axes_of)
        if axes is None:
            if node.op == "placeholder":
                return True
            fresh = set(node.all_input_nodes) - seen
            seen |= fresh
            waiting += fresh
        elif function_name(node) not in SIZES | ELEMENTS | {"getitem"} or any(map(is_of_input, axes)):
            return True
    return False
