"""The pass that carries a plan out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.optim import Optimizer

from fxwidth.errors import FxwidthError
from fxwidth.passes.plan_widths import PLAN, PLAN_NOTES
from fxwidth.resizing.resize import resize
from fxwidth.selection.registry import check_selection


class ResizeWidths(PassBase):
    """Resizes a graph by a given plan, or by the one that `PlanWidths` has left in `gm.meta["fxwidth_plan"]`.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> from torch.fx.passes.infra.pass_manager import PassManager
        >>> steps = [fxwidth.passes.PlanWidths(params=0.5), fxwidth.passes.ResizeWidths()]
        >>> PassManager(steps)(gm).graph_module.get_parameter("0.weight").shape
        torch.Size([7, 8])
    """

    def __init__(
        self,
        plan: Mapping[str, int] | None = None,
        *,
        optimizer: Optimizer | None = None,
        data: Iterable[Any] | None = None,
        selection: str = "greedy",
        recalibrate: bool | None = None,
        rotate: bool = True,
        fold: bool = True,
        exact: bool = True,
    ) -> None:
        super().__init__()
        self._plan = plan
        self._optimizer = optimizer
        self._data = data
        self._selection = check_selection(selection)
        self._recalibrate = recalibrate
        self._rotate = rotate
        self._fold = fold
        self._exact = exact

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Resize a graph in place."""
        widths = self._plan if self._plan is not None else graph_module.meta.get(PLAN)
        if widths is None:
            raise FxwidthError("ResizeWidths has no plan; give it one, or run PlanWidths before it.")
        resize(
            graph_module,
            widths,
            optimizer=self._optimizer,
            data=self._data,
            selection=self._selection,
            recalibrate=self._recalibrate,
            rotate=self._rotate,
            fold=self._fold,
            exact=self._exact,
        )
        # The plan was made for the old widths and does not hold any more.
        graph_module.meta.pop(PLAN, None)
        graph_module.meta.pop(PLAN_NOTES, None)
        return PassResult(graph_module, bool(widths))
