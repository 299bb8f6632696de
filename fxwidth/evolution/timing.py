"""When a network that evolves is resized next, and for what: by the settings, and by how far it has come."""

from __future__ import annotations

from dataclasses import dataclass

from fxwidth.costs.budget import Budget
from fxwidth.evolution.progress import Progress
from fxwidth.evolution.schedule import Phase, Schedule
from fxwidth.evolution.settings import Settings

_ROUNDS = 8
# A network has stopped to get better by breathing after so many breaths without a lower loss.
_BREATHS = 2


@dataclass(frozen=True)
class Timing:
    """When a network is resized next, and for what.

    Attributes:
        settings: those of the evolution.
        progress: how far it has come.
    """

    settings: Settings
    progress: Progress

    @property
    def schedule(self) -> Schedule:
        """The costs after each event, where there is a target."""
        settings, progress = self.settings, self.progress
        rounds = settings.rounds or _ROUNDS
        return Schedule(progress.first, progress.target, rounds, settings.overshoot, settings.breath)

    @property
    def phase(self) -> Phase:
        """What the next event is for."""
        return self.schedule.phase(self.progress.event) if self.progress.target else Phase.THRESHOLDS

    @property
    def budget(self) -> Budget | None:
        """What the network may cost after the next event; None where thresholds decide."""
        return self.schedule.budget_after(self.progress.event) if self.progress.target else None

    @property
    def is_over(self) -> bool:
        """Whether nothing will change any more."""
        settings, progress = self.settings, self.progress
        if not progress.target:
            return settings.stop is not None and progress.ticks >= settings.stop
        lead = self.schedule.lead
        if progress.event <= lead or self.phase is Phase.FOLD:
            return False
        breaths = (len(progress.history) - lead) // 2
        return (
            not settings.breathes
            or breaths >= (settings.breaths or breaths + 1)
            or progress.breaths_without >= _BREATHS
            # There must be time to fold back.
            or (settings.stop is not None and self.next_tick + settings.interval > settings.stop)
        )

    @property
    def next_tick(self) -> int:
        """The step, or epoch, of the next event."""
        settings = self.settings
        since = max(0, self.progress.ticks - settings.start)
        return settings.start + (since // settings.interval + 1) * settings.interval

    @property
    def is_due(self) -> bool:
        """Whether the step, or epoch, that is counted next is one to resize at."""
        return not self.is_over and self.progress.ticks + 1 == self.next_tick
