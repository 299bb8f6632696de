"""The order of passes: the given one where it works, else the first that does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fxwidth.errors import FxwidthError
from fxwidth.passes.conditions import Condition
from fxwidth.passes.width_pass import WidthPass

Step = Callable[..., object]
_State = frozenset[Condition]


def ordered(steps: Sequence[Step], known: frozenset[Condition]) -> list[Step]:
    """Return steps in an order in which each finds what it needs; those that say nothing of that keep their places.

    The given order is kept where it works. Else the passes are put in the first order that does, where the earliest of
    them that can run is tried before the others.

    Args:
        steps: passes, and other steps, of which it is not known what they give.
        known: what holds before the first one.

    Raises:
        FxwidthError: there is no such order; the message says what is missing, and what gives it.
    """
    for others_give in (frozenset[Condition](), _conditions(steps)):
        search = _Search(steps, others_give)
        found = search.from_place(0, frozenset(range(len(steps))), known)
        if found is not None:
            return [steps[number] for number in found]
    raise FxwidthError(_missing(steps, known))


def _conditions(steps: Sequence[Step]) -> frozenset[Condition]:
    return frozenset(need for step in steps if isinstance(step, WidthPass) for need in step.needs)


def _after(step: WidthPass, state: _State) -> _State:
    return (state - frozenset(step.spoils)) | frozenset(step.gives)


@dataclass
class _Search:
    """A search of orders, depth first; what has failed once is not tried again.

    Attributes:
        steps: in the given order.
        others_give: what may hold after a step of which nothing is known.
    """

    steps: Sequence[Step]
    others_give: _State
    _failed: set[tuple[frozenset[int], _State]] = field(default_factory=set)

    def from_place(self, place: int, left: frozenset[int], state: _State) -> list[int] | None:
        """Return the numbers of the steps from a place on, or None."""
        if not left:
            return []
        if (left, state) in self._failed:
            return None
        for number, after in self._next(place, left, state):
            rest = self.from_place(place + 1, left - {number}, after)
            if rest is not None:
                return [number, *rest]
        self._failed.add((left, state))
        return None

    def _next(self, place: int, left: frozenset[int], state: _State) -> list[tuple[int, _State]]:
        here = self.steps[place]
        if not isinstance(here, WidthPass):
            return [(place, state | self.others_give)]
        passes = [(number, self.steps[number]) for number in sorted(left)]
        return [
            (number, _after(step, state))
            for number, step in passes
            if isinstance(step, WidthPass) and state.issuperset(step.needs)
        ]


def _missing(steps: Sequence[Step], known: _State) -> str:
    """Tell what is missing for the first pass that finds it nowhere, or finds it spoilt whatever the order."""
    passes = [step for step in steps if isinstance(step, WidthPass)]
    given = known.union(*(step.gives for step in passes))
    for step in passes:
        for need in step.needs:
            if need not in given:
                return f"{step.name} needs that {need.name}, which nothing in the pipeline gives; {need.remedy}."
    state = known
    for step in passes:
        for need in step.needs:
            if need not in state:
                return (
                    f"in no order can all of {', '.join(one.name for one in passes)} run: {step.name} needs that "
                    f"{need.name}, and another pass gives it too late or spoils it; {need.remedy}."
                )
        state = _after(step, state)
    return "no order of these passes works; run them in two pipelines."
