"""Layers that do other things in training than in evaluation, in networks for each front end."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import StochasticDepth

WIDTH, HIDDEN, OUT = 8, 12, 5


def by_forward(forward: Callable[[Any, Tensor], Tensor]) -> type[nn.Module]:
    """Return a module type of which only the forward is of interest."""
    return type(forward.__name__, (nn.Module,), {"forward": forward, "__module__": __name__})


@by_forward
def DropPath(self: nn.Module, x: Tensor) -> Tensor:  # noqa: N802 - a type
    """Stochastic depth, with the mask made from the operand."""
    if not self.training:
        return x
    mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.7)
    return x * mask.div_(0.7)


@by_forward
def DropConnect(self: nn.Module, x: Tensor) -> Tensor:  # noqa: N802
    """Stochastic depth, with a mask of the batch's size, which symbolic tracing cannot follow."""
    if not self.training:
        return x
    mask = torch.floor(0.7 + torch.rand([x.shape[0], 1], dtype=x.dtype))
    return x / 0.7 * mask


@by_forward
def GaussianNoise(self: nn.Module, x: Tensor) -> Tensor:  # noqa: N802
    if self.training:
        x = x + 0.1 * torch.randn_like(x)
    return x


@by_forward
def InPlaceNoise(self: nn.Module, x: Tensor) -> Tensor:  # noqa: N802
    x = x * 1
    if self.training:
        x *= 1 + 0.1 * torch.randn_like(x)
    return x


@by_forward
def AlwaysDropout(self: nn.Module, x: Tensor) -> Tensor:  # noqa: N802
    return functional.dropout(x, 0.4)


@by_forward
def DropoutByNumber(self: nn.Module, x: Tensor) -> Tensor:  # noqa: N802
    return functional.dropout(x, 0.4 if self.training else 0.0)


@by_forward
def DropoutByFlag(self: nn.Module, x: Tensor) -> Tensor:  # noqa: N802
    return functional.dropout(x, 0.4, self.training)


@by_forward
def AttentionDropout(self: nn.Module, x: Tensor) -> Tensor:  # noqa: N802
    q = x[:, None]
    return functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5 if self.training else 0.0)[:, 0]


@by_forward
def AttentionInOrder(self: nn.Module, x: Tensor) -> Tensor:  # noqa: N802
    """Attention whose result lies otherwise in memory where it has dropout, as the exporter sees it."""
    q = x.view(x.shape[0], 3, 2, -1).transpose(1, 2)
    out = functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5 if self.training else 0.0, scale=0.3)
    return out.transpose(1, 2).contiguous().reshape(x.shape[0], -1)


@by_forward
def RandomSlopes(self: nn.Module, x: Tensor) -> Tensor:  # noqa: N802
    return functional.rrelu(x, training=self.training)


@by_forward
def SoftInEvaluation(self: nn.Module, x: Tensor) -> Tensor:  # noqa: N802
    return x if self.training else x.softmax(-1) * 3


@by_forward
def Gumbel(self: nn.Module, x: Tensor) -> Tensor:  # noqa: N802
    return functional.gumbel_softmax(x) if self.training else x.sigmoid()


@by_forward
def ConstantNoise(self: nn.Module, x: Tensor) -> Tensor:  # noqa: N802
    """Noise of a fixed width in both modes, which symbolic tracing would draw once."""
    return x + torch.randn(HIDDEN, dtype=torch.float64)


class TrainedNoise(nn.Module):
    """Noise by a parameter that training alone uses."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * torch.randn_like(x) if self.training else x


class NoisyWeight(nn.Module):
    """A linear layer whose weight is noisy in training."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(HIDDEN, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + 0.1 * torch.randn_like(self.weight) if self.training else self.weight
        return functional.linear(x, weight)


class CalledInTraining(nn.Module):
    """A submodule that training alone calls."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x) if self.training else x


class TwoValues(nn.Module):
    """Two values that differ in training, and are put together later."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.sin(), x.cos()
        if self.training:
            noise = torch.rand_like(x)
            first, second = first * noise, second * (1 - noise)
        return self.mix(first) + second


class LayerDrop(nn.Module):
    """Layers that are skipped at random, as the numbers of a generator decide."""

    def __init__(self, draw: Callable[[], Any], rate: float = 0.5, p: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.draw, self.rate, self.p = draw, rate, p

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.training:
                drawn = self.draw()
                if drawn < self.rate:
                    continue
            x = x + functional.dropout(layer(x), self.p, self.training)
        return x


def of_torch() -> Tensor:
    return torch.rand([])


def of_python() -> float:
    return random.uniform(0, 1)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "drop path": DropPath,
    "drop connect": DropConnect,
    "drop connects": lambda: nn.Sequential(DropConnect(), nn.Linear(HIDDEN, HIDDEN), DropConnect()),
    "stochastic depth": lambda: StochasticDepth(0.3, "row"),
    "noise": GaussianNoise,
    "noise in place": InPlaceNoise,
    "dropout always": AlwaysDropout,
    "dropout by number": DropoutByNumber,
    "dropout by flag": DropoutByFlag,
    "attention": AttentionDropout,
    "attention in order": AttentionInOrder,
    "random slopes": RandomSlopes,
    "softmax in evaluation": SoftInEvaluation,
    "gumbel": Gumbel,
    "constant noise": ConstantNoise,
    "trained noise": TrainedNoise,
    "noisy weight": NoisyWeight,
    "called in training": CalledInTraining,
    "two values": TwoValues,
    "batch norm": lambda: nn.BatchNorm1d(HIDDEN),
    "layers dropped at no rate": lambda: LayerDrop(of_torch, 0.0, 0.0),
}
LAYER_DROPS: dict[str, Callable[[], nn.Module]] = {
    "layers dropped by torch": lambda: LayerDrop(of_torch),
    "layers dropped by Python": lambda: LayerDrop(of_python),
}


class Around(nn.Module):
    """A layer between two others, on a residual path."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.up, self.layer, self.mid, self.down = (
            nn.Linear(WIDTH, HIDDEN),
            layer,
            nn.Linear(HIDDEN, HIDDEN),
            nn.Linear(HIDDEN, OUT),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.down((x + self.layer(self.mid(x).relu())).tanh())


class Checked(Around):
    """A check of a shape: symbolic tracing ends there."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != WIDTH:
            raise ValueError("the wrong width")
        return super().forward(x)


class Looking(nn.Module):
    """Looks at a value: every tracer ends there."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.abs().sum() < 1e6 else x / x.abs().sum()


class WithPart(Around):
    """A part that is called as it is."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.look = Looking()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.look(x))


FRONT_ENDS: dict[str, type[Around]] = {"symbolic": Around, "export": Checked, "leaves": WithPart}


class WithHead(nn.Module):
    """A second answer in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, OUT), nn.Linear(HIDDEN, OUT)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Any:
        x = self.drop(self.up(x).relu())
        return (self.down(x), self.head(x)) if self.training else self.down(x)


class NeedsTargets(WithHead):
    """Cannot be called in training with what evaluation takes."""

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if self.training and targets is None:
            raise ValueError("targets are missing")
        return self.down(self.drop(self.up(x).relu()))


class OwnNoise(Around):
    """Noise of a fixed width that the model itself draws, in both modes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn(OUT, dtype=torch.float64)


class Other(nn.Module):
    """Returns one operand in evaluation and the other in training."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return other if self.training else one


class Exchanged(nn.Module):
    """Two layers of which each mode uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, OUT)
        self.exchange = Other()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.exchange(self.one(x), self.other(x)))
