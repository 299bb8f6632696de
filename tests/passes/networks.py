"""Networks for passes, in double precision, with settled batch norms, and what they share."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxwidth


class Folded(nn.Module):
    """Batch norms behind every kind of layer, as modules and as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.up, self.up_norm = nn.ConvTranspose2d(8, 6, 3, groups=2), nn.BatchNorm2d(6, affine=False)
        self.grouped, self.grouped_norm = nn.Conv2d(6, 6, 1, groups=3), nn.BatchNorm2d(6, eps=0.1)
        self.kernel, self.own = nn.Parameter(torch.randn(6, 6, 1, 1)), nn.BatchNorm2d(6)
        self.head, self.head_norm = nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(self.grouped_norm(self.grouped(self.up_norm(self.up(x)))))
        own = self.own
        x = F.conv2d(bias=None, weight=self.kernel, input=x)
        x = F.batch_norm(x, own.running_mean, own.running_var, own.weight, own.bias, self.training, eps=own.eps)
        return self.head_norm(self.head(x.mean((2, 3))))


class Exported(Folded):
    """The same, which symbolic tracing cannot take: its graph is one of ATen ops."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 100:
            x = x * 2
        return super().forward(x)


class LowRank(nn.Module):
    """A convolution over single positions, a layer and a bare weight, all of rank 4."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.point = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 24, 1, stride=2, padding=1)
        self.layer, self.kernel = nn.Linear(24, 20), nn.Parameter(torch.randn(20, 20))
        self.head = nn.Linear(20, 5)
        self.double()
        for weight in (self.point.weight, self.layer.weight, self.kernel):
            lowered(weight, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.point(torch.relu(self.stem(x)))).mean((2, 3))
        return self.head(torch.relu(F.linear(weight=self.kernel, input=torch.relu(self.layer(x)))))


class ExportedLowRank(LowRank):
    """The same in ATen ops."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 100:
            x = x * 2
        return super().forward(x)


class Needless(nn.Module):
    """What can be left out, and what cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.same, self.drop, self.never = nn.Identity(), nn.Dropout(0.5), nn.Dropout(0.0)
        self.unread, self.unread_norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.unread_drop = nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.never(self.same(torch.relu(self.norm(self.first(x)))))
        torch.exp(self.unread(x))
        self.unread_norm(x)
        self.unread_drop(x)
        self.count.add_(1)
        return self.last(F.dropout(self.drop(x), 0.3, self.training))


class ExportedNeedless(Needless):
    """The same in ATen ops, and random numbers that nobody reads."""

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(3)
        return super().forward(x)


def lowered(weight: nn.Parameter, rank: int) -> None:
    """Give a weight a rank."""
    with torch.no_grad():
        left, values, right = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        values[rank:] = 0
        weight.copy_((left * values @ right).reshape(weight.shape))


def settled(model: nn.Module) -> nn.Module:
    """Set batch norms as training might, and all in double precision and evaluation."""
    for norm in (part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        if norm.affine:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return model.double().eval()


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 8, 8, dtype=torch.float64)


def small() -> nn.Sequential:
    layers = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4)]
    # Nothing nonlinear is between these.
    layers.append(nn.Linear(4, 4))
    return settled(nn.Sequential(*layers))  # type: ignore[return-value]


def small_graph() -> tuple[nn.Sequential, fx.GraphModule, Tensor]:
    """Return a model, its graph and an input."""
    model, x = small(), torch.randn(16, 8, dtype=torch.float64)
    return model, fxwidth.trace(model, x), x


def names(gm: fx.GraphModule) -> list[str]:
    return [node.name for node in gm.graph.nodes]


def largest(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max())
