"""Numbers as Python has them: options and plans take those of NumPy and of tensors like its own."""

from __future__ import annotations

import math
from operator import index
from typing import Any


def plain_number(value: Any) -> Any:
    """Return one number as Python's int, float or bool, whatever holds it; anything else as it is."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(plain, bool):
        return plain
    if hasattr(plain, "__index__"):
        return index(plain)
    return float(plain) if isinstance(plain, float) else value


def is_integer(value: Any) -> bool:
    """Tell whether a plain number is an integer, which a bool is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def floor_of(bound: float) -> int:
    """Return the largest integer that is not above a bound, which rounding may have made a little smaller."""
    return math.floor(bound * (1 + 1e-12))
