"""Evolving widths: all steps in one call, or again and again while the network trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

from torch import Tensor, fx, nn

from fxwidth.costs.budget import Budget
from fxwidth.costs.registry import cost_polynomial
from fxwidth.errors import FxwidthError
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.options import EvolveKeywords, PlanOptions, ResizeOptions, both_options, tells_options
from fxwidth.plain_numbers import is_integer, plain_number
from fxwidth.planning.planner import Plan, plan_with_evidence, refuse_impossible
from fxwidth.resizing.resize import resize_analyzed
from fxwidth.rewriting.optimizers import Optimizers, check_optimizer
from fxwidth.rewriting.originals import resize_transaction
from fxwidth.rewriting.transaction import Transaction
from fxwidth.runtime.pytrees import deep_tensors, map_leaves
from fxwidth.statistics.calibration_data import Gathered
from fxwidth.tracing.analyze import analyze_module
from fxwidth.tracing.trace import trace


@tells_options(PlanOptions, ResizeOptions)
def evolve(
    model: nn.Module,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    optimizer: Optimizers | None = None,
    **options: Unpack[EvolveKeywords],
) -> fx.GraphModule:
    """Trace a model, plan new widths by its spectra, and resize it.

    Args:
        model: any module or GraphModule. The returned graph is the model to use from now on; a GraphModule is resized
            itself, another module if its own code does at the new widths what the graph does, and else stays as it was:
            see `fxwidth.resize`.
        example_inputs: as for `fxwidth.trace`; needless when the graph carries shapes.
        example_kwargs: arguments by name, beside positional ones in `example_inputs`.
        optimizer: the optimizer that trains the model; a list where several do, each for its parameters.
        options: those of `fxwidth.plan`, e.g. `params=0.5` or `budget=`, and those of `fxwidth.resize`; `data`,
            `selection`, `exact` and `rotate` are for both.

    Raises:
        FxwidthError: the model, the inputs or the options cannot be used; nothing has changed. So it is after any other
            exception, Ctrl-C included.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.evolve(net, torch.randn(2, 8), params=0.5)
        >>> sum(parameter.numel() for parameter in gm.parameters())
        95
    """
    planning, resizing = both_options(options, optimizer)
    modules = [model] if isinstance(model, nn.Module) else []
    for module in modules:
        check_optimizer(optimizer, module)
    transaction = resize_transaction(*modules, optimizer=optimizer)

    def work() -> fx.GraphModule:
        module = trace(model, example_inputs, example_kwargs)
        return _planned_and_resized(WidthGraph(analyze_module(module)), planning, resizing, transaction)[1]

    return transaction.run(work)


def _planned_and_resized(
    width_graph: WidthGraph, planning: PlanOptions, resizing: ResizeOptions, transaction: Transaction
) -> tuple[Plan, fx.GraphModule]:
    """Plan and resize from the same evidence, so that it is gathered once."""
    # A plan counts on those changes of basis alone that the resize will make.
    chosen, evidence = plan_with_evidence(width_graph, replace(planning, rotate=resizing.rotates))
    # Without a budget a plan does not look at the data, and a resize still can.
    return chosen, resize_analyzed(width_graph, chosen, resizing, evidence=evidence, transaction=transaction)


class Evolver:
    """Evolves a network while it trains; called like a learning-rate scheduler.

    Every `every` steps the widths are planned anew and the network is resized in place; the references of the
    training loop to the graph, the optimizer and its schedulers stay valid. With a target, `params=` or `budget=`, the
    costs go there in `rounds` geometric steps and stay; without one, the thresholds of `fxwidth.plan` decide, and
    layers may grow again.

    Args:
        gm: a graph from `fxwidth.trace`.
        optimizer: the optimizer that trains it or a part of it; a list where several do, each for its parameters.
        every: steps between two resizes.
        start: steps before the first.
        rounds: the number of resizes on the way to the target.
        options: those of `fxwidth.plan` and `fxwidth.resize`, as for `fxwidth.evolve`. The target, `params=` or
            `budget=`, is absolute or in ratios of the present costs. Without `data=` some of the batches given to
            `step` are looked at, drawn evenly from all; `recalibrate=None` corrects batch norm's running statistics
            where data are given alone, since training brings them up to date by itself.

    Attributes:
        history: one dict per resize: step, params_before, params_after, widths {group: [old, new]}.

    Raises:
        FxwidthError: an option or the optimizer cannot be used, or the target is out of reach.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
        >>> evolver = fxwidth.Evolver(gm, optimizer, every=2, params=0.5, rounds=2)
        >>> for _ in range(4):
        ...     x = torch.randn(16, 8)
        ...     gm(x).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     plan = evolver.step(x)
        >>> [record["step"] for record in evolver.history], evolver.finished
        ([2, 4], True)
    """

    @tells_options(PlanOptions, ResizeOptions)
    def __init__(
        self,
        gm: fx.GraphModule,
        optimizer: Optimizers | None = None,
        *,
        every: int = 200,
        start: int = 0,
        rounds: int | None = None,
        **options: Unpack[EvolveKeywords],
    ) -> None:
        every = _count("every", every, "the number of steps between resizes", 1)
        start = _count("start", start, "the number of steps before the first resize", 0)
        if rounds is not None:
            rounds = _count("rounds", rounds, "the number of resizes on the way to a target", 1)
        recalibrate = options.pop("recalibrate", None)
        # Of a generator's batches those that are looked at are kept for the next round.
        self._planning, resizing = both_options(options, optimizer)
        self._gathered = Gathered()
        self._resizing = replace(
            resizing,
            # Batches of training are still to come.
            data=self._gathered if resizing.data is None else resizing.data,
            recalibrate=resizing.data is not None if recalibrate is None else recalibrate,
        )
        target = self._planning.target
        if rounds is not None and target is None:
            raise FxwidthError(f"rounds={rounds} needs params= or budget= to go to.")
        if isinstance(gm, nn.Module):
            check_optimizer(optimizer, gm)
        self.gm = gm
        self.optimizer = optimizer
        self.every = every
        self.start = start
        self.history: list[dict[str, Any]] = []
        self._steps = 0
        self._rounds = rounds or 8
        # A graph without shapes, or one that does not run, is refused now and not in mid-training.
        width_graph = WidthGraph(analyze_module(gm))
        bounds = target.bounds if target is not None else {}
        self._first = {name: cost_polynomial(width_graph, name)({}) for name in bounds}
        self._target = {n: b if isinstance(b, int) else round(b * self._first[n]) for n, b in bounds.items()}
        budget = Budget.of(self._target) if self._target else None
        refuse_impossible(width_graph, replace(self._planning, budget=budget, params=None))

    @property
    def finished(self) -> bool:
        """Whether the target is reached; always false without one."""
        return bool(self._target) and self._round > self._rounds

    @property
    def _round(self) -> int:
        return len(self.history) + 1

    def step(self, *batch: Any) -> Plan | None:
        """Count one training step, and resize when it is time.

        Args:
            batch: the inputs of the step, in the order the model takes them; what follows them (targets) is ignored.

        Returns:
            The plan that was carried out, or None when nothing was due.

        Raises:
            FxwidthError: the target cannot be reached; nothing has changed, and the step can be taken again. So it is
                after any other exception, Ctrl-C included.
        """
        due = not self.finished and self._steps >= self.start and (self._steps + 1 - self.start) % self.every == 0
        modules, optimizer = ([self.gm], self.optimizer) if due else ([], None)
        transaction = resize_transaction(*modules, optimizer=optimizer, objects=(self, self._gathered))
        return transaction.run(lambda: self._step(batch, transaction if due else None))

    def _step(self, batch: Sequence[Any], transaction: Transaction | None) -> Plan | None:
        self._steps += 1
        if self.finished:
            return None
        self._remember(batch)
        return None if transaction is None else self._resize(transaction)

    def _remember(self, batch: Sequence[Any]) -> None:
        count = len(self.gm.graph.find_nodes(op="placeholder"))
        inputs = tuple(map_leaves(Tensor.detach, value) for value in batch if deep_tensors(value))[:count]
        if self._planning.data is None and inputs:
            self._gathered.add(inputs)

    def _resize(self, transaction: Transaction) -> Plan:
        before = parameter_count(self.gm)
        width_graph = WidthGraph(analyze_module(self.gm))
        gathered = self._gathered if self._gathered.batches else None
        data = self._planning.data if self._planning.data is not None else gathered
        planning = replace(self._planning, budget=self._budget_due(), params=None, data=data)
        resizing = replace(self._resizing, optimizer=self.optimizer, data=data)
        chosen, _ = _planned_and_resized(width_graph, planning, resizing, transaction)
        old = {name: width_graph[name].width for name in chosen}
        self.history.append(
            {
                "step": self._steps,
                "params_before": before,
                "params_after": parameter_count(self.gm),
                "widths": {name: [old[name], width] for name, width in chosen.items()},
            }
        )
        return chosen

    def _budget_due(self) -> Budget | None:
        if not self._target:
            return None
        share = min(1.0, self._round / self._rounds)
        first = self._first
        due = {n: round(first[n] * (goal / first[n]) ** share) for n, goal in self._target.items()}
        return Budget.of(due)


def _count(name: str, given: Any, meaning: str, least: int) -> int:
    value = plain_number(given)
    if not is_integer(value) or value < least:
        raise FxwidthError(f"{name}= is {meaning}, a whole number of at least {least}, but received {given!r}.")
    return int(value)


def parameter_count(module: nn.Module) -> int:
    """Return the number of entries of a module's parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())
