"""The states of the global random number generators, which what only looks at a model leaves as they are."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class Generators:
    """The states of the generators that a model's code may draw from: Python's, numpy's, torch's on every device."""

    def __init__(self) -> None:
        self._python, self._numpy, self._torch = _now()

    def have_moved(self) -> bool:
        """Tell whether a number has been drawn since."""
        python, numpy, own = _now()
        kept = numpy[0] == self._numpy[0] and np.array_equal(numpy[1], self._numpy[1]) and numpy[2:] == self._numpy[2:]
        same = len(own) == len(self._torch) and all(map(torch.equal, own, self._torch))
        return python != self._python or not kept or not same

    def restore(self) -> None:
        """Put the generators back."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._torch[0])
        if len(self._torch) > 1:
            torch.cuda.set_rng_state_all(self._torch[1:])


def _now() -> tuple[Any, Any, list[torch.Tensor]]:
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return random.getstate(), np.random.get_state(), [torch.get_rng_state(), *on_cuda]  # noqa: NPY002


@contextmanager
def same_randomness() -> Iterator[None]:
    """Leave the global generators as they are."""
    generators = Generators()
    try:
        yield
    finally:
        generators.restore()
