"""What a training run leaves in its output folder, and how it gets one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from fxwidth.checkpoint.saving import save
from fxwidth.errors import FxwidthError
from fxwidth.runtime.atomic_files import replacing
from fxwidth.training.curves import save_curves
from fxwidth.training.runs import TrainingResult

HISTORY_FILE = "history.json"
CURVES_FILE = "curves.png"
MODEL_FILE = "model.pt"
CHECKPOINT_FILE = "checkpoint.safetensors"
EARLIER_CHECKPOINT = "checkpoint.pt"  # of earlier versions, a pickle
_FILES = (HISTORY_FILE, CURVES_FILE, MODEL_FILE, CHECKPOINT_FILE, EARLIER_CHECKPOINT)


def output_folder(given: Path | None, name: str, *, overwrite: bool) -> Path:
    """Return the folder of a new run, made and tried: the one that is given, or runs/NAME, runs/NAME-2 and so on.

    Raises:
        FxwidthError: it holds a run already, or cannot be written to.
    """
    if given is None:
        numbered = (Path("runs") / (name if number == 1 else f"{name}-{number}") for number in count(1))
        folder = next(path for path in numbered if overwrite or not _found(path))
    else:
        folder = given
    if not overwrite and (found := _found(folder)):
        raise FxwidthError(
            f"--out {folder} holds a run already ({', '.join(found)}): choose another folder, go on with that run by "
            f"--resume {folder}, or give --overwrite"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / HISTORY_FILE) as path:
            path.write_text("{}", encoding="utf-8")
        (folder / HISTORY_FILE).unlink()
    except (OSError, FxwidthError) as error:
        reason = error.__cause__ or error
        raise FxwidthError(f"--out {folder} cannot be written to ({reason}): choose another folder") from error
    if overwrite:
        for found_file in _found(folder):
            (folder / found_file).unlink()
    return folder


def write_outputs(out: Path, gm: GraphModule, result: TrainingResult, settings: Mapping[str, Any]) -> None:
    """Write the evolved model, the history of plans as JSON and the curves as a PNG into the folder `out`."""
    save(gm, out / MODEL_FILE)
    record = {"settings": dict(settings), **asdict(result)}
    with replacing(out / HISTORY_FILE) as path:
        path.write_text(json.dumps(record, indent=1), encoding="utf-8")
    with replacing(out / CURVES_FILE) as path:
        save_curves(result, path)


def _found(folder: Path) -> list[str]:
    """Return the files of a run that a folder holds."""
    return [name for name in _FILES if (folder / name).exists()]
