"""The steps of fxwidth as `torch.fx` passes, for compile pipelines of others."""

from fxwidth.passes.analyze_widths import AnalyzeWidths
from fxwidth.passes.change_basis import ChangeBasis
from fxwidth.passes.clean_up import CleanUp
from fxwidth.passes.conditions import Condition
from fxwidth.passes.factorize_linear import FactorizeLinear
from fxwidth.passes.fold_batch_norm import FoldBatchNorm
from fxwidth.passes.grow_widths import GrowWidths
from fxwidth.passes.pipeline import Pipeline
from fxwidth.passes.plan_widths import PlanWidths
from fxwidth.passes.recalibrate_batch_norm import RecalibrateBatchNorm
from fxwidth.passes.report_widths import ReportWidths
from fxwidth.passes.resize_widths import ResizeWidths
from fxwidth.passes.shrink_widths import ShrinkWidths
from fxwidth.passes.untie_copies import UntieCopies
from fxwidth.passes.verify_widths import VerifyWidths
from fxwidth.passes.width_pass import WidthPass

__all__ = [
    "AnalyzeWidths",
    "ChangeBasis",
    "CleanUp",
    "Condition",
    "FactorizeLinear",
    "FoldBatchNorm",
    "GrowWidths",
    "Pipeline",
    "PlanWidths",
    "RecalibrateBatchNorm",
    "ReportWidths",
    "ResizeWidths",
    "ShrinkWidths",
    "UntieCopies",
    "VerifyWidths",
    "WidthPass",
]
