"""What a network may cost after each event of its evolution: on the way to a target, and at it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from fxwidth.costs.budget import Budget


class Phase(StrEnum):
    """What an event is for."""

    APPROACH = "approach"
    GROW = "grow"
    FOLD = "fold"
    THRESHOLDS = "thresholds"


@dataclass(frozen=True)
class Schedule:
    """The costs after each event, which are numbered from one.

    First the costs go to the target in geometric steps; those that grow go beyond it first, and are folded back. Then
    the network breathes: all groups grow alike, and at the next event those channels go that bring least.

    Attributes:
        first: the costs before the first event, by name.
        target: those to end at.
        rounds: the number of events on the way.
        overshoot: the ratio to the target up to which costs grow that are below it.
        breath: the ratio to the target up to which a network at it grows for a while.
    """

    first: Mapping[str, int]
    target: Mapping[str, int]
    rounds: int
    overshoot: float = 1.0
    breath: float = 1.25

    @property
    def lead(self) -> int:
        """The number of events after which the costs are at the target for the first time."""
        return self.rounds + (self.overshoot > 1 and self._grows)

    def phase(self, event: int) -> Phase:
        """Return what an event is for."""
        if event <= self.rounds:
            return Phase.APPROACH
        return Phase.FOLD if (event - self.lead) % 2 == 0 else Phase.GROW

    def budget_after(self, event: int) -> Budget:
        """Return what the network may cost after an event."""
        phase = self.phase(event)
        if phase is Phase.FOLD:
            return Budget.of(dict(self.target))
        if phase is Phase.GROW:
            return Budget.of({name: round(self.breath * goal) for name, goal in self.target.items()})
        share = event / self.rounds
        return Budget.of({n: round(self.first[n] * (self._goal(n) / self.first[n]) ** share) for n in self.target})

    @property
    def _grows(self) -> bool:
        return any(goal > self.first[name] for name, goal in self.target.items())

    def _goal(self, name: str) -> float:
        goal = self.target[name]
        return goal * self.overshoot if goal > self.first[name] else goal
