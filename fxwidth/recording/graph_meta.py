"""What a graph carries in its `meta`, and how that survives pickling and copying."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxwidth.serialization.graph_pickling import pickle_as_data

INPUTS, VALUES, AXES, HISTORY = "fxwidth_inputs", "fxwidth_values", "fxwidth_axes", "fxwidth_history"
EXAMPLES = "fxwidth_examples"
NOTES = (INPUTS, EXAMPLES, VALUES, AXES, HISTORY)
# Where torch unpickles a GraphModule, it gets a new `meta`, and keeps the attributes that torch does not know.
_CARRIED = "_fxwidth_notes"


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
    """Return the `meta` of a graph, with the notes in it that were lost when the graph was pickled."""
    carried = module.__dict__.get(_CARRIED)
    if carried is not module.meta:
        if carried is not None:
            module.meta |= {key: carried[key] for key in NOTES if key in carried and key not in module.meta}
        _carry(module)
    return module.meta


def _carry(module: fx.GraphModule) -> None:
    """Have a graph pickled and copied as it is, its `meta` also under a name that any unpickling keeps."""
    module.__dict__[_CARRIED] = module.meta
    pickle_as_data(module)
    if _carry not in module._deepcopy_hooks:
        module._deepcopy_hooks.append(_carry)
