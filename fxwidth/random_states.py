"""The states of the global random number generators, which what only looks at a model leaves as they are."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def same_randomness() -> Iterator[None]:
    """Leave the global generators of torch (on the CPU and on CUDA devices in use), numpy and Python as they are."""
    on_cpu, of_numpy, of_python = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        torch.set_rng_state(on_cpu)
        np.random.set_state(of_numpy)  # noqa: NPY002
        random.setstate(of_python)
        if on_cuda:
            torch.cuda.set_rng_state_all(on_cuda)
