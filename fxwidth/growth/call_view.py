"""What an op sees of new channels: the dims of its operands that have them, and their states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

from torch import Tensor

from fxwidth.axes.factor_space import FactorSpace
from fxwidth.axes.factors import Axis, Factor, Term
from fxwidth.growth.states import (
    ALL_ZERO,
    CONSTANT,
    NormedWriterError,
    ProductRefusedError,
    RefusedError,
    State,
    States,
)
from fxwidth.recording.tape import OpCall
from fxwidth.rules.op_names import rule_name


class StateObserver(Protocol):
    """What a call tells the interpretation that runs it."""

    def states_of(self, tensor: Tensor, call: OpCall) -> States:
        """Return the states of a call's operand."""

    def zero_needed(self, tensor: Tensor, dim: int) -> None:
        """Learn that an operand must keep its zeros."""

    def is_parameter(self, tensor: Tensor) -> bool:
        """Tell whether an operand is made of parameters alone."""

    def is_statistic(self, tensor: Tensor) -> bool | None:
        """Tell whether an operand is made of buffers alone, which training may compute anew; None unless fixed."""

    def is_used(self, tensor: Tensor) -> bool:
        """Tell whether any op, or the model's output, takes a tensor."""

    def gain_conflict(self, weight: Tensor) -> str | None:
        """Return why the gain of a norm cannot be rescaled, or None."""

    def gain_rescaled(self, call: OpCall) -> None:
        """Learn that a norm's gain and eps must be rescaled."""

    def scaled(self, signal: Tensor, scale: Tensor) -> bool:
        """Tell whether a signal's weighted means are weighted by this scale; if they could be, take note."""


class AxisFacts:
    """How the growing factor occurs in axes."""

    def __init__(self, factor: Factor, space: FactorSpace) -> None:
        self.factor = factor
        self._space = space
        self._carries: dict[Axis, bool] = {}

    def carries(self, axis: Axis) -> bool:
        """Tell whether the factor is in an axis."""
        known = self._carries.get(axis)
        if known is None:
            known = self._carries[axis] = self.factor in self._space.factors(axis)
        return known

    def is_bare(self, axis: Axis) -> bool:
        """Tell whether an axis is the factor and nothing else."""
        return self._space.normalise(axis) == ((self.factor,),)

    def is_sum(self, axis: Axis) -> bool:
        """Tell whether an axis is a concatenation of several parts."""
        return len(self._space.normalise(axis)) > 1

    def is_product(self, axis: Axis) -> bool:
        """Tell whether an axis is one product with the factor as one of its elements."""
        normal = self._space.normalise(axis)
        return len(normal) == 1 and sum(element is self.factor for element in normal[0]) == 1

    def multiplicity(self, axis: Axis) -> int:
        """Return how often the factor is multiplied with itself in an axis; 0 where it is absent."""
        return max((self._occurrences(term) for term in self._space.normalise(axis)), default=0)

    def repeats(self, axis: Axis) -> bool:
        """Tell whether the factor is multiplied with itself in an axis."""
        return self.multiplicity(axis) > 1

    def _occurrences(self, term: Term) -> int:
        count = 0
        for element in term:
            if element is self.factor:
                count += 1
            elif isinstance(element, tuple):
                count += max((self._occurrences(inner) for inner in element), default=0)
        return count


