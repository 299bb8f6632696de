"""The base of the passes: what each needs, gives and spoils, checked wherever it is run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager
from torch.optim import Optimizer

from fxwidth.errors import FxwidthError
from fxwidth.passes.conditions import Condition
from fxwidth.rewriting.optimizers import Optimizers
from fxwidth.rewriting.originals import resize_transaction
from fxwidth.rewriting.transaction import Transaction
from fxwidth.tracing.analyze import refuse_other_than_graph


class WidthPass(PassBase):
    """A pass of `torch.fx` that says what it needs, what it gives, what it spoils, and whether it works in place.

    Before `call`, what it needs is checked, and after it what it gives, alone as in a `PassManager` and a `Pipeline`; a
    failure takes back all that the pass has done by fxwidth's own functions.

    Attributes:
        needs: the conditions without which it cannot run.
        gives: the conditions that hold after it.
        spoils: the conditions that may not hold any more after it.
        in_place: whether it changes the graph that it is given, or only looks at it (and notes in `gm.meta`).

    Example:
        >>> class Doubled(fxwidth.passes.WidthPass):
        ...     needs = (fxwidth.passes.conditions.PLANNED,)
        ...     def call(self, graph_module):
        ...         plan = graph_module.meta["fxwidth_plan"]
        ...         graph_module.meta["fxwidth_plan"] = {name: 2 * width for name, width in plan.items()}
        ...         return torch.fx.passes.infra.pass_base.PassResult(graph_module, False)
        >>> Doubled()(fxwidth.trace(torch.nn.Linear(2, 3), torch.randn(2, 2)))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        fxwidth.errors.FxwidthError: Doubled needs that a plan is left in gm.meta; run PlanWidths before it, ...
    """

    needs: tuple[Condition, ...] = ()
    gives: tuple[Condition, ...] = ()
    spoils: tuple[Condition, ...] = ()
    in_place: bool = True

    @property
    def name(self) -> str:
        """The name of its class."""
        return type(self).__name__

    @property
    def optimizer(self) -> Optimizers | None:
        """What trains the graph, and is changed with it."""
        return None

    @property
    def companions(self) -> tuple[nn.Module, ...]:
        """Other modules that it changes with the graph."""
        return ()

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Check what the pass needs, run it, and check what it gives; as a whole or not at all.

        Args:
            graph_module: the graph.

        Raises:
            FxwidthError: a condition does not hold, or the pass cannot be run.
        """
        self.requires(graph_module)
        transaction = pass_transaction([self], graph_module)
        result: PassResult = transaction.run(lambda: self._checked(graph_module))
        return result

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Check what the pass needs.

        Args:
            graph_module: the graph.

        Raises:
            FxwidthError: a condition does not hold; the message names it, and what brings it about.
        """
        refuse_other_than_graph(graph_module, self.name)
        for condition in self.needs:
            if not condition.holds(graph_module):
                raise FxwidthError(f"{self.name} needs that {condition.name}; {condition.remedy}.")

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Check what the pass gives.

        Args:
            graph_module: the graph after the pass.

        Raises:
            FxwidthError: a condition does not hold.
        """
        for condition in self.gives:
            if not condition.holds(graph_module):
                raise FxwidthError(
                    f"after {self.name} it does not hold that {condition.name}, which it says that it gives. Take the "
                    "condition from its gives, or mend its call."
                )

    def _checked(self, graph_module: fx.GraphModule) -> PassResult:
        result = self.call(graph_module)
        if not isinstance(result, PassResult):
            raise FxwidthError(
                f"the call of {self.name} returned {type(result).__name__}; return PassResult(graph_module, modified)."
            )
        self.ensures(result.graph_module)
        return result


def pass_transaction(steps: Iterable[object], graph_module: fx.GraphModule) -> Transaction:
    """Return a transaction of all that some passes may change by functions of fxwidth, held together."""
    passes = list(members(steps))
    companions = [module for one in passes for module in one.companions]
    optimizers = [optimizer for one in passes for optimizer in _each(one.optimizer)]
    return resize_transaction(graph_module, *companions, optimizer=optimizers, holds=True)


def members(steps: Iterable[object]) -> Iterator[WidthPass]:
    """Yield the passes of fxwidth among steps, those in pipelines too."""
    for one in steps:
        if isinstance(one, WidthPass):
            yield one
        else:
            # Pipelines hold steps, a PassManager passes; its own `steps` is a number.
            inner = one.passes if isinstance(one, PassManager) else getattr(one, "steps", ())
            yield from members(inner if isinstance(inner, Iterable) else ())


def _each(optimizer: Optimizers | None) -> list[Optimizer]:
    return [] if optimizer is None else [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
