"""What a graph carries in its `meta`, and how that survives pickling and copying."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxwidth.errors import FxwidthError
from fxwidth.serialization.graph_pickling import pickle_as_data
from fxwidth.serialization.graph_record import Fingerprint

INPUTS, VALUES, AXES, HISTORY = "fxwidth_inputs", "fxwidth_values", "fxwidth_axes", "fxwidth_history"
FREE_OUTPUTS = "fxwidth_free_outputs"
EXAMPLES, UNTIED, ORIGINAL, CALL = "fxwidth_examples", "fxwidth_untied", "fxwidth_original", "fxwidth_call"
REBUILT = "fxwidth_rebuilt"
"""By which passes nodes of a graph were changed, so that tracing its model anew does not give it."""
NOTES = (INPUTS, EXAMPLES, VALUES, AXES, HISTORY, UNTIED, ORIGINAL, CALL, FREE_OUTPUTS, REBUILT)
GROUPS, PLAN, PLAN_NOTES = "fxwidth_groups", "fxwidth_plan", "fxwidth_plan_notes"
RESIZED_FROM, VERIFIED, REPORT = "fxwidth_resized_from", "fxwidth_verified", "fxwidth_report"
OF_PASSES = (GROUPS, PLAN, PLAN_NOTES, RESIZED_FROM, VERIFIED, REPORT)
"""What passes leave for those after them: it tells of a graph as it is, and goes with every change of it."""


class InMemory(tuple[Any, ...]):
    """Samples of the user's own inputs: they stay with a graph and its copies, and are written to no file."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what pickle writes in their place: none."""
        return InMemory, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> InMemory:
        """Return themselves: they are not written to."""
        return self


def notes_of(module: fx.GraphModule) -> dict[str, Any]:
    """Return the `meta` of a graph, which from now on is pickled and copied with it."""
    pickle_as_data(module)
    return module.meta


def note_original(module: fx.GraphModule) -> None:
    """Note what a graph is before its first change, if that is not known yet and nothing has changed."""
    notes = notes_of(module)
    if not {ORIGINAL, HISTORY, UNTIED} & notes.keys():
        notes[ORIGINAL] = Fingerprint.of(module).data()


def drop_notes_of_passes(notes: dict[str, Any]) -> None:
    """Take out what passes have noted of a graph that has changed since."""
    for name in OF_PASSES:
        notes.pop(name, None)


def refuse_groups_of_one(module: fx.GraphModule, call: str) -> None:
    """Check that the nodes of a graph may be changed.

    Args:
        module: the graph.
        call: what would change them, as users call it.

    Raises:
        FxwidthError: a group has been given width one.
    """
    known = notes_of(module).get(AXES)
    if known is not None:
        raise FxwidthError(
            f"{', '.join(map(repr, known.narrow))} of width one: only the record of the graph as it is tells where the "
            f"channels of such a group are. Call {call} before a group is given width one."
        )
