"""The pass that decides on new widths."""

from __future__ import annotations

from typing import Unpack

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from fxwidth.groups.width_graph import WidthGraph
from fxwidth.option_keywords import PlanKeywords
from fxwidth.options import PlanOptions, options_from, tells_options
from fxwidth.passes.conditions import PLANNED, SHAPES
from fxwidth.passes.width_pass import WidthPass
from fxwidth.planning.planner import plan_with_evidence
from fxwidth.recording.graph_meta import PLAN, PLAN_NOTES
from fxwidth.tracing.analyze import analyze_module


class PlanWidths(WidthPass):
    """Writes a plan, group name to new width, to `gm.meta["fxwidth_plan"]`; takes the options of `fxwidth.plan`.

    What the plan costs and is predicted to lose goes to `gm.meta["fxwidth_plan_notes"]`.

    Args:
        options: those of `fxwidth.plan`.

    Raises:
        FxwidthError: an option is none, or out of range.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> fxwidth.passes.PlanWidths(params=0.5).call(gm).graph_module.meta["fxwidth_plan"]
        {'0': 7}
    """

    needs = (SHAPES,)
    gives = (PLANNED,)
    in_place = False

    @tells_options(PlanOptions)
    def __init__(self, **options: Unpack[PlanKeywords]) -> None:
        super().__init__()
        self._options = options_from(PlanOptions, options)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Plan widths for a graph.

        Args:
            graph_module: the graph; it stays as it is but for its `meta`.

        Raises:
            FxwidthError: the graph cannot be analysed, or its budget is out of reach.
        """
        chosen, _ = plan_with_evidence(WidthGraph(analyze_module(graph_module)), self._options)
        # In one step: nothing can come between the two.
        graph_module.meta.update({PLAN: dict(chosen), PLAN_NOTES: chosen.notes})
        return PassResult(graph_module, False)
