"""A training run in a file, from which it goes on as if it had not been interrupted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

import fxwidth
from fxwidth.checkpoint.packing import packed, unpacked
from fxwidth.errors import FxwidthError
from fxwidth.runtime.atomic_files import replacing
from fxwidth.training.loop import State
from fxwidth.training.outputs import CHECKPOINT_FILE
from fxwidth.training.runs import TrainingConfig

_VERSION = 1


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
        versions = {"fxwidth": fxwidth.__version__, "torch": torch.__version__}
        return {"model": self.model, "dataset": self.dataset, "device": self.device, **asdict(self.config), **versions}


def write_checkpoint(folder: Path, job: Job, gm: GraphModule, state: State) -> None:
    """Write a run as it is to its folder; the file that was there is replaced when the new one is complete."""
    record = {"version": _VERSION, "job": asdict(job), "graph": packed(gm), "state": state}
    with replacing(folder / CHECKPOINT_FILE) as path:
        torch.save(record, path)


def read_checkpoint(folder: Path) -> tuple[Job, GraphModule, State]:
    """Return a run, its graph and its state, from the folder of the run.

    The graph in it is Python's pickle, which can run any code: a folder to go on from must be from someone whom you
    trust, as `--resume` says.

    Raises:
        FxwidthError: there is none, or one that this version cannot read.
    """
    path = folder / CHECKPOINT_FILE
    if not path.is_file():
        raise FxwidthError(f"--resume {folder}: there is no {CHECKPOINT_FILE}; a run writes it after each epoch")
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FxwidthError(f"--resume {folder}: {CHECKPOINT_FILE} cannot be read ({error})") from error
    if not isinstance(record, Mapping) or record.get("version") != _VERSION:
        raise FxwidthError(f"--resume {folder}: {CHECKPOINT_FILE} is of another version of fxwidth, or no run at all")
    job = dict(record["job"])
    return (
        Job(**{**job, "config": TrainingConfig(**job["config"])}),
        unpacked(record["graph"], path, trusted=True),
        record["state"],
    )
