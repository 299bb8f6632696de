"""Passes one after the other, in an order that works, as a whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxwidth.errors import FxwidthError
from fxwidth.frontends.untraceable import refuse_sharded
from fxwidth.passes.any_changes import keep_all
from fxwidth.passes.conditions import CONDITIONS, Condition
from fxwidth.passes.pass_order import Step, ordered
from fxwidth.passes.width_pass import WidthPass, pass_transaction
from fxwidth.rewriting.transaction import Transaction
from fxwidth.tracing.analyze import refuse_other_than_graph


class Pipeline(PassBase):
    """Runs passes one after the other, as one transaction: after an error or Ctrl-C in any of them nothing has changed.

    The passes run in the given order where each finds there what it needs, else in the first order that works; where
    there is none, the missing pass is told, before anything is run. Passes that do not say what they need, as any
    function from a graph to a `PassResult`, a graph or None (for one that works in place), keep their places; what they
    do to the graph, its modules, tensors and `meta`, and to the optimizers of the other passes, is taken back too.

    Args:
        steps: passes of fxwidth and others, among them other pipelines.

    Raises:
        FxwidthError: there are none, or one cannot be called.

    Example:
        >>> from fxwidth.passes import Pipeline, PlanWidths, ReportWidths, ResizeWidths
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> result = Pipeline(ResizeWidths(), PlanWidths(params=0.5), ReportWidths())(gm)
        >>> result.modified, result.graph_module.meta["fxwidth_report"]["parameters"]
        (True, 95)
    """

    def __init__(self, *steps: Step) -> None:
        super().__init__()
        odd = next((step for step in steps if not callable(step) or isinstance(step, type)), None)
        if odd is not None or not steps:
            received = "none" if odd is None else repr(odd)
            raise FxwidthError(f"Pipeline takes passes and functions of a graph, but received {received}.")
        self.steps = steps

    def order(self, graph_module: fx.GraphModule) -> tuple[Step, ...]:
        """Return the steps in the order in which they would run on a graph.

        Args:
            graph_module: the graph.

        Raises:
            FxwidthError: in no order does each find what it needs.
        """
        conditions = dict.fromkeys(
            [*CONDITIONS, *(need for step in self.steps if isinstance(step, WidthPass) for need in step.needs)]
        )
        known: frozenset[Condition] = frozenset(one for one in conditions if one.holds(graph_module))
        return tuple(ordered(self.steps, known))

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Run all steps.

        Args:
            graph_module: the graph.

        Raises:
            FxwidthError: there is no order that works, or a pass fails; nothing has changed.
        """
        refuse_other_than_graph(graph_module, "Pipeline")
        refuse_sharded(graph_module)
        order = self.order(graph_module)
        transaction = pass_transaction(order, graph_module)
        result: PassResult = transaction.run(lambda: self._run(order, graph_module, transaction))
        return result

    def _run(self, order: Sequence[Step], graph_module: fx.GraphModule, transaction: Transaction) -> PassResult:
        if any(map(_may_change_anything, order)):
            keep_all(graph_module, order, transaction)
        present, modified = graph_module, False
        for number, step in enumerate(order, 1):
            try:
                present, changed = _outcome(step, step(present), present)
            except Exception as error:
                error.add_note(f"This was step {number} of {len(order)} in a fxwidth.passes.Pipeline, {_name(step)}.")
                raise
            modified = modified or changed
        return PassResult(present, modified)


def _outcome(step: Step, result: object, given: fx.GraphModule) -> tuple[fx.GraphModule, bool]:
    """Return the graph to go on with, and whether it may have changed."""
    if result is None:
        return given, True
    if isinstance(result, fx.GraphModule):
        return result, True
    if isinstance(result, PassResult) and isinstance(result.graph_module, fx.GraphModule):
        return result.graph_module, bool(result.modified) or result.graph_module is not given
    raise FxwidthError(
        f"{_name(step)} returned {type(result).__name__}; a step returns a PassResult, a torch.fx.GraphModule, or None "
        "where it works in place."
    )


def _may_change_anything(step: Step) -> bool:
    """Tell whether a step is not of fxwidth, so that it may write to tensors and graphs on its own."""
    return not type(step).__module__.startswith("fxwidth.passes.")


def _name(step: Step) -> str:
    return str(getattr(step, "__name__", type(step).__name__))
