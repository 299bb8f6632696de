"""The pass that gives streams joined only by copies of channels widths of their own."""

from __future__ import annotations

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from fxwidth.passes.conditions import OF_THE_GRAPH, SHAPES
from fxwidth.passes.width_pass import WidthPass
from fxwidth.untying.untie_copies import untie_copies


class UntieCopies(WidthPass):
    """Rewrites copies of channels as tables that follow a resize, as `fxwidth.untie_copies` does.

    Example:
        >>> class Tiled(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b, self.c = torch.nn.Linear(4, 6), torch.nn.Linear(6, 12), torch.nn.Linear(12, 2)
        ...     def forward(self, x):
        ...         x = self.a(x)
        ...         return self.c(self.b(x) + x.repeat(1, 2))
        >>> gm = fxwidth.trace(Tiled(), torch.randn(2, 4))
        >>> fxwidth.passes.UntieCopies()(gm).modified
        True
        >>> fxwidth.passes.UntieCopies()(gm).modified
        False
    """

    needs = (SHAPES,)
    spoils = OF_THE_GRAPH

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite a graph in place.

        Args:
            graph_module: the graph.

        Raises:
            FxwidthError: the graph cannot be analysed; nothing has changed.
        """
        before = graph_module.graph
        untie_copies(graph_module)
        return PassResult(graph_module, graph_module.graph is not before)
