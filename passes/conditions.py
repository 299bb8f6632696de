"""What passes need, give and spoil: each condition can be seen on a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from fxwidth.analysis.input_specs import input_specs
from fxwidth.distributed.wrappers import wrappers_of
from fxwidth.errors import FxwidthError
from fxwidth.recording.graph_meta import GROUPS, PLAN, REPORT, RESIZED_FROM, VERIFIED, notes_of
from fxwidth.simplification.modes import evaluates


@dataclass(frozen=True)
class Condition:
    """What holds of a graph between two passes, or does not.

    Args:
        name: the condition in words, as in "a plan is left in gm.meta".
        remedy: what brings it about, as an order: "run PlanWidths before it".
        holds: a function of a graph that tells whether it does.

    Example:
        >>> small = fxwidth.passes.Condition(
        ...     "it has at most ten nodes", "trace a smaller part", lambda gm: len(gm.graph.nodes) <= 10
        ... )
        >>> small.holds(torch.fx.symbolic_trace(torch.nn.Linear(2, 3)))
        True
    """

    name: str
    remedy: str
    holds: Callable[[fx.GraphModule], bool]


def _has_note(note: str) -> Callable[[fx.GraphModule], bool]:
    return lambda gm: bool(notes_of(gm).get(note, ()) != ())


def _has_shapes(gm: fx.GraphModule) -> bool:
    try:
        input_specs(gm, None)
    except FxwidthError:
        return False
    return True


SHAPES = Condition(
    "the shapes of its inputs are known",
    "make it by fxwidth.trace(model, example_inputs), or run AnalyzeWidths(example_inputs) before it",
    _has_shapes,
)
ALONE = Condition(
    "no DistributedDataParallel is around it",
    "it works on one rank by itself, so run it on all ranks alike before the graph is wrapped, or delete the wrapper "
    "and make it again after it",
    lambda gm: not wrappers_of(gm),
)
EVALUATES = Condition("it is in eval mode", "call gm.eval() before it", evaluates)
ANALYZED = Condition("its groups are noted in gm.meta", "run AnalyzeWidths before it", _has_note(GROUPS))
PLANNED = Condition(
    "a plan is left in gm.meta",
    "run PlanWidths before it, with nothing between them that changes the graph, or give it a plan",
    _has_note(PLAN),
)
RESIZED = Condition(
    "what it was before its last resize is noted",
    "run ResizeWidths, ShrinkWidths or GrowWidths right before it",
    _has_note(RESIZED_FROM),
)
VERIFIED_WIDTHS = Condition("its last resize is verified", "run VerifyWidths before it", _has_note(VERIFIED))
REPORTED = Condition("a report is left in gm.meta", "run ReportWidths before it", _has_note(REPORT))

OF_THE_GRAPH = (ANALYZED, PLANNED, RESIZED, VERIFIED_WIDTHS, REPORTED)
"""What tells of a graph as it is: whatever changes it spoils these."""
CONDITIONS = (SHAPES, ALONE, EVALUATES, *OF_THE_GRAPH)
