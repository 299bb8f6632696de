"""Networks that are hard to resize, as small as they go, with how many groups of channels must be free in each."""

from __future__ import annotations

from tests.zoo import (  # noqa: F401 - they fill the table
    networks_of_channels,
    networks_of_tokens,
    networks_of_uses,
    networks_of_writes,
)
from tests.zoo.network_cases import CASES, Case

__all__ = ["CASES", "Case"]
