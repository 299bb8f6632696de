"""A table of networks that are hard to resize, and what their definitions share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A network, its example inputs, and the number of free groups that a careful reader finds in it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], list[Tensor]]
    free: int


CASES: dict[str, Case] = {}


def case(free: int, inputs: Callable[[], list[Tensor]], *arguments: Any) -> Callable[[type], type]:
    """Register a network class."""

    def register(network: type) -> type:
        CASES[network.__name__] = Case(lambda: network(*arguments), inputs, free)
        return network

    return register


def images(channels: int = 3, size: int = 14, batch: int = 2) -> Callable[[], list[Tensor]]:
    return lambda: [torch.randn(batch, channels, size, size)]


def vectors(width: int = 10, batch: int = 3) -> Callable[[], list[Tensor]]:
    return lambda: [torch.randn(batch, width)]


def tokens(width: int = 16, length: int = 5, batch: int = 2) -> Callable[[], list[Tensor]]:
    return lambda: [torch.randn(batch, length, width)]


def words(vocabulary: int = 30, length: int = 5, batch: int = 2) -> Callable[[], list[Tensor]]:
    return lambda: [torch.randint(vocabulary, (batch, length))]


def conv(into: int, out: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(into, out, size, padding=size // 2, **options)


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))
