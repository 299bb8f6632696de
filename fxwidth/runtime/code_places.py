"""Places in code: which lines are a user's, and how they are told."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path

import numpy as np
import torch

# Code of these is no place that a user can change. By folder: a checkout may lie in one that is called the same.
LIBRARIES = tuple(
    f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(np.__file__).parent, Path(__file__).parents[1])
)
_PYTHON = f"{sysconfig.get_paths()['stdlib']}{os.sep}"


def fault_place(error: BaseException) -> str | None:
    """Return where an error arose in code that is none of torch, numpy, Python or ours: file, line and function.

    Of several calls that led to it, the last is told; None where there is none.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        one for one in frames if not one.filename.startswith((*LIBRARIES, "<frozen")) and not _is_python(one.filename)
    ]
    if not own:
        return None
    last = own[-1]
    return f"{last.filename}, line {last.lineno}, in {last.name}"


def _is_python(filename: str) -> bool:
    return filename.startswith(_PYTHON) and "site-packages" not in filename
