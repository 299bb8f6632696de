"""How much memory the process has."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

import torch

_STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    """Return the memory of the process in bytes: the most that it ever had where the present is not told, or else 0."""
    if sys.platform == "win32":
        return 0
    import resource

    with suppress(OSError):
        return int(_STATM.read_bytes().split()[1]) * resource.getpagesize()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def cuda_bytes() -> int:
    """Return the bytes of tensors on all CUDA devices, 0 where CUDA is not in use or its allocator tells none."""
    if not torch.cuda.is_initialized():
        return 0
    with suppress(RuntimeError):
        return sum(map(torch.cuda.memory_allocated, range(torch.cuda.device_count())))
    return 0


def give_back_free_memory() -> None:
    """Have the C library hand what nothing is kept in to the system, where it can: it counts as resident until then."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # other C libraries than GNU's have no such function
            ctypes.CDLL(None).malloc_trim(0)
