"""Numbers that a graph computes from sizes and computes tensors with: they keep the values of the trained network.

Where such a number also holds the size of the batch, it cannot become a constant: it stays computed, and is multiplied
by what the widths in it have lost.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, fx

from fxwidth.analysis.size_reads import ELEMENTS, SIZES, dims_read, function_name
from fxwidth.axes.factor_space import FactorSpace
from fxwidth.errors import FxwidthError
from fxwidth.recording.tape import Axes


class Numbers(Protocol):
    """What is known of the values in a graph."""

    @property
    def new_values(self) -> dict[fx.Node, Any]:
        """The present values of all nodes so far."""

    def now(self, argument: Any) -> Any:
        """Return the present value of an argument."""

    def before(self, argument: Any) -> Any:
        """Return the value of an argument on the tape."""


@dataclass(frozen=True)
class _Made:
    """Whether a number holds the batch, and whether it is a product of sizes, to which a factor can be given."""

    of_batch: bool = False
    is_product: bool = True


_MULTIPLICATIONS = frozenset(
    {"mul", "imul", "truediv", "itruediv", "neg", "float", "sqrt", "pow", "ipow", "prod", "sym_float", "scaled"}
)


def frozen(
    number: fx.Node, user: fx.Node, known: Numbers, space: FactorSpace, axes_of: Callable[[Tensor], Axes]
) -> fx.Node | int | float:
    """Return what stands for the trained value of a number: a constant, or where it holds the batch, a node.

    Args:
        number: the node that computes it.
        user: the node that uses it; what is new comes before it.
        known: the values of the graph's nodes.
        space: that of the axes.
        axes_of: the axes of a tensor of the tape.

    Raises:
        FxwidthError: the number holds the batch, and not as a factor.
    """
    before, now = known.before(number), known.now(number)
    made = _made(number, known, space, axes_of)
    if not made.of_batch:
        constant: int | float = before
        return constant
    if not made.is_product or now == 0:
        raise FxwidthError(
            f"node {user.name!r} computes with a number that holds both the batch and a width ({before} at node "
            f"{number.name!r}), which cannot keep its value at every batch size. Compute the two apart, or keep the "
            "group with keep=."
        )
    with user.graph.inserting_before(user):
        product = user.graph.call_function(operator.mul, (number, before))
        result = user.graph.call_function(operator.truediv, (product, now))
    known.new_values[product] = now * before
    known.new_values[result] = now * before / now
    return result


def rescaled(
    size: fx.Node, wanted: int, user: fx.Node, known: Numbers, space: FactorSpace, axes_of: Callable[[Tensor], Axes]
) -> fx.Node | int:
    """Return what stands for a size that must come out otherwise: a constant, or where it holds the batch, a node.

    Args:
        size: the node that computes it.
        wanted: its value at the batch of the tape.
        user: the node that uses it; what is new comes before it.
        known: the values of the graph's nodes.
        space: that of the axes.
        axes_of: the axes of a tensor of the tape.

    Raises:
        FxwidthError: the size holds the batch, and not as a factor.
    """
    if size.target is scaled:
        size = size.args[0]  # type: ignore[assignment]
    now, made = known.now(size), _made(size, known, space, axes_of)
    if now == wanted:
        return size
    if not made.of_batch:
        return wanted
    if not made.is_product or not isinstance(now, int) or now == 0:
        raise FxwidthError(
            f"node {user.name!r} takes a size that holds both the batch and a width ({now} at node {size.name!r}, "
            f"where {wanted} is needed), and not as a product, so that it cannot follow the width at every batch size. "
            "Compute the two apart, or keep the group with keep=."
        )
    common = math.gcd(wanted, now)
    with user.graph.inserting_before(user):
        result = user.graph.call_function(scaled, (size, wanted // common, now // common))
    known.new_values[result] = wanted
    return result


def scaled(size: int, new: int, old: int) -> int:
    """Return a size in which one width has changed."""
    return size * new // old


def _made(number: Any, known: Numbers, space: FactorSpace, axes_of: Callable[[Tensor], Axes]) -> _Made:
    if not isinstance(number, fx.Node):
        parts = number if isinstance(number, (tuple, list)) else ()
        return _together([_made(part, known, space, axes_of) for part in parts], is_product=True)
    name = function_name(number)
    axes = dims_read(number, known.before, axes_of)
    if axes is not None:
        of_batch = any(factor.is_batch for axis in axes for factor in space.factors(axis))
        return _Made(of_batch, name in SIZES | ELEMENTS | {"getitem"})
    parts = [_made(argument, known, space, axes_of) for argument in (*number.args, *number.kwargs.values())]
    return _together(parts, is_product=name in _MULTIPLICATIONS or name == "getitem")


def _together(parts: list[_Made], *, is_product: bool) -> _Made:
    of_batch = any(part.of_batch for part in parts)
    return _Made(of_batch, is_product and all(part.is_product for part in parts))
