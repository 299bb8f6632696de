"""Seconds, peaks of memory, and how a cost grows with a size."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable
from math import log
from pathlib import Path

import numpy as np

MIB, GIB = 2**20, 2**30


class Clock:
    """CPU and wall seconds since it was made, or last read."""

    def __init__(self) -> None:
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def read(self) -> dict[str, float]:
        """Return the seconds so far, and begin anew."""
        cpu, wall = time.process_time(), time.perf_counter()
        seconds = {"cpu": cpu - self._cpu, "wall": wall - self._wall}
        self._cpu, self._wall = cpu, wall
        return seconds


def told(times: dict[str, float]) -> str:
    """Return CPU seconds, with wall seconds in brackets."""
    return f"{times['cpu']:.1f} ({times['wall']:.1f})"


def forget_peak() -> int:
    """Have the kernel take the present memory of this process for its peak, and return it in bytes."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak()


def peak() -> int:
    """Return the peak of this process's memory in bytes, as Linux gives it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def exponent(sizes: Iterable[float], costs: Iterable[float]) -> float:
    """Return the slope of the log of a cost over the log of a size, by least squares."""
    slope, _ = np.polyfit([log(size) for size in sizes], [log(cost) for cost in costs], 1)
    return float(slope)
