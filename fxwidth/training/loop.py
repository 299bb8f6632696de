"""The training loop: a traced network is trained, and evolved while it trains."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from fxwidth.errors import FxwidthError
from fxwidth.evolution.evolver import Evolver, parameter_count
from fxwidth.options import PlanOptions
from fxwidth.runtime.contexts import evaluating
from fxwidth.tracing.analyze import analyze
from fxwidth.training.images import ImageData
from fxwidth.training.interrupts import StopRequest

_EVALUATION_BATCH = 500
_WARMUP = 0.1  # part of the training in which the learning rate rises
_START_FACTOR = 0.1  # of the peak learning rate, at the first step
_EVOLUTION = 0.04  # part of the training over which the resizes are spread by default


@dataclass(frozen=True)
class TrainingConfig:
    """How to train and how far to evolve."""

    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 1e-2  # the peak of the one-cycle schedule
    weight_decay: float = 1e-2
    label_smoothing: float = 0.0
    target_params: float | None = None  # 1 or more: parameters; below 1: a ratio; None: the widths stay
    rounds: int = 8
    evolve_every: int | None = None  # steps between two resizes; None: all are done early in the training
    max_minutes: float | None = None  # the schedule ends by then, whatever `epochs` says
    compile_backend: str | None = None  # of torch.compile, used once the widths are final; None: eager
    seed: int = 0

    def __post_init__(self) -> None:
        # A target that is none is refused before any data are loaded.
        PlanOptions(params=self.params)

    @property
    def params(self) -> int | float | None:
        """The target as `fxwidth.plan` takes it."""
        target = self.target_params
        return int(target) if target is not None and 1 <= target < math.inf else target


@dataclass(frozen=True)
class EpochRecord:
    """What was measured at the end of an epoch."""

    epoch: int
    step: int
    train_loss: float
    test_loss: float
    test_accuracy: float
    params: int
    seconds: float


@dataclass(frozen=True)
class TrainingResult:
    """What a training run did; `resizes` is the history of plans that the Evolver recorded."""

    test_accuracy: float | None  # None: an interrupted run was not evaluated
    params_before: int
    params_after: int
    seconds: float
    steps: int
    interrupted: bool
    widths_before: Mapping[str, int]  # of the groups that could be resized
    widths_after: Mapping[str, int]  # of all groups
    losses: tuple[float, ...]  # one a step
    epochs: tuple[EpochRecord, ...]
    resizes: tuple[Mapping[str, Any], ...]


class TrainingObserver:
    """Told of a training's progress; this one ignores it."""

    def on_start(self, widths: Mapping[str, int], params: int) -> None:
        """Take note of the widths of the groups that can be resized, and of the parameters, at the start."""

    def on_step(self, step: int, progress: float) -> None:
        """Take note of a finished step; `progress` is the part of the training done, 0 to 1."""

    def on_resize(self, step: int, widths: Mapping[str, int], params: int) -> None:
        """Take note of the widths of all groups and the parameters after a resize."""

    def on_epoch(self, record: EpochRecord) -> None:
        """Take note of what was measured at the end of an epoch."""


def fit(
    gm: GraphModule,
    data: ImageData,
    config: TrainingConfig,
    observer: TrainingObserver | None = None,
    stop: StopRequest | None = None,
) -> TrainingResult:
    """Train `gm` on `data`, both on one device, and evolve it on the way; `gm` is changed in place.

    A stop request ends the training after the step under way, or in the evaluation under way.

    Raises:
        FxwidthError: the loss is no longer finite, or the target is out of reach.
    """
    return _Training(gm, data, config, observer or TrainingObserver(), stop or StopRequest()).run()


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

    def _make_evolver(self, steps: int) -> Evolver | None:
        if self.config.params is None:
            return None
        rounds = self.config.rounds
        every = self.config.evolve_every or max(1, round(_EVOLUTION * steps / rounds))
        return Evolver(self.gm, self.optimizer, every=every, params=self.config.params, rounds=rounds)

    def run(self) -> TrainingResult:
        generator = torch.Generator().manual_seed(self.config.seed)
        self._use_channels_last()
        self.gm.train()
        self.observer.on_start(self.widths_before, self.params_before)
        if self.evolver is None:
            self._compile()
        for epoch in range(1, self.config.epochs + 1):
            self._train_epoch(generator)
            self._read_losses()
            if self.stop.count:
                break
            self._evaluate_epoch(epoch)
            if self.stop.count or self.clock.progress >= 1:
                break
        return self._result()

    def _use_channels_last(self) -> None:
        # Convolutions with few channels, which is what evolution leaves, are up to twice as fast so.
        self.gm.to(memory_format=torch.channels_last)

    def _train_epoch(self, generator: torch.Generator) -> None:
        for images, labels in self.data.training_batches(self.config.batch_size, generator):
            loss = F.cross_entropy(self.forward(images), labels, label_smoothing=self.config.label_smoothing)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.clock.step += 1
            self.scheduler.step()
            self.pending.append(loss.detach())
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
        self.observer.on_resize(self.clock.step, all_widths(self.gm), parameter_count(self.gm))
        if self.evolver.finished:
            self._compile()

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

    def _diverged(self, step: int) -> FxwidthError:
        rate = self.config.learning_rate
        return FxwidthError(f"the training diverged by step {step}: the learning rate {rate:g} is too high, lower --lr")

    def _evaluate_epoch(self, epoch: int) -> None:
        measured = evaluate(self.gm, self.data, lambda: self.stop.count > 0)
        if measured is None:
            return
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
        )


def free_widths(gm: GraphModule) -> dict[str, int]:
    """Return the widths of the channel groups that can be resized, by name."""
    return {group.name: group.width for group in analyze(gm).groups if group.pinned is None}


def all_widths(gm: GraphModule) -> dict[str, int]:
    """Return the widths of all channel groups, pinned ones too, by name."""
    return {group.name: group.width for group in analyze(gm).groups}
