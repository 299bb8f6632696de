"""Random numbers that are drawn while a model is traced: a graph would hold one draw, or the way that it has led."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from fxwidth.runtime.random_states import Generator, Generators
from fxwidth.runtime.trace_guards import UntraceableError

# The largest number below 1 in single precision.
ALMOST_ONE = 1 - 2**-24


@contextmanager
def refusing_draws(own: Iterable[Generator]) -> Iterator[None]:
    """Refuse draws from the generators of Python, numpy and torch, and some others, and put these back.

    Raises:
        UntraceableError: a number has been drawn.
    """
    generators = Generators(own)
    try:
        yield
        refuse_draws(generators)
    finally:
        generators.restore()


def refuse_draws(since: Generators) -> None:
    """Check that no number has been drawn since the states of the generators were taken.

    Raises:
        UntraceableError: one has, which the graph would hold as a constant or a way that was taken.
    """
    if since.have_moved():
        raise UntraceableError("random numbers are drawn while the model is traced, which a graph does not repeat")


class _Draw(float):
    """A single random number of torch as one of Python."""

    def item(self) -> float:
        return float(self)


@contextmanager
def drawing(number: float) -> Iterator[list[nn.Module | None]]:
    """Let every single random number, uniform between 0 and 1, be the given one.

    Yields a list that takes the modules whose code has drawn, None for code of no module.
    """
    drawers: list[nn.Module | None] = []

    def drawn() -> _Draw:
        drawers.append(_module_at_work())
        return _Draw(number)

    def within(low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * drawn()

    rand = torch.rand

    def rand_of_shape(*size: Any, **options: Any) -> Any:
        shape = size[0] if len(size) == 1 and isinstance(size[0], (list, tuple)) else size
        return drawn() if tuple(shape) in ((), (1,)) else rand(*size, **options)

    stead: list[tuple[Any, str, Callable[..., Any]]] = [
        (torch, "rand", rand_of_shape),
        (random, "random", drawn),
        (random, "uniform", within),
        (np.random, "random", drawn),
        (np.random, "uniform", within),
    ]
    with ExitStack() as stack:
        for owner, name, function in stead:
            stack.enter_context(patch.object(owner, name, function))
        yield drawers


def _module_at_work() -> nn.Module | None:
    """Return the innermost module whose method is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return owner
        frame = frame.f_back
    return None
