"""What modules keep beside tensors, by `get_extra_state`, in a file and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx

from fxwidth.checkpoint.training_state import tensor_beside
from fxwidth.rewriting.originals import original_of
from fxwidth.serialization.plain_trees import TensorsBeside, decoded, encoded

_STATES, _KEY = "extra_states", "_extra_state"


def extra_state_of(gm: fx.GraphModule, beside: TensorsBeside) -> dict[str, Any]:
    """Return the extra state of a graph's modules, by its names in the state dict, as JSON can hold it.

    Raises:
        FxwidthError: it is of a kind that plain data cannot hold, which is named.
    """
    found = {name: value for name, value in gm.state_dict().items() if name.rpartition(".")[2] == _KEY}
    return {_STATES: {name: encoded(value, name, beside.leaf) for name, value in found.items()}} if found else {}


def put_extra_state(gm: fx.GraphModule, state: Mapping[str, Any], tensor: Callable[[str], Tensor]) -> None:
    """Give the modules of a graph, and those of a model that goes along, the extra state of a file.

    Args:
        gm: the graph.
        state: what the file holds beside tensors.
        tensor: returns the tensors beside, by name.
    """
    for module in (gm, original_of(gm)) if state.get(_STATES) else ():
        if module is not None:
            # Each gets values of its own.
            found = {
                name: decoded(data, lambda kind, content: tensor_beside(kind, content, tensor))
                for name, data in state[_STATES].items()
            }
            module.load_state_dict(found, strict=False)
