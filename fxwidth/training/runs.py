"""What a training run is told, what it tells while it goes on, and what it has done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fxwidth.errors import FxwidthError
from fxwidth.options import PlanOptions


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
    breathe: bool = False  # at the target, grow and fold back until three quarters of the training are done
    thresholds: bool = False  # no target: each layer's singular values decide, as in SVD evolutive CNN
    max_minutes: float | None = None  # the schedule ends by then, whatever `epochs` says
    compile_backend: str | None = None  # of torch.compile, used once the widths are final; None: eager
    seed: int = 0

    def __post_init__(self) -> None:
        # A target that is none is refused before any data are loaded.
        PlanOptions(params=self.params)
        if self.thresholds and (self.target_params is not None or self.breathe):
            other = "a target" if self.target_params is not None else "--breathe"
            raise FxwidthError(
                f"--thresholds goes by singular values alone, and not with {other}; leave out one of them"
            )

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
    target: int | None = None  # parameters to end at

    @property
    def missed(self) -> bool:
        """Whether it has ended with more parameters than it was to."""
        return self.target is not None and self.params_after > self.target


class TrainingObserver:
    """Told of a training's progress; this one ignores it."""

    def on_start(self, before: Mapping[str, int], now: Mapping[str, int], params: int) -> None:
        """Take note of the widths of the groups that can be resized, at first and now, and of the parameters now."""

    def on_step(self, step: int, progress: float) -> None:
        """Take note of a finished step; `progress` is the part of the training done, 0 to 1."""

    def on_loss(self, step: int, loss: float) -> None:
        """Take note of the mean training loss of some steps, up to this one."""

    def on_resize(self, step: int, widths: Mapping[str, int], params: int, reason: str) -> None:
        """Take note of the widths of all groups and the parameters after a resize, and of why it was done."""

    def on_epoch(self, record: EpochRecord) -> None:
        """Take note of what was measured at the end of an epoch."""
