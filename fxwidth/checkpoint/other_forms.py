"""The forms of files, and which of them can hold a graph that one of them cannot."""

from __future__ import annotations

from torch import fx

from fxwidth.recording.graph_meta import REBUILT, notes_of

TENSORS, EXPORTED, PICKLED = ".safetensors", ".pt2", ".pt"


def other_form(gm: fx.GraphModule, refused: str = PICKLED) -> str:
    """Return how the path of a file ends that can hold a graph, where one form cannot.

    Args:
        gm: the graph; tracing its model anew does not give it where passes have changed its nodes.
        refused: the end of the path that cannot.
    """
    if not notes_of(gm).get(REBUILT):
        return TENSORS
    return EXPORTED if refused == PICKLED else PICKLED
