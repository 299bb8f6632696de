"""What a table says of where it was made."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import fxwidth


def one_thread() -> dict[str, str]:
    """Return the machine and the versions of a benchmark that runs beside Torch-Pruning on one thread."""
    names = ("torch", "torchvision", "torch-pruning")
    versions = {"fxwidth": fxwidth.__version__, "python": platform.python_version()} | {n: version(n) for n in names}
    load = f"load average {os.getloadavg()[0]:.1f} when the table was made"
    return {"machine": f"{os.cpu_count()} cores, CPU, one thread; {load}"} | versions
