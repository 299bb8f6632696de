"""Networks whose groups are written in every way that a penalty must follow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import fxwidth
from tests.zoo.nets import NETS, tokens, trained_like


class LowRankUpdate(nn.Module):
    """A layer whose weight is a sum with a product of two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 16))
        self.a, self.b = nn.Parameter(torch.randn(7, 2)), nn.Parameter(torch.randn(2, 16))
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x, self.weight + self.a @ self.b).relu())


def normed() -> nn.Module:
    """Return layers with weight norm and spectral norm, and one with a mask."""
    layers = [
        *(parametrizations.weight_norm(nn.Linear(16, 9)), nn.ReLU()),
        *(parametrizations.spectral_norm(nn.Linear(9, 8)), nn.ReLU()),
        *(nn.Linear(8, 7), nn.ReLU()),
        nn.Linear(7, 3),
    ]
    prune.random_unstructured(layers[4], "weight", 0.4)
    return nn.Sequential(*layers)


def made(name: str) -> tuple[fx.GraphModule, Tensor]:
    """Return a network in float64, traced, and inputs for it."""
    torch.manual_seed(0)
    make, inputs = ALL[name]
    x = inputs()
    net = make()
    # Masks and singular vectors are no values to be drawn.
    net = net.double().eval() if make is normed else trained_like(net)
    return fxwidth.trace(net, x[:4]), x


ALL: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    **NETS,
    "normed": (normed, tokens),
    "low-rank update": (LowRankUpdate, tokens),
}
