"""Sizes that are too involved to be kept open: of some models the exporter would work on them for minutes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch.utils._sympy.value_ranges import bound_sympy

# Language models need about 20, convolutional networks 100; of windows that are padded and rolled there are thousands.
_MOST_BOUNDS = 600


class InvolvedSizesError(Exception):
    """The sizes of inputs cannot all be kept open with a reasonable effort."""


@contextmanager
def bounded_effort() -> Iterator[None]:
    """End an export in which the bounds of too many expressions of sizes are asked for.

    It goes by their number and not by time, so that a fast machine makes the same graph as a slow one.

    Raises:
        InvolvedSizesError: there are too many.
    """
    count = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count > _MOST_BOUNDS:
            raise InvolvedSizesError(f"the bounds of more than {_MOST_BOUNDS} expressions of sizes")
        return bound_sympy(*args, **kwargs)

    with patch("torch.fx.experimental.symbolic_shapes.bound_sympy", counted):
        yield
