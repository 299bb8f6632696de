"""The options of `fxwidth train` and their defaults."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fxwidth.errors import FxwidthError
from fxwidth.training.datasets import DATASETS
from fxwidth.training.networks import SEED_RESNET
from fxwidth.training.runs import TrainingConfig

# Epochs by default. Digits are few and small, so an epoch is short.
_EPOCHS = {"digits": 30, "mnist": 6, "fashion-mnist": 10, "cifar10": 30}
_FOLDER_EPOCHS = 30
# The seed network is far too wide for what it is given, and takes high rates once it is small, which it is early with a
# target; of one made by hand less can go.
# Of images that nobody has tried a part of the parameters is left, whatever the network and the number of classes.
_SEED_TARGET, _OTHER_TARGET, _FOLDER_TARGET = 12_500.0, 0.5, 0.1
_SEED_RATE, _OTHER_RATE = 0.01, 0.002

_TARGET_HELP = (
    "Parameters to end at; below 1: a part of those at the start. "
    f"Default: {_SEED_TARGET:,.0f} for {SEED_RESNET}, or {_FOLDER_TARGET} on a folder of images; {_OTHER_TARGET} for "
    "others."
)
_OUT_HELP = (
    "Output folder: model, history, curves and a checkpoint of each epoch. Default: runs/MODEL-DATASET, with a number "
    "behind where that holds a run."
)
_RESUME_HELP = (
    "Go on with the run in this folder from its last epoch, to the result that it would have had; takes no other "
    "option but --device and --threads. Its checkpoint is data alone, of which no code is run."
)
_THRESHOLDS_HELP = (
    "In place of a target, grow and shrink each layer by its own singular values once an epoch, as SVD-evolutive-CNN "
    "does; --evolve-every changes how often."
)
_RATE_HELP = (
    f"Peak of AdamW's one-cycle learning rate. Default: {_SEED_RATE} for {SEED_RESNET} with a target, else "
    f"{_OTHER_RATE}."
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
Breathe = Annotated[
    bool, typer.Option("--breathe", help="At the target, grow and fold back until three quarters of the training.")
]
Thresholds = Annotated[bool, typer.Option("--thresholds", help=_THRESHOLDS_HELP)]
MaxMinutes = Annotated[float | None, typer.Option(min=0.01, help="End the training, schedule included, by then.")]
ImageSize = Annotated[int | None, typer.Option(min=1, help="Scale the images to this size.")]
Place = Annotated[Device, typer.Option(help="Where to train.")]
Compile = Annotated[bool, typer.Option("--compile", help="Use torch.compile once the widths are final.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's.")]
Seed = Annotated[int, typer.Option(help="Seed of all random numbers.")]
Out = Annotated[Path | None, typer.Option(help=_OUT_HELP)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a run that is in the output folder.")]
Resume = Annotated[Path | None, typer.Option(help=_RESUME_HELP)]

_WITH_RESUME = frozenset({"resume", "device", "threads"})


def refuse_beside_resume(context: typer.Context) -> None:
    """Check that no option is given which a run that goes on has already.

    Raises:
        FxwidthError: one is.
    """
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    others = [f"--{name.strip('_').replace('_', '-')}" for name in given if name not in _WITH_RESUME]
    if others:
        raise FxwidthError(f"--resume goes on with the options of the run; leave out {', '.join(others)}")


def with_defaults(
    config: TrainingConfig, model: str, dataset: str, epochs: int | None, rate: float | None, target: float | None
) -> TrainingConfig:
    """Return the configuration with what is not given (None) set to what suits the model and the data set."""
    is_seed = model == SEED_RESNET
    if epochs is None:
        epochs = _EPOCHS.get(dataset, _FOLDER_EPOCHS)
    if rate is None:
        rate = _SEED_RATE if is_seed and not config.thresholds else _OTHER_RATE
    if target is None and not config.thresholds:
        of_seed = _SEED_TARGET if dataset in DATASETS else _FOLDER_TARGET
        target = of_seed if is_seed else _OTHER_TARGET
    return replace(config, epochs=epochs, learning_rate=rate, target_params=target)
