"""Networks in which batch norms stand right behind the writers of linear groups, and what tests ask of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

import fxwidth
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.importance.estimates import Evidence
from fxwidth.reconstruction.basis_change import Rotation, rotated
from fxwidth.rewriting.transaction import Transaction
from fxwidth.statistics.moments import Moments, moments_from_data
from fxwidth.tracing.analyze import analyze_module
from fxwidth.weights.readers import wiring_of
from tests.zoo.nets import tokens, trained_like


class Inverted(nn.Module):
    """Mobilenet's block: wider, each channel by itself, back again by a linear map, all of it added to what came in."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.expand, self.first = nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.second = nn.BatchNorm2d(inner)
        self.project, self.last = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.relu6(self.first(self.expand(x)))
        y = nn.functional.relu6(self.second(self.depthwise(y)))
        return x + self.last(self.project(y))


class Mobile(nn.Module):
    """A bottleneck that three batch norms write and three convolutions read."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3)
        self.project, self.norm = nn.Conv2d(16, width, 1, bias=False), nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Inverted(width, 20), Inverted(width, 20))
        self.last, self.head = nn.Conv2d(width, 12, 1), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.norm(self.project(self.stem(x).relu())))
        return self.head(self.last(x).relu().mean((2, 3)))


class Spatial(nn.Module):
    """Kernels of more than one position, with a bias, and one of the groups of channels each for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(x))).relu())


class Flattened(nn.Module):
    """A layer on tokens, which are flattened for the batch norm; then two readers, one of them of a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Linear(16, 10, bias=False), nn.BatchNorm1d(10)
        self.two, self.left, self.right = nn.Linear(16, 10), nn.Linear(10, 7), nn.Linear(10, 5)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        y = self.norm(y.flatten(0, 1)).reshape_as(y)
        z = y + self.two(x.tanh())
        return self.head(torch.cat([self.left(y).relu(), self.right(z).relu()], -1))


class Parts(nn.Module):
    """One layer and its batch norm make what two others read each a part of."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Linear(16, 14), nn.BatchNorm1d(14)
        self.left, self.right, self.head = nn.Linear(8, 7), nn.Linear(6, 5), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.norm(self.one(x[:, 0])).split([8, 6], -1)
        return self.head(torch.cat([self.left(left).relu(), self.right(right).relu()], -1))


class Heads(nn.Module):
    """Queries, keys and values of two heads come from one layer and its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.norm = nn.Linear(16, 20), nn.Linear(20, 36, bias=False), nn.BatchNorm1d(36)
        self.out, self.head = nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(self.embed(x).relu())
        y = self.norm(y.flatten(0, 1)).reshape_as(y)
        q, k, v = y.unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4).unbind()
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(self.out(y.transpose(1, 2).flatten(2)).relu()).mean(1)


def images() -> Tensor:
    return torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str]] = {
    "mobile": (Mobile, images, "project"),
    "spatial": (Spatial, images, "first"),
    "flattened": (Flattened, tokens, "one"),
    "vectors": (
        lambda: nn.Sequential(nn.Linear(16, 10), nn.BatchNorm1d(10), nn.Linear(10, 4), nn.ReLU(), nn.Linear(4, 2)),
        lambda: tokens()[:, 0],
        "0",
    ),
}
WRITERS_AND_READERS = {"mobile": (3, 3), "spatial": (1, 1), "flattened": (1, 2), "vectors": (1, 1)}


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, inputs, _ = NETS[name]
    net = trained_like(make())
    # A gain may have any sign.
    with torch.no_grad():
        for part in net.modules():
            if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
                part.weight[::3] *= -1
    return net, inputs()


def traced(name: str) -> tuple[fx.GraphModule, Tensor, WidthGraph, ChannelGroup]:
    net, x = made(name)
    gm = fxwidth.trace(net, x[:4])
    graph = WidthGraph(analyze_module(gm))
    return gm, x, graph, graph[NETS[name][2]]


def turned(name: str) -> tuple[fx.GraphModule, Tensor, WidthGraph, Rotation, Moments]:
    gm, x, graph, group = traced(name)
    moments = moments_from_data(graph, [x])
    assert moments is not None
    found = Evidence(graph, moments, rotates=True).rotation(group)
    assert found is not None
    return gm, x, graph, found, moments


def relative(new: Tensor, old: Tensor) -> float:
    return float((new - old).norm() / old.norm())


@torch.no_grad()
def change(name: str) -> float:
    """Return by how much a rotation changes what a network computes."""
    gm, x, graph, found, moments = turned(name)
    expected = gm(x)
    rotated(wiring_of(graph), found, moments, Transaction())
    return relative(gm(x), expected)


@torch.no_grad()
def measured(net: nn.Module, x: Tensor) -> nn.Module:
    """Give batch norms the statistics of these inputs."""
    norms = [part for part in net.modules() if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d))]
    for part in norms:
        part.reset_running_stats()
        part.momentum = None
    net.train()(x)
    for part in norms:
        part.momentum = 0.1
    return net.eval()
