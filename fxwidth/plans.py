"""Plans: which channel group gets which width, or which of its channels it keeps, as plain data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from fxwidth.errors import FxwidthError
from fxwidth.plain_numbers import is_integer, plain_number
from fxwidth.tables import Table

Entry = int | tuple[int, ...]
# The note that tells what a module can hold for which a plan was made.
FOR_MODULE = "for_module"
# The note that tells the widths that groups had when a plan was made.
BEFORE = "before"
# The note that tells the times that `Budget(measure=)` has measured, in microseconds.
MEASURED = "measured"
# How many channels an error lists.
_SHOWN = 12


class Plan(Mapping[str, Entry]):
    """New widths, or the channels to keep, by group name; groups that are not named stay as they are.

    Args:
        widths: group name -> new width, or the channels that are kept, in any sequence: their positions of now, from 0,
            ascending, as in `Plan({"conv1": 24, "conv2": [0, 2, 5]})`.
        notes: anything worth keeping beside it, such as the predicted parameter count; by default those of `widths`
            where that is a plan itself. They do not change what is done, but for `"for_module"`, by which a resize
            leaves alone what the module for which a plan was made has one number for, such as the eps of norms.

    Attributes:
        widths: group name -> new width.
        channels: group name -> the channels that are kept, of the groups for which they are named.

    Raises:
        FxwidthError: a width is no positive integer, or channels are not ascending from 0, each once.

    Example:
        >>> fxwidth.Plan({"conv1": 12, "conv2": [0, 2, 5]}, notes={"why": "by hand"})
        Plan({'conv1': 12, 'conv2': (0, 2, 5)})
        >>> fxwidth.Plan({"conv2": [0, 2, 5]}).widths
        {'conv2': 3}
    """

    def __init__(
        self, widths: Mapping[str, int | Sequence[int]] | None = None, notes: Mapping[str, Any] | None = None
    ) -> None:
        if not isinstance(widths or {}, Mapping):
            raise FxwidthError(f"a plan is made from a dict of group names and widths, but received {widths!r}.")
        self._entries: dict[str, Entry] = {name: _checked(name, entry) for name, entry in (widths or {}).items()}
        if notes is None and isinstance(widths, Plan):
            notes = widths.notes
        self.notes: dict[str, Any] = dict(notes or {})

    @property
    def widths(self) -> dict[str, int]:
        """The new width of each group."""
        return {name: len(entry) if isinstance(entry, tuple) else entry for name, entry in self._entries.items()}

    @property
    def channels(self) -> dict[str, tuple[int, ...]]:
        """The channels that are kept, of the groups for which they are named."""
        return {name: entry for name, entry in self._entries.items() if isinstance(entry, tuple)}

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        entries = {name: tuple(entry) if isinstance(entry, list) else entry for name, entry in other.items()}
        return self._entries == entries

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Plan({self._entries!r})"

    def __str__(self) -> str:
        """Return a table of the widths before and after, and below it what they cost and lose, as far as is known."""
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def table(self) -> Table:
        """Return a table of the widths before and after, with what they cost and lose below it."""
        before = self.notes.get(BEFORE) or {}
        errors = self.notes.get("errors") or {}
        rows = [
            (name, str(before.get(name, "")), str(width), _percent(before.get(name), width), _error(errors.get(name)))
            for name, width in self.widths.items()
        ]
        above = () if rows else ("no width changes",)
        return Table(("group", "before", "after", "share", "error"), tuple(rows), above, tuple(self._told()))

    def _told(self) -> Iterator[str]:
        for name, (old, new) in (self.notes.get("cost") or {}).items():
            share = f" ({new / old:.1%})" if old else ""
            yield f"{name}: {old:,.0f} -> {new:,.0f}{share}"
        if times := self.notes.get(MEASURED):
            present, planned, limit = (times[name] for name in ("present", "planned", "limit"))
            yield f"measured latency: {present:,.0f} -> {planned:,.0f} of {limit:,.0f} allowed"
        if self.notes.get("errors"):
            source = self.notes.get("evidence")
            yield f"predicted error: {self.notes['error']:.4g}" + (f", from {source}" if source else "")

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        return json.dumps({"widths": self._entries, "notes": self.notes}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return the plan that `to_json` wrote, or one written by hand as {group name: width or channels}.

        Raises:
            FxwidthError: the text is no such JSON, or what it says is no plan.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise FxwidthError(f"this is no JSON: {error}. A plan is written by Plan.to_json().") from error
        if not isinstance(data, dict):
            raise FxwidthError(f"a plan in JSON is an object of group names and widths, but received {data!r}.")
        if isinstance(data.get("widths"), dict):
            return cls(data["widths"], data.get("notes"))
        return cls(data)


def _percent(before: Any, after: int) -> str:
    return f"{after / before:.0%}" if before else ""


def _error(error: Any) -> str:
    return "" if error is None else f"{error:.3g}"


def _checked(name: Any, entry: Any) -> Entry:
    if not isinstance(name, str):
        raise FxwidthError(f"a plan names groups by strings, but received {name!r}.")
    # Arrays and tensors give their numbers as Python has them.
    plain = entry.tolist() if hasattr(entry, "tolist") else plain_number(entry)
    if isinstance(plain, Sequence) and not isinstance(plain, (str, bytes)):
        return _channels(name, plain)
    if not is_integer(plain) or plain < 1:
        raise FxwidthError(f"the plan gives group {name!r} the width {entry!r}; a width is an integer of at least 1.")
    return int(plain)


def _channels(name: str, given: Sequence[Any]) -> tuple[int, ...]:
    plain = list(map(plain_number, given))
    odd = [one for one in plain if not is_integer(one) or one < 0]
    channels = [] if odd else plain
    if odd:
        fault = f"{odd[0]!r} is none: a channel is an integer from 0"
    elif not channels:
        fault = "at least one channel stays"
    elif any(later <= one for one, later in pairwise(channels)):
        fault = "they must be ascending, each once"
    else:
        return tuple(channels)
    shown = repr(plain) if len(plain) <= _SHOWN else f"[{', '.join(map(repr, plain[:_SHOWN]))}, ...]"
    raise FxwidthError(
        f"the plan keeps of group {name!r} the channels {shown}, but {fault}. Give those that stay by their "
        "positions of now, such as [0, 2, 5]; a group grows by a width."
    )
