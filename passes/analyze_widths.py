"""The pass that finds channel groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxwidth.groups.width_graph import WidthGraph
from fxwidth.tracing.analyze import analyze_module

GROUPS = "fxwidth_groups"


class AnalyzeWidths(PassBase):
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

    def __init__(self, example_inputs: Any = None, example_kwargs: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self._example_inputs = example_inputs
        self._example_kwargs = example_kwargs

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Analyse a graph.

        Args:
            graph_module: the graph; it stays as it is but for its `meta`.

        Raises:
            FxwidthError: no shapes are known, or the graph does not run on them.
        """
        width_graph = WidthGraph(analyze_module(graph_module, self._example_inputs, self._example_kwargs))
        graph_module.meta[GROUPS] = {
            group.name: {"width": group.width, "pinned": group.pinned} for group in width_graph.groups
        }
        return PassResult(graph_module, False)
