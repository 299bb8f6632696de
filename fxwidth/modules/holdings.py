"""What a module can hold: groups that its code or its configuration has one number for, and sizes that stay."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any


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
        settle: makes widths by group name somewhat smaller where the class cannot be built of them, as where a number
            of heads must divide another size.
    """

    ties: list[Tie] = field(default_factory=list)
    staying: dict[str, str] = field(default_factory=dict)
    entries: list[str] | None = None
    settle: Callable[[Mapping[str, int]], dict[str, int]] = dict

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