class CallView:
    """One op call as a transfer sees it."""

    def __init__(self, call: OpCall, facts: AxisFacts, observer: StateObserver) -> None:
        self.call = call
        self.facts = facts
        self.observer = observer

    def __getitem__(self, name: str) -> Any:
        return self.call.arguments[name]

    def __contains__(self, name: str) -> bool:
        return self.call.arguments.get(name) is not None

    # -- operands --------------------------------------------------------------------------------------------------

    def tensor(self, operand: str | Tensor) -> Tensor:
        """Return an operand given by itself or by the name of its argument."""
        tensor: Tensor = self[operand] if isinstance(operand, str) else operand
        return tensor

    def axes(self, operand: str | Tensor) -> tuple[Axis, ...]:
        """Return the axes of an operand from before the op."""
        return self.call.axes[self.tensor(operand)]

    def states(self, operand: str | Tensor) -> list[State]:
        """Return the state of each dim of an operand; dims without the factor are `CONSTANT`."""
        return list(self.observer.states_of(self.tensor(operand), self.call))

    def carrying(self, operand: str | Tensor) -> list[int]:
        """Return the dims of an operand that carry the factor."""
        return [dim for dim, axis in enumerate(self.axes(operand)) if self.facts.carries(axis)]

    def entry(self, operand: str, dim: int = 0) -> State:
        """Return the state of an optional operand's dim; one that is absent is zero."""
        return self.states(operand)[dim] if operand in self else ALL_ZERO

    # -- results ---------------------------------------------------------------------------------------------------

    @property
    def outputs(self) -> list[tuple[Tensor, tuple[Axis, ...]]]:
        """The results with their axes."""
        return list(zip(self.call.outputs, self.call.output_axes, strict=True))

    def each_output(self, state: Callable[[int], State]) -> list[States]:
        """Return the states of all results, asking only for dims that carry the factor."""
        return [
            tuple(state(dim) if self.facts.carries(axis) else CONSTANT for dim, axis in enumerate(axes))
            for _, axes in self.outputs
        ]

    def everywhere(self, state: State) -> list[States]:
        """Return one state for all dims of all results that carry the factor."""
        return self.each_output(lambda _: state)

    def results(self, states: Sequence[Sequence[State]]) -> list[States]:
        """Return a transfer's result without what integers or a squared factor cannot promise."""
        results = []
        for (output, axes), row in zip(self.outputs, states, strict=True):
            exact = output.dtype.is_floating_point or output.dtype.is_complex
            results.append(
                tuple(self._checked_state(axis, state, exact) for axis, state in zip(axes, row, strict=True))
            )
        return results

    def _checked_state(self, axis: Axis, state: State, exact: bool) -> State:
        if not self.facts.carries(axis):
            return CONSTANT
        if self.facts.repeats(axis):
            return state & State.ZERO
        return state if exact or state & State.UNIFORM else state & State.ZERO

    # -- demands ---------------------------------------------------------------------------------------------------

    def refuse(self, reason: str) -> NoReturn:
        """Say that new channels would change the function here.

        Raises:
            RefusedError: always.
        """
        raise RefusedError(f"{reason} ({self.place})")

    @property
    def place(self) -> str:
        """The op and node, as in messages."""
        return f"{rule_name(self.call.func)} at node {self.call.node}" if self.call.node else rule_name(self.call.func)

    def need_zero(self, operand: str | Tensor, dim: int, reason: str) -> None:
        """Refuse unless the new channels of an operand are zero.

        Raises:
            RefusedError: they are not.
        """
        if not self.states(operand)[dim] & State.ZERO:
            self.refuse(reason)
        self.observer.zero_needed(self.tensor(operand), dim)

    def need_zero_weight(self, weight: str | Tensor, dim: int, reason: str) -> None:
        """Refuse unless new slices of a weight are zero, for a norm over all of it.

        Raises:
            NormedWriterError: they are not.
        """
        if not self.states(weight)[dim] & State.ZERO:
            raise NormedWriterError(f"{reason} ({self.place})", self.tensor(weight))
        self.observer.zero_needed(self.tensor(weight), dim)

    def contract(self, left: str | Tensor, left_dim: int, right: str | Tensor, right_dim: int) -> None:
        """Refuse a sum of products over the factor unless one operand is zero in the new channels.

        Raises:
            ProductRefusedError: neither is.
        """
        if not self.facts.carries(self.axes(left)[left_dim]) and not self.facts.carries(self.axes(right)[right_dim]):
            return
        one, other = self.tensor(left), self.tensor(right)
        left_zero = bool(self.states(left)[left_dim] & State.ZERO)
        right_zero = bool(self.states(right)[right_dim] & State.ZERO)
        if not left_zero and not right_zero:
            reason = "it sums products of new channels, which are zero on neither side"
            raise ProductRefusedError(f"{reason} ({self.place})", one, other)
        for statistic, weight, dim in ((one, other, right_dim), (other, one, left_dim)):
            if self.observer.is_statistic(statistic) and self.observer.is_statistic(weight) is False:
                # As the singular vectors of a spectral norm, of which new entries are zero only for now.
                self.need_zero_weight(weight, dim, "a statistic of its weight would see new channels that are not zero")
        # Of two parameters that are both zero only one needs to be; zeros of an activation cost nothing.
        if right_zero and (not left_zero or self.observer.is_parameter(one)):
            self.observer.zero_needed(other, right_dim)
        elif left_zero and not right_zero:
            self.observer.zero_needed(one, left_dim)
