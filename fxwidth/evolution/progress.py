"""How far an evolution has come: plain data, which a later run can go on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fxwidth.errors import FxwidthError

_VERSION = 1


@dataclass(frozen=True)
class Progress:
    """How far an evolution has come.

    Attributes:
        first: the costs before the first event, by name.
        target: those to end at; none where thresholds decide.
        steps: how many steps were taken.
        ticks: how many steps, or epochs, were counted.
        best: the lowest loss after a breath.
        breaths_without: how many breaths ago that was.
        metric: the lowest metric of an epoch.
        epochs_without: how many epochs ago that was, or the last event.
        turns: in which direction groups went last (1 or -1), and at which event.
        history: one dict per event.
    """

    first: Mapping[str, int]
    target: Mapping[str, int]
    steps: int = 0
    ticks: int = 0
    best: float | None = None
    breaths_without: int = 0
    metric: float | None = None
    epochs_without: int = 0
    turns: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    history: tuple[dict[str, Any], ...] = ()

    @property
    def event(self) -> int:
        """The number of the next event, from one."""
        return len(self.history) + 1

    def state_dict(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return {"version": _VERSION, **asdict(self)}

    def following(self, state: Any) -> Progress:
        """Return that which a state tells of, for an evolution to the same kinds of costs.

        Raises:
            FxwidthError: it is no such state, or of another version or other costs.
        """
        names = [one.name for one in fields(self)]
        if not isinstance(state, Mapping) or state.keys() != {"version", *names}:
            form = f"a dict with {_listed(state)}" if isinstance(state, Mapping) else type(state).__name__
            raise FxwidthError(f"the progress of an Evolver is what its state_dict holds of it, but received {form}.")
        if state["version"] != _VERSION:
            raise FxwidthError(f"the state is of version {state['version']}, and this is version {_VERSION}.")
        if state["target"].keys() != self.target.keys():
            raise FxwidthError(
                f"the state goes to a target of {_listed(state['target'])}, and this Evolver to one of "
                f"{_listed(self.target)}; make it with the same options."
            )
        values = {name: state[name] for name in names}
        values["turns"] = {name: (direction, event) for name, (direction, event) in state["turns"].items()}
        values["history"] = tuple(dict(record) for record in state["history"])
        return Progress(**values)


def _listed(mapping: Mapping[str, Any]) -> str:
    return ", ".join(map(str, mapping)) or "nothing"
