"""The options of `fxwidth train` and their defaults."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fxwidth.training.datasets import DATASETS
from fxwidth.training.loop import TrainingConfig
from fxwidth.training.networks import SEED_RESNET

# Epochs by default. Digits are few and small, so an epoch is short.
_EPOCHS = {"digits": 30, "mnist": 6, "fashion-mnist": 10, "cifar10": 30}
_FOLDER_EPOCHS = 30
# The seed network is far too wide for what it is given, and takes high rates; of one made by hand less can go.
_SEED_TARGET, _OTHER_TARGET = 12_500.0, 0.5
_SEED_RATE, _OTHER_RATE = 0.01, 0.002

_TARGET_HELP = (
    "Parameters to end at; below 1: a part of those at the start. "
    f"Default: {_SEED_TARGET:,.0f} for {SEED_RESNET}, {_OTHER_TARGET} for others."
)
_RATE_HELP = (
    f"Peak of AdamW's one-cycle learning rate. Default: {_SEED_RATE} for {SEED_RESNET}, {_OTHER_RATE} for others."
)


class Device(StrEnum):
    """Where to train."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


Model = Annotated[str, typer.Option(help=f"{SEED_RESNET}, or a torchvision classification model.")]
Dataset = Annotated[str, typer.Option(help=f"{', '.join(DATASETS)}, or a folder of images.")]
Data = Annotated[Path | None, typer.Option(help="Folder of the data set's files, downloaded if missing.")]
TargetParams = Annotated[float | None, typer.Option(min=0.0, help=_TARGET_HELP)]
Epochs = Annotated[int | None, typer.Option(min=1, help="Epochs. Default: by data set.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images in a training step.")]
LearningRate = Annotated[float | None, typer.Option(min=0.0, help=_RATE_HELP)]
Rounds = Annotated[int, typer.Option(min=1, help="Resizes on the way to the target.")]
EvolveEvery = Annotated[int | None, typer.Option(min=1, help="Steps between resizes. Default: all are done early.")]
MaxMinutes = Annotated[float | None, typer.Option(min=0.01, help="End the training, schedule included, by then.")]
ImageSize = Annotated[int | None, typer.Option(min=1, help="Scale the images to this size.")]
Place = Annotated[Device, typer.Option(help="Where to train.")]
Compile = Annotated[bool, typer.Option("--compile", help="Use torch.compile once the widths are final.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's.")]
Seed = Annotated[int, typer.Option(help="Seed of all random numbers.")]
Out = Annotated[Path | None, typer.Option(help="Output folder: model, history, curves. Default: runs/MODEL-DATASET.")]


def with_defaults(
    config: TrainingConfig, model: str, dataset: str, epochs: int | None, rate: float | None, target: float | None
) -> TrainingConfig:
    """Return the configuration with what is not given (None) set to what suits the model and the data set."""
    is_seed = model == SEED_RESNET
    if epochs is None:
        epochs = _EPOCHS.get(dataset, _FOLDER_EPOCHS)
    if rate is None:
        rate = _SEED_RATE if is_seed else _OTHER_RATE
    if target is None:
        target = _SEED_TARGET if is_seed else _OTHER_TARGET
    return replace(config, epochs=epochs, learning_rate=rate, target_params=target)
