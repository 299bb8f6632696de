"""What a module can hold: groups that its code or its configuration has one number for, and sizes that stay."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from fxwidth.errors import FxwidthError

Widths = Mapping[str, int]
# How many widths are tried near those that are planned.
_MOST_TRIED = 10
# To multiples of what widths are rounded down.
_STEPS = (2, 4, 8, 16)


@dataclass(frozen=True)
class Tie:
    """Groups whose widths a module can only change together.

    Attributes:
        units: by group name, what its width is a multiple of: that multiple is the same for all of them.
        why: what has one number for them.
    """

    units: Mapping[str, int]
    why: str


@dataclass
class Holdings:
    """What a module can hold.

    Attributes:
        ties: the groups that go together.
        staying: the groups that must keep their widths, and why.
        entries: the entries of a configuration that hold widths; None for a module that has none.
        narrower: yields widths, by group name, of which the class can be built: those given first, then somewhat
            smaller ones, as where a number of heads must divide another size. None where that is not known.
        problem: tells why widths would be refused by `write_back`, or None.
    """

    ties: list[Tie] = field(default_factory=list)
    staying: dict[str, str] = field(default_factory=dict)
    entries: list[str] | None = None
    narrower: Callable[[Widths], Iterable[dict[str, int]]] | None = None
    problem: Callable[[Widths], str | None] = lambda _: None

    def settled(self, widths: Widths, allows: Callable[[str, int], bool]) -> dict[str, int]:
        """Return widths that `write_back` does not refuse: those given, or somewhat smaller ones.

        Args:
            widths: those that are planned, by group name.
            allows: tells whether a group may get another width.

        Raises:
            FxwidthError: it refuses all of these.
        """
        first = None
        for tried in islice(self._allowed(widths, allows), _MOST_TRIED):
            problem = self.problem(tried)
            if problem is None:
                return tried
            first = first or problem
        listed = ", ".join(f"{name!r} to {width}" for name, width in list(widths.items())[:6])
        raise FxwidthError(
            f"for_module: the module cannot hold the widths that were planned ({listed}), nor somewhat smaller ones: "
            f"{first or 'its class cannot be built of any'}. Ask for another budget, or keep some of these groups by "
            "keep=[...]."
        )

    def _allowed(self, widths: Widths, allows: Callable[[str, int], bool]) -> Iterator[dict[str, int]]:
        seen: list[Widths] = []
        for tried in self._near(widths):
            if tried in seen:
                continue
            seen.append(tried)
            if all(width == widths[name] or allows(name, width) for name, width in tried.items()):
                yield tried

    def _near(self, widths: Widths) -> Iterator[dict[str, int]]:
        """Yield widths of which the class can perhaps be built: those given first, if it can be of them."""
        narrower = iter((dict(widths),) if self.narrower is None else self.narrower(widths))
        yield from islice(narrower, 1)
        yield from self._rounded(widths)
        yield from narrower

    def _rounded(self, widths: Widths) -> Iterator[dict[str, int]]:
        """Yield widths, rounded down: what code asks of sizes is mostly that something divides them."""
        units = {name: unit for tie in self.ties for name, unit in tie.units.items()}
        for step in _STEPS:
            steps = {name: step * units.get(name, 1) for name in widths}
            yield {
                name: max(width // steps[name] * steps[name], min(width, steps[name])) for name, width in widths.items()
            }

    def bound(self, names: Set[str]) -> dict[str, str]:
        """Return the groups that stay as one does that they go together with, and why.

        Args:
            names: those of the groups that may change.
        """
        found: dict[str, str] = {}
        for tie in self.ties:
            other = next((name for name in tie.units if name not in names), None)
            if other is not None:
                found |= dict.fromkeys(tie.units, f"{tie.why}, and {other!r} stays")
        return found

    def told(self) -> dict[str, Any]:
        """Return it as plain data, for the notes of a plan."""
        return {
            "keeps_eps": self.entries is not None,
            "ties": [{"units": dict(tie.units), "why": tie.why} for tie in self.ties],
            "staying": dict(self.staying),
            "entries": self.entries,
        }


def kind_of(name: str) -> str:
    """Return a group's name without the numbers of layers."""
    return re.sub(r"\d+(?=\.)|(?<=\.)\d+", "*", name)
