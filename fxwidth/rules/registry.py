"""The table of op rules, and what a rule sees of the call it judges.

A *rule* says of what axes the results of one ATen op are made, and couples the axes of its operands on the way. A
*literal rule* says how the op's literal arguments follow from the axes once those are resized. Ops whose literals
never depend on a size that can change have a rule only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from fxwidth.axes.factor_space import FactorSpace
from fxwidth.axes.factors import ONE, Axis, axis_size, constant, why_fixed
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.axes.pins import MADE, Pin
from fxwidth.axes.unification import cut, split, unify
from fxwidth.recording.tape import Axes, Contraction, OpCall, Reduction, tensors_in
from fxwidth.rules.family_table import declare
from fxwidth.rules.op_families import Family
from fxwidth.rules.op_names import Op, op_name, rule_name

Rule = Callable[["RuleContext"], Sequence[Sequence[Axis]]]
ResizedCall = tuple[OpOverload, dict[str, Any]]
LiteralRule = Callable[[OpCall, IndexMaps], ResizedCall]

RULES: dict[str, Rule] = {}
LITERAL_RULES: dict[str, LiteralRule] = {}
POINTWISE: set[str] = set()


class RuleDeclinedError(Exception):
    """The rule does not cover this form of the call: everything it touches is pinned."""


def rule(*ops: Op, family: Family | None = None) -> Callable[[Rule], Rule]:
    """Register a rule for all overloads of some ops, such as torch.ops.aten.mm, or "mylib::op" by its qualified name.

    Args:
        ops: the ops.
        family: what they do, where that is more than the rule says; see `op_families`.

    Raises:
        ValueError: a name is not qualified, or there is a rule for one of them already.
    """

    def register(function: Rule) -> Rule:
        names = _new_names(ops)
        if family is not None:
            declare(family, *ops)
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def pointwise(*ops: Op, family: Family | None = None) -> None:
    """Register ops that act on each element of their broadcast operands alone; arguments are those of `rule`."""
    names = _new_names(ops)
    if family is not None:
        declare(family, *ops)
    POINTWISE.update(names)


def _new_names(ops: Sequence[Op]) -> list[str]:
    names = [op_name(op) for op in ops]
    for name in names:
        if name in RULES or name in POINTWISE:
            raise ValueError(f"there is a rule for {name} already")
    return names


def literal_rule(*ops: Op) -> Callable[[LiteralRule], LiteralRule]:
    """Register how the literal arguments of ops, named as for `rule`, follow from resized axes."""

    def register(function: LiteralRule) -> LiteralRule:
        for name in map(op_name, ops):
            if name in LITERAL_RULES:
                raise ValueError(f"there is a literal rule for {name} already")
            LITERAL_RULES[name] = function
        return function

    return register


def revised(call: OpCall, **literals: Any) -> ResizedCall:
    """Return a call with some of its literal arguments changed."""
    return call.func, {**call.arguments, **literals}


def resized_call(call: OpCall, maps: IndexMaps) -> ResizedCall:
    """Return the op and arguments that a recorded call must have after a resize; tensors stand for their successors."""
    prescribe = LITERAL_RULES.get(rule_name(call.func))
    return revised(call) if prescribe is None else prescribe(call, maps)


def rule_for(func: OpOverload) -> Rule | None:
    """Return the rule of an op, if there is one."""
    name = rule_name(func)
    if name in RULES:
        return RULES[name]
    if name in POINTWISE or torch.Tag.pointwise in func.tags:
        return broadcast_all
    return None


def keeps(func: OpOverload) -> bool:
    """Tell whether a composite op has a rule of its own and need not be taken apart."""
    return rule_name(func) in RULES


class RuleContext:
    """One op call as its rule sees it: arguments by name, axes of tensors, and the verbs that relate axes."""

    def __init__(
        self,
        call: OpCall,
        space: FactorSpace,
        axes_of: Callable[[Tensor], Axes],
        in_memory_of: Callable[[Tensor], Iterable[Tensor]],
    ) -> None:
        self.call = call
        self.space = space
        self.outputs = call.outputs
        self._axes_of = axes_of
        self._in_memory_of = in_memory_of

    def __getitem__(self, name: str) -> Any:
        return self.call.arguments[name]

    def __contains__(self, name: str) -> bool:
        return self.call.arguments.get(name) is not None

    def axes(self, operand: str | Tensor) -> list[Axis]:
        """Return the axes of an operand, one per dim, as a list the rule may change."""
        return list(self._axes_of(self[operand] if isinstance(operand, str) else operand))

    def shape(self, operand: str | Tensor) -> list[int]:
        """Return an operand's shape from before the op."""
        return [axis_size(axis) for axis in self.axes(operand)]

    def in_memory_of(self, operand: str) -> list[Tensor]:
        """Return an operand and all tensors before it that share its memory, each of which says how that is divided."""
        return [self[operand], *self._in_memory_of(self[operand])]

    def dim(self, value: int, rank: int) -> int:
        """Return a dim counted from the front."""
        return value % rank if rank else 0

    def unify(self, first: Axis, second: Axis) -> None:
        """Couple two axes."""
        unify(self.space, first, second)

    def split(self, axis: Axis, position: int) -> tuple[Axis, Axis]:
        """Cut an axis in two."""
        return split(self.space, axis, position)

    def cut(self, axis: Axis, start: int, stop: int) -> Axis:
        """Return a part of an axis."""
        return cut(self.space, axis, start, stop)

    def fresh(self, size: int, name: str = "") -> Axis:
        """Return the axis of a dimension that arises here."""
        return self.space.fresh(size, f"{name or self.call.name}@{self.call.node or self.call.index}")

    def fixed(self, size: int, reason: str = MADE) -> Axis:
        """Return the axis of a dimension that is never resized, because of this op."""
        return constant(size, Pin(reason, self.space.context))

    def fixed_like(self, size: int, axis: Axis) -> Axis:
        """Return the axis of a dimension that is never resized, because it is made from one that is not."""
        return constant(size, why_fixed(self.space.normalise(axis)) or Pin(MADE, self.space.context))

    def factored(self, axis: Axis, *sizes: int) -> list[Axis]:
        """Divide an axis into the product of dimensions of the given sizes, major first."""
        parts = [self.fresh(size) for size in sizes]
        self.unify(axis, (tuple(parts),))
        return [self.space.normalise(part) for part in parts]

    def pin(self, axes: Iterable[Axis], reason: str) -> None:
        """Fix the size of axes."""
        for axis in axes:
            self.space.pin(axis, reason)

    def pin_if_used(self, result: Tensor, axis: Axis, reason: str) -> None:
        """Fix the size of an axis unless nothing ever reads a result."""
        self.call.pins_if_used.append((result, axis, reason))

    def mix(self, operand: str | Tensor, dim: int, kind: str) -> None:
        """Record that the op reduces over a dim; all kinds but a plain sum mix channels."""
        tensor = self[operand] if isinstance(operand, str) else operand
        self.call.reductions.append(Reduction(tensor, dim, kind))
        if kind != "sum":
            self.space.mix(self.axes(tensor)[dim], kind)

    def mix_inside(self, operand: str, dim: int, kind: str) -> None:
        """Record that the op reduces over a part of a dim; the rule marks which."""
        self.call.reductions.append(Reduction(self[operand], dim, kind))

    def contract(self, left: str, left_dims: tuple[int, ...], right: str, right_dims: tuple[int, ...]) -> None:
        """Record a sum of products over dims; the axes are coupled by the rule."""
        self.call.contractions.append(Contraction(self[left], left_dims, self[right], right_dims))

    def broadcast(self, operands: Iterable[Sequence[Axis]]) -> list[Axis]:
        """Couple the axes of operands as broadcasting does and return those of the result."""
        rows = list(operands)
        if len(rows) == 1:
            return list(rows[0])
        rank = max((len(row) for row in rows), default=0)
        result = []
        for from_end in range(rank, 0, -1):
            found = ONE
            for row in rows:
                if len(row) < from_end or axis_size(row[-from_end]) == 1:
                    continue
                if found == ONE:
                    found = row[-from_end]
                else:
                    self.unify(found, row[-from_end])
            result.append(found)
        return result


def broadcast_all(context: RuleContext) -> Sequence[Sequence[Axis]]:
    """Judge a pointwise op: every operand dim is coupled with the result's."""
    operands = [context.axes(tensor) for tensor in tensors_in(context.call.arguments)]
    return [context.broadcast(operands)] * len(context.outputs)
