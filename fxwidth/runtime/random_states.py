"""The states of random number generators, which what only looks at a model leaves as they are."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

Generator = random.Random | np.random.Generator | np.random.RandomState | np.random.BitGenerator
# A system's source of randomness has no state.
OWN_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)


class Generators:
    """The states of the generators that a model's code may draw from: Python's, numpy's, torch's on every device.

    Args:
        own: generators of Python and numpy beside the global ones.
    """

    def __init__(self, own: Iterable[Generator] = ()) -> None:
        self._python, self._numpy, self._torch = _now()
        self._own = [(one, _state_of(one)) for one in own if not isinstance(one, random.SystemRandom)]

    def have_moved(self) -> bool:
        """Tell whether a number has been drawn since."""
        python, numpy, own = _now()
        kept = numpy[0] == self._numpy[0] and np.array_equal(numpy[1], self._numpy[1]) and numpy[2:] == self._numpy[2:]
        same = len(own) == len(self._torch) and all(map(torch.equal, own, self._torch))
        moved = any(pickle.dumps(_state_of(one)) != pickle.dumps(state) for one, state in self._own)
        return python != self._python or not kept or not same or moved

    def restore(self) -> None:
        """Put the generators back."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._torch[0])
        if len(self._torch) > 1:
            torch.cuda.set_rng_state_all(self._torch[1:])
        for one, state in self._own:
            _put_back(one, state)


def _now() -> tuple[Any, Any, list[torch.Tensor]]:
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return random.getstate(), np.random.get_state(), [torch.get_rng_state(), *on_cuda]  # noqa: NPY002


def _state_of(one: Generator) -> Any:
    if isinstance(one, random.Random):
        return one.getstate()
    if isinstance(one, np.random.RandomState):
        return one.get_state(legacy=False)
    return (one.bit_generator if isinstance(one, np.random.Generator) else one).state


def _put_back(one: Generator, state: Any) -> None:
    if isinstance(one, random.Random):
        one.setstate(state)
    elif isinstance(one, np.random.RandomState):
        one.set_state(state)
    else:
        (one.bit_generator if isinstance(one, np.random.Generator) else one).state = state


@contextmanager
def same_randomness(own: Iterable[Generator] = ()) -> Iterator[None]:
    """Leave the global generators, and some others, as they are."""
    generators = Generators(own)
    try:
        yield
    finally:
        generators.restore()
