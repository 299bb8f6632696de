"""Plans: which channel group gets which width, as plain data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from fxwidth.errors import FxwidthError


class Plan(Mapping[str, int]):
    """New widths by group name; groups that are not named stay as they are.

    Args:
        widths: group name -> new width.
        notes: anything worth keeping beside it, such as the predicted parameter count; it does not change what is done.

    Raises:
        FxwidthError: a width is no positive integer.

    Example:
        >>> fxwidth.Plan({"conv1": 12}, notes={"why": "by hand"})
        Plan({'conv1': 12})
    """

    def __init__(self, widths: Mapping[str, int] | None = None, notes: Mapping[str, Any] | None = None) -> None:
        if not isinstance(widths or {}, Mapping):
            raise FxwidthError(f"a plan is made from a dict of group names and widths, but received {widths!r}.")
        self._widths = {name: _checked(name, width) for name, width in (widths or {}).items()}
        self.notes: dict[str, Any] = dict(notes or {})

    def __getitem__(self, name: str) -> int:
        return self._widths[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._widths)

    def __len__(self) -> int:
        return len(self._widths)

    def __eq__(self, other: object) -> bool:
        return dict(self) == dict(other) if isinstance(other, Mapping) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Plan({self._widths!r})"

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        return json.dumps({"widths": self._widths, "notes": self.notes}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return the plan that `to_json` wrote, or one written by hand as {group name: width}.

        Raises:
            FxwidthError: the text is no such JSON, or a width is no positive integer.
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


def _checked(name: Any, width: Any) -> int:
    if not isinstance(name, str):
        raise FxwidthError(f"a plan names groups by strings, but received {name!r}.")
    if isinstance(width, bool) or not hasattr(width, "__index__") or int(width) < 1:
        raise FxwidthError(f"the plan gives group {name!r} the width {width!r}; a width is an integer of at least 1.")
    return int(width)
