"""fxwidth: the width compiler for PyTorch."""

from __future__ import annotations

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
from fxwidth.tracing import analyze, trace

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
