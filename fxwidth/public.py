"""The public names, each from where it is; importing this fills the tables of rules, costs and directions."""

from __future__ import annotations

from fxwidth import rules  # noqa: F401  (fills the table of op rules)
from fxwidth.axes.polynomials import Polynomial
from fxwidth.budget_frontier import Frontier, frontier
from fxwidth.checkpoint.loading import load
from fxwidth.checkpoint.saving import save
from fxwidth.compilation.backend import compile_backend
from fxwidth.compilation.compiled_graph import CompiledGraph, compile  # noqa: A004 - as torch.compile
from fxwidth.costs.budget import Budget
from fxwidth.costs.layers import LayerCosts, cost
from fxwidth.costs.registry import cost_polynomial
from fxwidth.errors import FxwidthError, FxwidthWarning
from fxwidth.evolution.evolve import evolve
from fxwidth.evolution.evolver import Evolver
from fxwidth.group_spectra import GroupSpectrum, Spectra, spectrum
from fxwidth.groups.channel_group import ChannelGroup, Site
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.growth import informed_directions  # noqa: F401  (fills the table of directions)
from fxwidth.growth.directions import TaskMoments, growth_direction
from fxwidth.modules.write_back import write_back
from fxwidth.penalties.growing_penalty import GrowingPenalty
from fxwidth.penalties.spectral_penalty import spectral_penalty
from fxwidth.planning.planner import Plan, plan
from fxwidth.reporting import Report, report
from fxwidth.resizing import plain_copies  # noqa: F401  (gives measured budgets their copies)
from fxwidth.resizing.optimizer_state import Replacement, optimizer_state_rule
from fxwidth.resizing.resize import resize
from fxwidth.selection.registry import selection_method
from fxwidth.tracing.analyze import analyze
from fxwidth.tracing.trace import trace
from fxwidth.untying.untie_copies import untie_copies
from fxwidth.work_progress import ProgressUpdate

__all__ = [
    "Budget",
    "ChannelGroup",
    "CompiledGraph",
    "Evolver",
    "Frontier",
    "FxwidthError",
    "FxwidthWarning",
    "GroupSpectrum",
    "GrowingPenalty",
    "LayerCosts",
    "Plan",
    "Polynomial",
    "ProgressUpdate",
    "Replacement",
    "Report",
    "Site",
    "Spectra",
    "TaskMoments",
    "WidthGraph",
    "analyze",
    "compile",
    "compile_backend",
    "cost",
    "cost_polynomial",
    "evolve",
    "frontier",
    "growth_direction",
    "load",
    "optimizer_state_rule",
    "plan",
    "report",
    "resize",
    "save",
    "selection_method",
    "spectral_penalty",
    "spectrum",
    "trace",
    "untie_copies",
    "write_back",
]
