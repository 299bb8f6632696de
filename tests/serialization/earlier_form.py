"""Files of tensors in the form that earlier versions wrote: without a digest and without a record of the graph."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxwidth.checkpoint.file_record import steps_of
from fxwidth.serialization.plain_trees import decoded


def tensors_in(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


def earlier_texts(path: Path) -> dict[str, str]:
    """Return what the header of a file would have said before there was a record."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    record = json.loads(metadata["fxwidth.record"])
    steps = steps_of(decoded(record["history"]))
    told = {
        "fxwidth.resizes": [step.widths for step in steps],
        "fxwidth.norms": [step.norms for step in steps],
        "fxwidth.kept": [step.kept for step in steps],
        "fxwidth.copies": [step.copies for step in steps],
        "fxwidth.untied": record["untied"],
    }
    return {name: json.dumps(value) for name, value in told.items()}


def write_earlier(path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
    """Write tensors as earlier versions did."""
    save_file(dict(tensors), path, metadata=dict(texts))
