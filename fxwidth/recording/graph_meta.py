"""What a graph carries in its `meta`, and how that survives pickling and copying."""

from __future__ import annotations

from typing import Any

from torch import fx

INPUTS, VALUES, AXES, HISTORY = "fxwidth_inputs", "fxwidth_values", "fxwidth_axes", "fxwidth_history"
EXAMPLES = "fxwidth_examples"
NOTES = (INPUTS, EXAMPLES, VALUES, AXES, HISTORY)
# Unpickling a GraphModule gives it a new `meta`, and leaves attributes that it does not know where they are.
_CARRIED = "_fxwidth_notes"


def notes_of(module: fx.GraphModule) -> dict[str, Any]:
    """Return the `meta` of a graph, with the notes in it that were lost when the graph was pickled."""
    carried = module.__dict__.get(_CARRIED)
    if carried is not module.meta:
        if carried is not None:
            module.meta |= {key: carried[key] for key in NOTES if key in carried and key not in module.meta}
        _carry(module)
    return module.meta


def _carry(module: fx.GraphModule) -> None:
    """Have a graph's `meta` pickled under a name that unpickling keeps, and the same done to copies of the graph."""
    module.__dict__[_CARRIED] = module.meta
    if _carry not in module._deepcopy_hooks:
        module._deepcopy_hooks.append(_carry)
