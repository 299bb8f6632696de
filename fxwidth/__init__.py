"""fxwidth: the width compiler for PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from fxwidth import rules  # noqa: F401  (fills the table of op rules)
from fxwidth.checkpoint import load, save
from fxwidth.costs.budget import Budget
from fxwidth.errors import FxwidthError, FxwidthWarning
from fxwidth.evolution import Evolver, evolve
from fxwidth.group_spectra import GroupSpectrum, spectrum
from fxwidth.groups.channel_group import ChannelGroup, Site
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.planning.planner import Plan, plan
from fxwidth.reporting import Report, report
from fxwidth.resizing.optimizer_state import Replacement, optimizer_state_rule
from fxwidth.resizing.resize import resize
from fxwidth.tracing import analyze_module, trace

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "ChannelGroup",
    "Evolver",
    "FxwidthError",
    "FxwidthWarning",
    "GroupSpectrum",
    "Plan",
    "Replacement",
    "Report",
    "Site",
    "WidthGraph",
    "analyze",
    "evolve",
    "load",
    "optimizer_state_rule",
    "plan",
    "report",
    "resize",
    "save",
    "spectrum",
    "trace",
]


def analyze(
    gm: fx.GraphModule, example_inputs: Any = None, example_kwargs: Mapping[str, Any] | None = None
) -> WidthGraph:
    """Find the channel groups of a graph: what can be resized, what is coupled with what, what is pinned and why.

    Args:
        gm: a graph from `fxwidth.trace`, or any GraphModule.
        example_inputs: as for `fxwidth.trace`; needless when the graph carries shapes.
        example_kwargs: arguments by name, beside positional ones in `example_inputs`.

    Raises:
        FxwidthError: no shapes are known, or the graph does not run on them.
    """
    return WidthGraph(analyze_module(gm, example_inputs, example_kwargs))
