"""Small networks to compile, and what their parameters have become."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.nets import trained_like


def convolutional() -> nn.Module:
    """Two convolutions with batch norms, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 8, 8, dtype=torch.float64)


def evaluated() -> nn.Module:
    """Return the network in eval mode and float64, with running statistics as of training."""
    torch.manual_seed(0)
    return trained_like(convolutional()).double().eval()


class Broken(nn.Module):
    """Two parts between which the graph breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
        self.second = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


class Normed(nn.Module):
    """A residual stream with layer norms, of which the eps follows the width."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 12)
        self.norm = nn.LayerNorm(12)
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(self.up(self.norm(x)).relu())
        return self.head(self.norm(x)).reshape(x.shape[0], -1)


class TwoInputs(nn.Module):
    """One that takes two tensors, and uses the second first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 16), nn.Linear(5, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.b(y).relu() + self.a(x).relu())
