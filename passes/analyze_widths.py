"""The pass that finds channel groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from fxwidth.groups.width_graph import WidthGraph
from fxwidth.passes.conditions import ANALYZED, SHAPES
from fxwidth.passes.width_pass import WidthPass
from fxwidth.recording.graph_meta import GROUPS, notes_of
from fxwidth.tracing.analyze import analyze_module


class AnalyzeWidths(WidthPass):
    """Writes the channel groups of a graph, as plain data, to `gm.meta["fxwidth_groups"]`; the graph stays.

    Args:
        example_inputs: as for `fxwidth.analyze`; needless when the graph carries shapes.
        example_kwargs: arguments by name, beside positional ones in `example_inputs`.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> sorted(fxwidth.passes.AnalyzeWidths().call(gm).graph_module.meta["fxwidth_groups"])
        ['0', '0:1', '2']
    """

    gives = (SHAPES, ANALYZED)
    in_place = False

    def __init__(self, example_inputs: Any = None, example_kwargs: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self._example_inputs = example_inputs
        self._example_kwargs = example_kwargs
        self.needs = (SHAPES,) if example_inputs is None and example_kwargs is None else ()

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Analyse a graph.

        Args:
            graph_module: the graph; it stays as it is but for its `meta`.

        Raises:
            FxwidthError: no shapes are known, or the graph does not run on them.
        """
        note_groups(WidthGraph(analyze_module(graph_module, self._example_inputs, self._example_kwargs)))
        return PassResult(graph_module, False)


def note_groups(width_graph: WidthGraph) -> None:
    """Write groups to the `meta` of their graph."""
    groups = {group.name: {"width": group.width, "pinned": group.pinned} for group in width_graph.groups}
    notes_of(width_graph.analysis.module)[GROUPS] = groups
