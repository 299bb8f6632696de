"""The training loop: a traced network is trained, and evolved while it trains."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from fxwidth.errors import FxwidthError
from fxwidth.evolution.evolver import Evolver, parameter_count
from fxwidth.evolution.schedule import Phase
from fxwidth.plain_numbers import floor_of
from fxwidth.runtime.contexts import evaluating
from fxwidth.tracing.analyze import analyze
from fxwidth.training.images import ImageData
from fxwidth.training.interrupts import StopRequest
from fxwidth.training.runs import EpochRecord, TrainingConfig, TrainingObserver, TrainingResult

_EVALUATION_BATCH = 500
_WARMUP = 0.1  # part of the training in which the learning rate rises
_START_FACTOR = 0.1  # of the peak learning rate, at the first step
_EVOLUTION = 0.04  # part of the training over which the resizes are spread by default
_BREATHING = 0.75  # part of the training after which a network that breathes, or has no target, keeps its widths
_EVENTS = 30  # so many resizes by then
_READ_EVERY = 20  # steps; reading a loss makes the device wait


State = dict[str, Any]


def fit(
    gm: GraphModule,
    data: ImageData,
    config: TrainingConfig,
    observer: TrainingObserver | None = None,
    stop: StopRequest | None = None,
    *,
    keep: Callable[[State], None] | None = None,
    state: State | None = None,
) -> TrainingResult:
    """Train `gm` on `data`, both on one device, and evolve it on the way; `gm` is changed in place.

    A stop request ends the training after the step under way, or in the evaluation under way.

    Args:
        gm: the graph to train; with a `state`, as it was when that was kept.
        data: what to train on, and to test with.
        config: how.
        observer: is told of the progress.
        stop: ends the training when it has counted one.
        keep: is given the state of the training after each epoch: tensors and plain data.
        state: that of a training with the same data and config, which goes on from there to the same result.

    Raises:
        FxwidthError: the loss is no longer finite, or the target is out of reach.
    """
    training = _Training(gm, data, config, observer or TrainingObserver(), stop or StopRequest())
    if state is not None:
        training.load_state(state)
    return training.run(keep)


@torch.no_grad()
def evaluate(gm: nn.Module, data: ImageData, stop: Callable[[], bool] = lambda: False) -> tuple[float, float] | None:
    """Return the mean loss and the accuracy on the test images, or None if `stop()` became true on the way."""
    loss = torch.zeros((), device=data.test.labels.device)
    hits = torch.zeros((), dtype=torch.long, device=data.test.labels.device)
    with evaluating(gm):
        for images, labels in data.test_batches(_EVALUATION_BATCH):
            if stop():
                return None
            logits = gm(images)
            loss += F.cross_entropy(logits, labels, reduction="sum")
            hits += (logits.argmax(1) == labels).sum()
    return loss.item() / len(data.test), hits.item() / len(data.test)


def one_cycle(progress: float) -> float:
    """Return the factor of the peak learning rate: a linear rise, then half a cosine down to zero."""
    if progress < _WARMUP:
        return _START_FACTOR + (1 - _START_FACTOR) * progress / _WARMUP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - _WARMUP) / (1 - _WARMUP))))


@dataclass
class _Clock:
    """The part of a training that is done, by steps or by time, whichever is further."""

    total_steps: int
    max_seconds: float | None
    step: int = 0
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    @property
    def progress(self) -> float:
        by_steps = self.step / self.total_steps
        return by_steps if self.max_seconds is None else max(by_steps, self.seconds / self.max_seconds)


class _Training:
    """One run: the state that its steps and epochs share."""

    def __init__(
        self, gm: GraphModule, data: ImageData, config: TrainingConfig, observer: TrainingObserver, stop: StopRequest
    ) -> None:
        self.gm, self.data, self.config, self.observer, self.stop = gm, data, config, observer, stop
        self.forward: Callable[..., Any] = gm
        steps = config.epochs * data.steps_per_epoch(config.batch_size)
        self.clock = _Clock(steps, None if config.max_minutes is None else 60 * config.max_minutes)
        self.optimizer = torch.optim.AdamW(
            gm.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99)
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: one_cycle(self.clock.progress))
        self.evolver = self._make_evolver(steps)
        self.widths_before, self.params_before = free_widths(gm), parameter_count(gm)
        self.pending: list[Tensor] = []  # losses still on the device: reading each one would stop the device each step
        self.losses: list[float] = []
        self.epochs: list[EpochRecord] = []
        self.generator = torch.Generator().manual_seed(config.seed)

    def _make_evolver(self, steps: int) -> Evolver | None:
        if self.config.thresholds:
            every = self.config.evolve_every or self.data.steps_per_epoch(self.config.batch_size)
            end = math.ceil(_BREATHING * steps)
            return Evolver(self.gm, self.optimizer, every=every, policy="thresholds", selection="projection", stop=end)
        if self.config.params is None:
            return None
        rounds = self.config.rounds
        share = _BREATHING / _EVENTS if self.config.breathe else _EVOLUTION / rounds
        every = self.config.evolve_every or max(1, round(share * steps))
        stop = math.ceil(_BREATHING * steps) if self.config.breathe else None
        return Evolver(self.gm, self.optimizer, every=every, params=self.config.params, rounds=rounds, stop=stop)

    def run(self, keep: Callable[[State], None] | None) -> TrainingResult:
        self._use_channels_last()
        self.gm.train()
        self.observer.on_start(self.widths_before, all_widths(self.gm), parameter_count(self.gm))
        if self.evolver is None or self.evolver.finished:
            self._compile()
        for epoch in range(len(self.epochs) + 1, self.config.epochs + 1):
            self._train_epoch()
            self._read_losses()
            if self.stop.count or not self._evaluate_epoch(epoch):
                break
            if keep is not None:
                keep(self.state())
            if self.stop.count or self.clock.progress >= 1:
                break
        return self._result()

    def state(self) -> State:
        return {
            "step": self.clock.step,
            "seconds": self.clock.seconds,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "evolver": None if self.evolver is None else self.evolver.state_dict(),
            "generator": self.generator.get_state(),
            "random": torch.get_rng_state(),
            "widths_before": self.widths_before,
            "params_before": self.params_before,
            "losses": list(self.losses),
            "epochs": [asdict(record) for record in self.epochs],
        }

    def load_state(self, state: State) -> None:
        self.clock.step, self.clock.started = state["step"], self.clock.started - state["seconds"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.evolver is not None:
            self.evolver.load_state_dict(state["evolver"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["random"])
        self.widths_before, self.params_before = state["widths_before"], state["params_before"]
        self.losses = list(state["losses"])
        self.epochs = [EpochRecord(**record) for record in state["epochs"]]

    def _use_channels_last(self) -> None:
        # Convolutions with few channels, which is what evolution leaves, are up to twice as fast so.
        self.gm.to(memory_format=torch.channels_last)

    def _train_epoch(self) -> None:
        for images, labels in self.data.training_batches(self.config.batch_size, self.generator):
            loss = F.cross_entropy(self.forward(images), labels, label_smoothing=self.config.label_smoothing)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.clock.step += 1
            self.scheduler.step()
            self.pending.append(loss.detach())
            if len(self.pending) == _READ_EVERY:
                self._read_losses()
            self._evolve(images, labels)
            self.observer.on_step(self.clock.step, min(1.0, self.clock.progress))
            if self.stop.count or self.clock.progress >= 1:
                return

    def _evolve(self, images: Tensor, labels: Tensor) -> None:
        if self.evolver is None:
            return
        try:
            plan = self.evolver.step(images, labels)
        except FxwidthError as error:
            with torch.no_grad():
                finite = bool(self.gm(images).isfinite().all())
            if not finite:
                raise self._diverged(self.clock.step) from error
            raise
        if plan is None:
            return
        self._use_channels_last()
        self.observer.on_resize(
            self.clock.step, all_widths(self.gm), parameter_count(self.gm), self._reason(self.evolver)
        )
        if self.evolver.finished:
            self._compile()

    def _reason(self, evolver: Evolver) -> str:
        """Return why the last resize was done."""
        number = len(evolver.history)
        reasons = {
            Phase.GROW: "grows at its target for a while, so that channels get where they are needed",
            Phase.FOLD: "folds back what is needed least",
            Phase.THRESHOLDS: "follows the singular values of each layer",
        }
        phase = evolver.history[-1]["phase"]
        return reasons.get(phase) or f"resize {number} of {self.config.rounds} on the way to {self._target:,}"

    def _compile(self) -> None:
        # Only final widths are worth a compilation. What was compiled for other widths must not be reused.
        if self.config.compile_backend is not None:
            torch.compiler.reset()
            self.forward = torch.compile(self.gm, backend=self.config.compile_backend)

    def _read_losses(self) -> None:
        if not self.pending:
            return
        values = torch.stack(self.pending).tolist()
        self.pending.clear()
        for value in values:
            self.losses.append(value)
            if not math.isfinite(value):
                raise self._diverged(len(self.losses))
        self.observer.on_loss(self.clock.step, sum(values) / len(values))

    def _diverged(self, step: int) -> FxwidthError:
        rate = self.config.learning_rate
        return FxwidthError(f"the training diverged by step {step}: the learning rate {rate:g} is too high, lower --lr")

    def _evaluate_epoch(self, epoch: int) -> bool:
        """Measure the network, and return whether that was not interrupted."""
        measured = evaluate(self.gm, self.data, lambda: self.stop.count > 0)
        if measured is None:
            return False
        since = self.epochs[-1].step if self.epochs else 0
        recent = self.losses[since:]
        record = EpochRecord(
            epoch=epoch,
            step=self.clock.step,
            train_loss=sum(recent) / len(recent),
            test_loss=measured[0],
            test_accuracy=measured[1],
            params=parameter_count(self.gm),
            seconds=self.clock.seconds,
        )
        self.epochs.append(record)
        self.observer.on_epoch(record)
        return True

    @property
    def _target(self) -> int | None:
        target = self.config.params
        return floor_of(target * self.params_before) if isinstance(target, float) else target

    def _result(self) -> TrainingResult:
        evaluated = bool(self.epochs) and self.epochs[-1].step == self.clock.step
        return TrainingResult(
            test_accuracy=self.epochs[-1].test_accuracy if evaluated else None,
            params_before=self.params_before,
            params_after=parameter_count(self.gm),
            seconds=self.clock.seconds,
            steps=self.clock.step,
            interrupted=self.stop.count > 0,
            widths_before=self.widths_before,
            widths_after=all_widths(self.gm),
            losses=tuple(self.losses),
            epochs=tuple(self.epochs),
            resizes=tuple(self.evolver.history) if self.evolver is not None else (),
            target=self._target,
        )


def free_widths(gm: GraphModule) -> dict[str, int]:
    """Return the widths of the channel groups that can be resized, by name."""
    return {group.name: group.width for group in analyze(gm, progress=False).groups if group.pinned is None}


def all_widths(gm: GraphModule) -> dict[str, int]:
    """Return the widths of all channel groups, pinned ones too, by name."""
    return {group.name: group.width for group in analyze(gm, progress=False).groups}
