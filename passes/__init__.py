"""The steps of fxwidth as `torch.fx` passes, for compile pipelines of others."""

from fxwidth.passes.analyze_widths import AnalyzeWidths
from fxwidth.passes.plan_widths import PlanWidths
from fxwidth.passes.resize_widths import ResizeWidths
from fxwidth.passes.untie_copies import UntieCopies

__all__ = ["AnalyzeWidths", "PlanWidths", "ResizeWidths", "UntieCopies"]
