"""What a table says of where it was made."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import fxwidth


def machine(*packages: str, threads: int = 1, device: str = "CPU") -> dict[str, str]:
    """Return the machine and the versions of fxwidth, Python and some packages, as a table tells them.

    Args:
        packages: names of installed packages, besides these.
        threads: how many a measured process has.
        device: on what it runs.
    """
    load = f"load average {os.getloadavg()[0]:.1f}"
    count = "one thread" if threads == 1 else f"{threads} threads"
    versions = {"fxwidth": fxwidth.__version__, "python": platform.python_version()}
    return (
        {"machine": f"{os.cpu_count()} cores, {device}, {count}; {load}"} | versions | {n: version(n) for n in packages}
    )


def processor() -> str:
    """Return the processor's name as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
