"""What a graph carries in its `meta`, and how that survives pickling and copying."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxwidth.serialization.graph_pickling import pickle_as_data
from fxwidth.serialization.graph_record import Fingerprint

INPUTS, VALUES, AXES, HISTORY = "fxwidth_inputs", "fxwidth_values", "fxwidth_axes", "fxwidth_history"
FREE_OUTPUTS = "fxwidth_free_outputs"
EXAMPLES, UNTIED, ORIGINAL, CALL = "fxwidth_examples", "fxwidth_untied", "fxwidth_original", "fxwidth_call"
NOTES = (INPUTS, EXAMPLES, VALUES, AXES, HISTORY, UNTIED, ORIGINAL, CALL, FREE_OUTPUTS)


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
