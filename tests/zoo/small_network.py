"""A network like the seed's, but small enough for tests."""

from __future__ import annotations

from torch import nn

from fxwidth.training.networks import TiledResidualBlock


def small_network() -> nn.Sequential:
    """Return a network for 8x8 grey images and ten classes."""
    blocks = [TiledResidualBlock(1, 7, 12), nn.MaxPool2d(2), TiledResidualBlock(12, 20, 24)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(24 * 4 * 4, 10))
