"""The pass that carries a plan out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Unpack

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from fxwidth.errors import FxwidthError
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.option_keywords import ResizeKeywords
from fxwidth.options import ResizeOptions, options_from, tells_options
from fxwidth.passes.analyze_widths import note_groups
from fxwidth.passes.conditions import PLANNED, REPORTED, RESIZED, SHAPES, VERIFIED_WIDTHS, Condition
from fxwidth.passes.width_pass import WidthPass
from fxwidth.plans import Plan
from fxwidth.recording.graph_meta import (
    GROUPS,
    PLAN,
    PLAN_NOTES,
    RESIZED_FROM,
    InMemory,
    drop_notes_of_passes,
    notes_of,
)
from fxwidth.resizing.resize import Resized, resize_with
from fxwidth.rewriting.optimizers import Optimizers
from fxwidth.tracing.analyze import analyze_module


class ResizeWidths(WidthPass):
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

    gives = (RESIZED,)
    spoils: tuple[Condition, ...] = (PLANNED, VERIFIED_WIDTHS, REPORTED)

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
        self.needs = (SHAPES, PLANNED) if plan is None else (SHAPES,)

    @property
    def optimizer(self) -> Optimizers | None:
        """What trains the graph."""
        return self._options.optimizer

    @property
    def companions(self) -> tuple[nn.Module, ...]:
        """The companions that are resized with it."""
        return tuple(self._options.graphs_beside)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Resize a graph in place.

        Args:
            graph_module: the graph.

        Raises:
            FxwidthError: there is no plan, or there are two, or it cannot be carried out; nothing has changed.
        """
        plan = self._asked(graph_module)
        resized = self._resized(graph_module, plan)
        return PassResult(graph_module, resized.maps is not None)

    def _asked(self, graph_module: fx.GraphModule) -> Plan:
        left = graph_module.meta.get(PLAN)
        if left is None and self._plan is None:
            raise FxwidthError(f"{self.name} has no plan; give it one, or run PlanWidths before it.")
        if self._plan is None:
            return Plan(left, graph_module.meta.get(PLAN_NOTES))
        if left:
            raise FxwidthError(
                f"{self.name} was given a plan for {', '.join(map(repr, self._plan)) or 'no group'}, and another one "
                f"is left in gm.meta[{PLAN!r}], for {', '.join(map(repr, left))}, which would be dropped. Leave out "
                f"plan=, or PlanWidths before it, or delete gm.meta[{PLAN!r}]."
            )
        return self._plan

    def _resized(self, graph_module: fx.GraphModule, plan: Plan) -> Resized:
        """Carry a plan out, and note what VerifyWidths asks for."""
        has_groups = GROUPS in notes_of(graph_module)
        resized = resize_with(graph_module, plan, self._options)
        notes = notes_of(graph_module)
        # The plan was made for the old widths and does not hold any more.
        drop_notes_of_passes(notes)
        if has_groups:
            note_groups(WidthGraph(analyze_module(graph_module)))
        notes[RESIZED_FROM] = _without_values(resized)
        return resized


def _without_values(resized: Resized) -> InMemory:
    """Return the tape of before and what has become of its dims, without the old parameters, which are to go."""
    analysis = resized.width_graph.analysis
    entries = {
        name: replace(entry, tensor=torch.empty_like(entry.tensor, device="meta"))
        for name, entry in analysis.parameters.items()
    }
    return InMemory((replace(analysis, parameters=entries, memo={}, seen=None), resized.maps))
