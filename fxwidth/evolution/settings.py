"""The options of an Evolver beside those of a plan and a resize: when it acts, and how far it goes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from fxwidth.errors import FxwidthError
from fxwidth.plain_numbers import is_integer, plain_number

EPOCH = "epoch"
# (what it is, the least)
_COUNTS = {
    "start": ("the number of steps before the first resize", 0),
    "rounds": ("the number of resizes on the way to a target", 1),
    "breaths": ("how often the network grows and is folded back at its target", 0),
    "stop": ("the step after which nothing changes any more", 1),
    "patience": ("the number of epochs without a better metric after which the network is resized", 1),
    "cooldown": ("the number of resizes after which a group may go the other way", 0),
}
_RATIOS = {
    "overshoot": "the ratio to the target up to which a network grows on its way",
    "breath": "the ratio to the target up to which a network at it grows for a while",
}


@dataclass(frozen=True)
class Settings:
    """When an Evolver acts, and how far it goes; `fxwidth.Evolver` tells what each does.

    Raises:
        FxwidthError: one is out of range, or they contradict each other.
    """

    every: int | Literal["epoch"]
    start: int
    rounds: int | None
    overshoot: float
    breath: float
    breaths: int | None
    stop: int | None
    patience: int | None
    cooldown: int
    policy: Literal["budget", "thresholds"] | None
    has_target: bool

    def __post_init__(self) -> None:
        if not self.by_epoch:
            self._take("every", _count("every", self.every, "'epoch' or the number of steps between resizes", 1))
        for name, (meaning, least) in _COUNTS.items():
            if getattr(self, name) is not None or name in ("start", "cooldown"):
                self._take(name, _count(name, getattr(self, name), meaning, least))
        for name, meaning in _RATIOS.items():
            self._take(name, _ratio(name, getattr(self, name), meaning))
        self._check_policy()
        if self.patience is not None and not self.by_epoch:
            raise FxwidthError(
                f"patience={self.patience} waits for epochs without a better metric; give every='epoch' too, and call "
                "evolver.epoch(metric) after each."
            )

    @property
    def by_epoch(self) -> bool:
        """Whether epochs are counted, and not steps."""
        return isinstance(self.every, str) and self.every == EPOCH

    @property
    def interval(self) -> int:
        """How many steps, or epochs, lie between two events."""
        return 1 if self.by_epoch else int(self.every)

    @property
    def breathes(self) -> bool:
        """Whether a network at its target goes on to grow and be folded back."""
        return bool(self.breaths) or (self.breaths is None and self.stop is not None)

    def refuse_late(self, events: int) -> None:
        """Check that a number of events comes before the end.

        Raises:
            FxwidthError: it does not.
        """
        last = self.start + events * self.interval
        if self.stop is not None and last > self.stop:
            unit = "epoch" if self.by_epoch else "step"
            raise FxwidthError(
                f"stop={self.stop} comes before the target: {events} resizes end at {unit} {last}. Lower rounds, start "
                "or every, or raise stop."
            )

    def _check_policy(self) -> None:
        if self.policy not in (None, "budget", "thresholds"):
            raise FxwidthError(f"policy={self.policy!r} must be 'budget' or 'thresholds'.")
        if self.policy == "budget" and not self.has_target:
            raise FxwidthError("policy='budget' needs params= or budget= to go to.")
        if self.policy == "thresholds" and self.has_target:
            raise FxwidthError("policy='thresholds' goes by the spectrum, not to params= or budget=; leave one out.")
        overshoot = None if self.overshoot == 1 else self.overshoot
        given = {"rounds": self.rounds, "breaths": self.breaths or None, "overshoot": overshoot}
        for name, value in given.items():
            if value is not None and not self.has_target:
                raise FxwidthError(f"{name}={value} needs params= or budget= to go to.")

    def _take(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def _count(name: str, given: Any, meaning: str, least: int) -> int:
    value = plain_number(given)
    if not is_integer(value) or value < least:
        raise FxwidthError(f"{name}= is {meaning}, a whole number of at least {least}, but received {given!r}.")
    return int(value)


def _ratio(name: str, given: Any, meaning: str) -> float:
    value = plain_number(given)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value < math.inf:
        raise FxwidthError(f"{name}= is {meaning}, a number of at least 1, but received {given!r}.")
    return float(value)
