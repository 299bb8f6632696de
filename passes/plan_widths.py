"""The pass that decides on new widths."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxwidth.groups.width_graph import WidthGraph
from fxwidth.planning.planner import check_options, plan
from fxwidth.tracing import analyze_module

PLAN = "fxwidth_plan"
PLAN_NOTES = "fxwidth_plan_notes"


class PlanWidths(PassBase):
    """Writes a plan, group name to new width, to `gm.meta["fxwidth_plan"]`; takes the options of `fxwidth.plan`.

    What the plan costs and is predicted to lose goes to `gm.meta["fxwidth_plan_notes"]`.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> fxwidth.passes.PlanWidths(params=0.5).call(gm).graph_module.meta["fxwidth_plan"]
        {'0': 7}
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        check_options(options)
        self._options = options

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Plan widths for a graph."""
        chosen = plan(WidthGraph(analyze_module(graph_module)), **self._options)
        graph_module.meta[PLAN] = dict(chosen)
        graph_module.meta[PLAN_NOTES] = chosen.notes
        return PassResult(graph_module, False)
