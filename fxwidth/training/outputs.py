"""What a training run leaves in its output folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from fxwidth.checkpoint import save
from fxwidth.training.curves import save_curves
from fxwidth.training.loop import TrainingResult

HISTORY_FILE = "history.json"
CURVES_FILE = "curves.png"
MODEL_FILE = "model.pt"


def write_outputs(out: Path, gm: GraphModule, result: TrainingResult, settings: Mapping[str, Any]) -> None:
    """Write the evolved model, the history of plans as JSON and the curves as a PNG into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    save(gm, out / MODEL_FILE)
    record = {"settings": dict(settings), **asdict(result)}
    (out / HISTORY_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")
    save_curves(result, out / CURVES_FILE)
