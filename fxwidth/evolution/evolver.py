"""Evolving widths again and again while a network trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Unpack

from torch import Tensor, fx, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from fxwidth.costs.budget import Budget
from fxwidth.costs.registry import cost_polynomial
from fxwidth.distributed.replicas import Replicas
from fxwidth.distributed.sharded import Shard
from fxwidth.distributed.wrappers import unwrapped
from fxwidth.errors import FxwidthError
from fxwidth.evolution.evolve import planned_and_resized
from fxwidth.evolution.progress import Progress
from fxwidth.evolution.schedule import Phase
from fxwidth.evolution.settings import Settings
from fxwidth.evolution.timing import Timing
from fxwidth.evolution.training_batches import TrainingBatches
from fxwidth.gradients.informed_rows import labelled_batches
from fxwidth.gradients.reader_step import mean_loss
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.option_keywords import EvolveKeywords, Loss
from fxwidth.options import PlanOptions, ResizeOptions, both_options, has_target, tells_options
from fxwidth.plain_numbers import floor_of
from fxwidth.planning.group_choice import without_modules
from fxwidth.planning.planner import Plan, refuse_impossible
from fxwidth.resizing.companions import companions_of
from fxwidth.rewriting.optimizers import Optimizers, check_optimizer
from fxwidth.rewriting.transaction import Transaction
from fxwidth.runtime.process_groups import Ranks
from fxwidth.statistics.gathered_batches import Gathered
from fxwidth.tracing.analyze import analyze_module

# By this share the loss after a breath must be lower for the network to have got better.
_SHARE = 0.01


class Evolver:
    """Evolves a network while it trains; called like a learning-rate scheduler.

    Every `every` steps the widths are planned anew and the network is resized in place; the references of the
    training loop to the graph, the optimizer and its schedulers stay valid. With a target, `params=` or `budget=`, the
    costs go there in `rounds` geometric steps, from above or from below, and stay. With `stop=` or `breaths=` the
    network then breathes: all groups grow alike up to `breath` times the target, train until the next event, and are
    folded back to it by the joint plan, so that channels get where they are needed. Without a target, the thresholds of
    `fxwidth.plan` decide, and layers may grow again.

    Args:
        gm: a graph from `fxwidth.trace`, or a DistributedDataParallel of one.
        optimizer: the optimizer that trains it or a part of it; a list where several do, each for its parameters.
        every: steps between two resizes; or "epoch", for one at each call of `epoch`.
        start: steps (or epochs) before the first.
        rounds: the number of resizes on the way to the target, by default 8.
        overshoot: the ratio to the target up to which a network grows that is below it, before it is folded back.
        breath: the ratio to the target up to which a network at it grows for a while.
        breaths: how often it does so; by default until `stop`, if that is given, or a plateau of the `loss` on the
            batches that are kept, and else never.
        stop: the step (or epoch) after which nothing changes any more; a network that has grown is folded back before.
        patience: with every="epoch", only resize once the metric given to `epoch` has not fallen for so many epochs.
        cooldown: by thresholds, for how many resizes a group that has grown does not shrink, and the reverse.
        policy: "budget" or "thresholds"; by default the first where there is a target.
        process_group: the ranks of `torch.distributed` that train the same network and resize it together, each with
            batches of its own; all call `step` alike. Needless where a DistributedDataParallel is around the graph,
            which tells it, and whose reducer is made anew at each resize, and where its parameters are sharded.
        shard: for a graph sharded by `torch.distributed.fsdp.fully_shard`, the function that does it, such as
            `lambda gm: fully_shard(gm, mesh=mesh)`: parameters are whole on each rank during a resize, and sharded anew
            after it. Tensor parallelism is kept without it, as long as widths are shared evenly (`align=`).
        options: those of `fxwidth.plan` and `fxwidth.resize`, as for `fxwidth.evolve`. The target, `params=` or
            `budget=`, is absolute or in ratios of the present costs. Without `data=` some of the batches given to
            `step` are looked at, drawn evenly from all, with their targets where there is a `loss=`; `recalibrate=None`
            corrects batch norm's running statistics where data are given alone, since training brings them up to date
            by itself.

    Attributes:
        history: one dict per resize: step, phase ("approach", "grow", "fold" or "thresholds"), params_before,
            params_after, widths {group: [old, new]}.

    Raises:
        FxwidthError: an option or the optimizer cannot be used, or the target is out of reach.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
        >>> evolver = fxwidth.Evolver(gm, optimizer, every=2, params=0.5, rounds=2, stop=8)
        >>> for _ in range(9):
        ...     x = torch.randn(16, 8)
        ...     gm(x).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     plan = evolver.step(x)
        >>> [(record["step"], record["phase"]) for record in evolver.history], evolver.finished
        ([(2, 'approach'), (4, 'approach'), (6, 'grow'), (8, 'fold')], True)
    """

    @tells_options(PlanOptions, ResizeOptions)
    def __init__(
        self,
        gm: fx.GraphModule,
        optimizer: Optimizers | None = None,
        *,
        every: int | Literal["epoch"] = 200,
        start: int = 0,
        rounds: int | None = None,
        overshoot: float = 1.0,
        breath: float = 1.25,
        breaths: int | None = None,
        stop: int | None = None,
        patience: int | None = None,
        cooldown: int = 2,
        policy: Literal["budget", "thresholds"] | None = None,
        process_group: ProcessGroup | None = None,
        shard: Shard | None = None,
        **options: Unpack[EvolveKeywords],
    ) -> None:
        self._settings = Settings(
            every, start, rounds, overshoot, breath, breaths, stop, patience, cooldown, policy, has_target(options)
        )
        if options.get("ratio") is not None:
            raise FxwidthError(
                f"ratio={options['ratio']} sets widths once, and an Evolver resizes again and again; give params= or "
                "budget= to go to, or call fxwidth.evolve."
            )
        recalibrate = options.pop("recalibrate", None)
        self._gathered = Gathered()
        self._gathers = options.get("data") is None
        # Of a generator's batches those that are looked at are kept for the next round.
        self._planning, resizing = both_options(options, optimizer, later=self._gathered)
        if self._planning.target is not None and self._planning.target.measure is not None:
            raise FxwidthError(
                "an Evolver plans in the midst of training and does not call measure=; leave it out, which predicts "
                "latency on the device of the parameters, or call fxwidth.evolve."
            )
        self._resizing = replace(
            resizing,
            # Batches of training are still to come.
            data=self._gathered if resizing.data is None else resizing.data,
            recalibrate=not self._gathers if recalibrate is None else recalibrate,
        )
        self._wrappers = [gm] if isinstance(gm, DistributedDataParallel) else []
        self._process_group = process_group
        gm = unwrapped(gm)
        if isinstance(gm, nn.Module):
            check_optimizer(optimizer, gm)
        self.gm = gm
        self.optimizer = optimizer
        self._shard = shard
        self._replicas.looked_at(gm, self._begin)

    def _begin(self) -> None:
        """Look at the graph, and where it is to go."""
        gm = self.gm
        # A graph without shapes, or one that does not run, is refused now and not in mid-training.
        width_graph = WidthGraph(analyze_module(gm))
        companions_of(width_graph, self._resizing)
        # A resize may give the model other parameters, by which its modules are known.
        self._planning = without_modules(width_graph, self._planning)
        target = self._planning.target
        bounds = target.bounds if target is not None else {}
        first = {name: int(cost_polynomial(width_graph, name)({})) for name in bounds}
        goals = {n: b if isinstance(b, int) else floor_of(b * first[n]) for n, b in bounds.items()}
        self._progress = Progress(first, goals)
        self._refuse_impossible(width_graph, goals)
        if goals:
            self._settings.refuse_late(self._timing.schedule.lead)

    def __repr__(self) -> str:
        progress = self._progress
        goals = ", ".join(f"{name} {progress.first[name]:,} -> {goal:,}" for name, goal in progress.target.items())
        done = f"{progress.steps} steps and {len(progress.history)} resizes done"
        return f"<Evolver: {goals or 'by thresholds'}; {done}{', finished' if self.finished else ''}>"

    @property
    def history(self) -> list[dict[str, Any]]:
        """One dict per resize."""
        return list(self._progress.history)

    @property
    def finished(self) -> bool:
        """Whether nothing will change any more."""
        return self._timing.is_over

    def step(self, *batch: Any) -> Plan | None:
        """Count one training step, and resize when it is time.

        Args:
            batch: the inputs of the step, in the order the model takes them, and what follows them, the targets, at
                which `loss=` looks where no `data=` are given; else they are ignored.

        Returns:
            The plan that was carried out, or None when nothing was due.

        Raises:
            FxwidthError: the target cannot be reached; nothing has changed, and the step can be taken again. So it is
                after any other exception, Ctrl-C included.
        """
        due = not self._settings.by_epoch and self._timing.is_due

        def work(transaction: Transaction) -> Plan | None:
            known = self._progress
            ticks = known.ticks + (not self._settings.by_epoch)
            self._progress = replace(known, steps=known.steps + 1, ticks=ticks)
            if due or not self.finished:
                self._batches.remember(self.gm, batch)
            return self._resize(transaction) if due else None

        return self._as_a_whole(due, work)

    def epoch(self, metric: float | Tensor | None = None) -> Plan | None:
        """Count one epoch, and resize when it is time; for an Evolver with every="epoch".

        Args:
            metric: what has become smaller if the network has become better, such as the loss on held-out data; needed
                with `patience=`.

        Returns:
            The plan that was carried out, or None when nothing was due.

        Raises:
            FxwidthError: steps are counted and not epochs, there is no metric or it is not finite, or the target cannot
                be reached; nothing has changed.
        """
        settings = self._settings
        if not settings.by_epoch:
            raise FxwidthError(f"epoch() counts epochs, and every={settings.every} counts steps; give every='epoch'.")
        value = self._of_all_ranks(None if metric is None else float(metric))
        if settings.patience is not None and (value is None or not abs(value) < float("inf")):
            raise FxwidthError(f"epoch(metric) needs a finite number with patience=, but received {metric!r}.")
        known = self._progress
        is_better = value is not None and (known.metric is None or value < known.metric)
        waited = 0 if is_better else known.epochs_without + 1
        due = self._timing.is_due and (settings.patience is None or waited >= settings.patience)

        def work(transaction: Transaction) -> Plan | None:
            metric = value if is_better else known.metric
            self._progress = replace(known, ticks=known.ticks + 1, metric=metric, epochs_without=0 if due else waited)
            return self._resize(transaction) if due else None

        return self._as_a_whole(due, work)

    def state_dict(self) -> dict[str, Any]:
        """Return all that makes an interrupted run go on as it would have, for `torch.save`.

        `fxwidth.save(gm, path, optimizer=optimizer, evolver=evolver)` writes it with the graph and the optimizer.

        Example:
            >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
            >>> evolver = fxwidth.Evolver(fxwidth.trace(net, torch.randn(2, 8)), params=0.5)
            >>> again = fxwidth.Evolver(evolver.gm, params=0.5)
            >>> again.load_state_dict(evolver.state_dict())
        """
        return {"progress": self._progress.state_dict(), "gathered": self._gathered.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another Evolver with the same options was; its target is that of the first size.

        Args:
            state: what `state_dict` has returned.

        Raises:
            FxwidthError: it is no such state, or one of another version or other costs, or its target cannot be reached
                from here; nothing has changed.
        """
        if not isinstance(state, Mapping) or state.keys() != {"progress", "gathered"}:
            form = f"a dict with {', '.join(map(str, state))}" if isinstance(state, Mapping) else type(state).__name__
            raise FxwidthError(f"load_state_dict takes what Evolver.state_dict returned, but received {form}.")
        progress, gathered = self._progress.following(state["progress"]), Gathered()
        gathered.load_state_dict(state["gathered"])

        def check() -> None:
            self._refuse_impossible(WidthGraph(analyze_module(self.gm)), progress.target)

        self._replicas.looked_at(self.gm, check)
        # In one step: nothing can come between the two.
        self.__dict__.update(_progress=progress, _gathered=gathered)

    @property
    def _timing(self) -> Timing:
        return Timing(self._settings, self._progress)

    @property
    def _batches(self) -> TrainingBatches:
        return TrainingBatches(self._gathered, None if self._gathers else self._planning.data, self._loss)

    @property
    def _loss(self) -> Loss | None:
        return self._planning.loss or self._resizing.loss

    def _refuse_impossible(self, width_graph: WidthGraph, target: Mapping[str, int]) -> None:
        budget = Budget.of(dict(target)) if target else None
        refuse_impossible(width_graph, self._planning.to(budget))

    def _as_a_whole(self, due: bool, work: Callable[[Transaction], Plan | None]) -> Plan | None:
        objects = (self, self._gathered)
        if not due:
            # Steps between resizes are of each rank by itself.
            return Replicas().run(work, (), lambda _: (), optimizer=None, objects=objects)
        modules = [self.gm, *self._resizing.graphs_beside]
        return self._replicas.run(work, modules, lambda _: modules, optimizer=self.optimizer, objects=objects)

    @property
    def _replicas(self) -> Replicas:
        return Replicas.of(self.gm, self._process_group, self._wrappers, self._shard)

    def _of_all_ranks(self, metric: float | None) -> float | None:
        """Return the mean of what the ranks give as the metric of an epoch: they must decide alike."""
        if metric is None or (group := self._replicas.group) is None:
            return metric
        told = Ranks(group).gather("the metric of an epoch", metric)
        return sum(told) / len(told)

    def _resize(self, transaction: Transaction) -> Plan:
        width_graph, known = WidthGraph(analyze_module(self.gm)), self._progress
        data, timing, before = self._batches.to_look_at(width_graph.analysis), self._timing, parameter_count(self.gm)
        planning = self._planning.to(timing.budget, data=data)
        resizing = replace(self._resizing, optimizer=self.optimizer, data=data)
        revise = None if known.target else partial(self._without_reversals, width_graph)
        chosen, _ = planned_and_resized(width_graph, planning, resizing, transaction, revise)
        changes = {name: [width_graph[name].width, width] for name, width in chosen.widths.items()}
        record = {
            "step": known.steps,
            "phase": timing.phase.value,
            "params_before": before,
            "params_after": parameter_count(self.gm),
            "widths": changes,
        }
        turns = {name: (1 if new > old else -1, known.event) for name, (old, new) in changes.items()}
        self._progress = replace(known, turns={**known.turns, **turns}, history=(*known.history, record))
        if timing.phase is Phase.FOLD and self._loss is not None and data is not None:
            self._judge_breath(data)
        return chosen

    def _without_reversals(self, width_graph: WidthGraph, plan: Plan) -> Plan:
        """Return a plan without those groups that would go back where they came from not long ago."""
        known = self._progress
        kept = {}
        for name, width in plan.widths.items():
            own = 1 if width > width_graph[name].width else -1
            direction, event = known.turns.get(name, (own, 0))
            if direction == own or known.event - event > self._settings.cooldown:
                kept[name] = width
        return Plan(kept, plan.notes)

    def _judge_breath(self, data: Any) -> None:
        """Note whether the last breath has lowered the loss on what is kept of the data."""
        assert self._loss is not None
        batches = labelled_batches(WidthGraph(analyze_module(self.gm)), data)
        loss = mean_loss(self.gm, {}, batches, self._loss)
        known = self._progress
        is_better = known.best is None or loss < (1 - _SHARE) * known.best
        self._progress = replace(
            known,
            best=loss if is_better else known.best,
            breaths_without=0 if is_better else known.breaths_without + 1,
        )


def parameter_count(module: nn.Module) -> int:
    """Return the number of entries of a module's parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())
