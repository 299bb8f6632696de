"""What a graph carries in its `meta`, and how that survives pickling and copying."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxwidth.serialization.graph_pickling import pickle_as_data

INPUTS, VALUES, AXES, HISTORY = "fxwidth_inputs", "fxwidth_values", "fxwidth_axes", "fxwidth_history"
NOTES = (INPUTS, VALUES, AXES, HISTORY)
# Where torch unpickles a GraphModule, it gets a new `meta`, and keeps the attributes that torch does not know.
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
    """Have a graph pickled and copied as it is, its `meta` also under a name that any unpickling keeps."""
    module.__dict__[_CARRIED] = module.meta
    pickle_as_data(module)
    if _carry not in module._deepcopy_hooks:
        module._deepcopy_hooks.append(_carry)
