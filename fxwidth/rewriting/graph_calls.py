"""How the model is called that a graph was traced from."""

from __future__ import annotations

import inspect

from torch import fx

from fxwidth.frontends.call_signature import UNKNOWN, Argument, Passing
from fxwidth.frontends.generated_signature import kinds_of
from fxwidth.recording.graph_meta import CALL, notes_of


def arguments_of_graph(module: fx.GraphModule) -> list[Argument]:
    """Return the arguments of a graph's model, as the example call passed them, or as the graph itself takes them."""
    noted = notes_of(module).get(CALL)
    if noted is not None:
        return [Argument(name, Passing(passing), UNKNOWN, ()) for name, passing in noted]
    kinds = kinds_of(module.graph).items()
    by_name = inspect.Parameter.KEYWORD_ONLY
    return [Argument(name, Passing.BY_NAME if k is by_name else Passing.BY_POSITION, UNKNOWN, ()) for name, k in kinds]
