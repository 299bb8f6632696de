"""The pass that carries out what a plan shrinks."""

from __future__ import annotations

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from fxwidth.errors import FxwidthError
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.passes.conditions import REPORTED, VERIFIED_WIDTHS
from fxwidth.passes.resize_widths import ResizeWidths
from fxwidth.plans import Plan
from fxwidth.recording.graph_meta import PLAN, PLAN_NOTES, notes_of
from fxwidth.tracing.analyze import analyze_module


class ShrinkWidths(ResizeWidths):
    """Carries out what a plan shrinks; what the plan of `PlanWidths` grows is left in `gm.meta` for `GrowWidths`.

    Args:
        plan: as for `ResizeWidths`; one that grows a group is refused.
        options: those of `ResizeWidths`.

    Raises:
        FxwidthError: as of `ResizeWidths`.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8), torch.nn.ReLU())
        >>> gm = fxwidth.trace(net.append(torch.nn.Linear(8, 4)), torch.randn(2, 8))
        >>> gm.meta["fxwidth_plan"] = {"0": 12, "2": 10}
        >>> gm = fxwidth.passes.ShrinkWidths()(gm).graph_module
        >>> tuple(gm.get_parameter("2.weight").shape), gm.meta["fxwidth_plan"]
        ((8, 12), {'2': 10})
    """

    spoils = (VERIFIED_WIDTHS, REPORTED)
    grows = False

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Resize a graph in place.

        Args:
            graph_module: the graph.

        Raises:
            FxwidthError: there is no plan, or there are two, or it cannot be carried out; nothing has changed.
        """
        plan, width_graph = self._asked(graph_module), WidthGraph(analyze_module(graph_module))
        growing = [name for name, width in plan.widths.items() if width > width_graph[name].width]
        own = [name for name in plan if (name in growing) == self.grows]
        others = [name for name in plan if name not in own and plan.widths[name] != width_graph[name].width]
        rest = Plan({name: plan[name] for name in others})
        if rest and self._plan is not None:
            name = next(iter(rest))
            raise FxwidthError(
                f"{self.name} was given a plan that brings group {name!r} from {width_graph[name].width} to "
                f"{rest.widths[name]}; leave it out, or run ResizeWidths, which does both."
            )
        resized = self._resized(graph_module, Plan({name: plan[name] for name in own}, plan.notes))
        if self._plan is None:
            notes_of(graph_module).update({PLAN: dict(rest), PLAN_NOTES: plan.notes})
        return PassResult(graph_module, resized.maps is not None)
