"""The pass that carries a plan out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Unpack

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxwidth.errors import FxwidthError
from fxwidth.option_keywords import ResizeKeywords
from fxwidth.options import ResizeOptions, options_from, tells_options
from fxwidth.passes.plan_widths import PLAN, PLAN_NOTES
from fxwidth.plans import Plan
from fxwidth.resizing.resize import resize_with
from fxwidth.rewriting.optimizers import Optimizers


class ResizeWidths(PassBase):
    """Resizes a graph by a given plan, or by the one that `PlanWidths` has left in `gm.meta["fxwidth_plan"]`.

    Args:
        plan: as for `fxwidth.resize`; None for the one in `gm.meta`.
        options: those of `fxwidth.resize`, `optimizer` among them.

    Raises:
        FxwidthError: the plan names no widths or channels, or an option is none, or out of range.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> from torch.fx.passes.infra.pass_manager import PassManager
        >>> steps = [fxwidth.passes.PlanWidths(params=0.5), fxwidth.passes.ResizeWidths()]
        >>> PassManager(steps)(gm).graph_module.get_parameter("0.weight").shape
        torch.Size([7, 8])
    """

    @tells_options(ResizeOptions)
    def __init__(
        self,
        plan: Mapping[str, int | Sequence[int]] | None = None,
        *,
        optimizer: Optimizers | None = None,
        **options: Unpack[ResizeKeywords],
    ) -> None:
        super().__init__()
        self._plan = None if plan is None else Plan(plan)
        self._options = options_from(ResizeOptions, {"optimizer": optimizer, **options})

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Resize a graph in place.

        Args:
            graph_module: the graph.

        Raises:
            FxwidthError: there is no plan, or it cannot be carried out; nothing has changed.
        """
        plan = self._plan
        if plan is None and PLAN in graph_module.meta:
            plan = Plan(graph_module.meta[PLAN], graph_module.meta.get(PLAN_NOTES))
        if plan is None:
            raise FxwidthError("ResizeWidths has no plan; give it one, or run PlanWidths before it.")
        resize_with(graph_module, plan, self._options)
        # The plan was made for the old widths and does not hold any more.
        graph_module.meta.pop(PLAN, None)
        graph_module.meta.pop(PLAN_NOTES, None)
        return PassResult(graph_module, bool(plan))
