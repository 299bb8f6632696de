"""The channel groups of a graph in training: found once, and again when it has been resized or changed."""

from __future__ import annotations

from torch import fx

from fxwidth.errors import FxwidthError
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.tracing.analyze import analyze

_NAME = "_fxwidth_groups"


def known_groups(gm: object) -> WidthGraph:
    """Return the channel groups of a graph as it is now.

    They are kept with its `fx.Graph`: neither copies nor files take that attribute along, and groups, which refer to
    their module, live no longer than it.

    Raises:
        FxwidthError: it is no graph, or cannot be analysed.
    """
    if not isinstance(gm, fx.GraphModule):
        raise FxwidthError(_no_graph(gm))
    known: WidthGraph | None = vars(gm.graph).get(_NAME)
    if known is None or known.analysis.module is not gm or known.outdated is not None:
        known = analyze(gm, progress=False)
        setattr(gm.graph, _NAME, known)
    return known


def _no_graph(given: object) -> str:
    received = f"penalties are of the groups of a torch.fx.GraphModule, but received {type(given).__name__}"
    # Wrappers of compiled and of parallel training hold the graph.
    for name in ("_orig_mod", "module"):
        if isinstance(getattr(given, name, None), fx.GraphModule):
            return f"{received}; pass the graph in it, its attribute {name}."
    return f"{received}; pass what fxwidth.trace returns."
