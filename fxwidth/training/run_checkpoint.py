"""A training run in a file, from which it goes on as if it had not been interrupted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

import fxwidth
from fxwidth.checkpoint.loading import further_in, load
from fxwidth.checkpoint.saving import save_tensors
from fxwidth.errors import FxwidthError
from fxwidth.training.loop import State
from fxwidth.training.outputs import CHECKPOINT_FILE, EARLIER_CHECKPOINT
from fxwidth.training.runs import TrainingConfig

_VERSION = 2


@dataclass(frozen=True)
class Job:
    """What is trained on what, and how: all that a run starts from.

    Attributes:
        model: the name of the network.
        dataset: the name of the data set, or a folder of images.
        data: the folder of its files.
        image_size: what the images are scaled to.
        device: where to train.
        config: how.
    """

    model: str
    dataset: str
    data: str | None
    image_size: int | None
    device: str
    config: TrainingConfig

    def settings(self) -> dict[str, Any]:
        """Return what a history tells of it, with the versions that a run depends on."""
        versions = {"fxwidth": fxwidth.__version__, "torch": str(torch.__version__)}
        return {"model": self.model, "dataset": self.dataset, "device": self.device, **asdict(self.config), **versions}


def write_checkpoint(folder: Path, job: Job, gm: GraphModule, state: State) -> None:
    """Write a run as it is to its folder; the file that was there is replaced when the new one is complete."""
    run = {"version": _VERSION, "job": asdict(job), "state": state}
    save_tensors(gm, folder / CHECKPOINT_FILE, further=run)


def read_checkpoint(folder: Path) -> tuple[Job, State]:
    """Return a run and its state, from the folder of the run; `read_graph` gives its graph.

    Raises:
        FxwidthError: there is none, or one that this version cannot read.
    """
    path = folder / CHECKPOINT_FILE
    if not path.is_file() and (folder / EARLIER_CHECKPOINT).is_file():
        raise FxwidthError(
            f"--resume {folder}: {EARLIER_CHECKPOINT} is a pickle of an earlier fxwidth, which can run any code and is "
            "not read; go on with the fxwidth that wrote it, or train anew with --overwrite"
        )
    if not path.is_file():
        raise FxwidthError(f"--resume {folder}: there is no {CHECKPOINT_FILE}; a run writes it after each epoch")
    try:
        run = further_in(path)
    except FxwidthError as error:
        raise FxwidthError(f"--resume {folder}: {error}") from error
    if not isinstance(run, Mapping) or run.get("version") != _VERSION:
        raise FxwidthError(f"--resume {folder}: {CHECKPOINT_FILE} is of another version of fxwidth, or no run at all")
    try:
        job = dict(run["job"])
        return Job(**{**job, "config": TrainingConfig(**job["config"])}), run["state"]
    except (KeyError, TypeError) as error:
        raise FxwidthError(f"--resume {folder}: {CHECKPOINT_FILE} tells of no run ({error})") from error


def read_graph(folder: Path, make: Callable[[], GraphModule]) -> GraphModule:
    """Return the graph of a run, equal to the bit, at the widths that it had reached.

    Args:
        folder: that of the run.
        make: returns the graph that the run has started from, of any values.

    Raises:
        FxwidthError: it is another graph.
    """
    return load(folder / CHECKPOINT_FILE, make)
