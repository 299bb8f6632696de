"""Groups with linearly dependent channels shrink to their rank, and the function stays as it was to rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxwidth
from fxwidth.axes.positions import channel_positions
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.tracing.analyze import analyze_module
from tests.zoo.nets import Attention, images, tokens, trained_like


class Residual(nn.Module):
    """A stream that two blocks add to; nothing nonlinear stands between its writers and its readers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.inner = nn.ModuleList(nn.Conv2d(8, 6, 3, padding=1) for _ in range(2))
        self.outer = nn.ModuleList(nn.Conv2d(6, 8, 1) for _ in range(2))
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for inner, outer in zip(self.inner, self.outer, strict=True):
            x = x + outer(inner(x).relu())
        return self.head(x).mean((2, 3))


class Concat(nn.Module):
    """Two branches side by side, read together."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 6, 3), nn.Conv2d(1, 7, 3)
        self.head = nn.Conv2d(13, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.left(x), self.right(x)], 1)).mean((2, 3))


class Gated(nn.Module):
    """A gated linear unit."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(16, 8), nn.Linear(16, 8)
        self.down = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class RootMeanSquare(nn.Module):
    """A stream that is read through an RMS norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Linear(16, 8), nn.Linear(8, 8)
        self.norm = nn.RMSNorm(8, eps=1e-3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.body(self.norm(x))
        return self.head(self.norm(x))


def _sequence(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: copy.deepcopy(nn.Sequential(*layers))


@dataclass(frozen=True)
class Case:
    """A network and one of its groups.

    Attributes:
        build: the network.
        inputs: what it is run on.
        group: a parameter that writes the group.
        kinds: the dependencies that leave the function as it is when they are used up.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    group: str
    kinds: tuple[str, ...]


NONLINEAR, LINEAR = ("duplicated", "zero"), ("duplicated", "zero", "combined")
CASES = {
    "plain": Case(_sequence(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 3), nn.Flatten(2)), images, "0", NONLINEAR),
    "flattened": Case(_sequence(nn.Conv2d(1, 6, 5), nn.Flatten(), nn.Linear(96, 3)), images, "0", LINEAR),
    "residual": Case(Residual, images, "stem", LINEAR),
    "concat, one branch": Case(Concat, images, "left", LINEAR),
    "concat, the other": Case(Concat, images, "right", LINEAR),
    "grouped": Case(
        _sequence(nn.Conv2d(1, 12, 3), nn.Conv2d(12, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 3, 1), nn.Flatten(2)),
        images,
        "0",
        LINEAR,
    ),
    "depthwise": Case(
        _sequence(
            nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 3, 1), nn.Flatten(2)
        ),
        images,
        "0",
        NONLINEAR,
    ),
    "batch norm": Case(
        _sequence(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 1, bias=False), nn.BatchNorm2d(3)),
        images,
        "0",
        ("duplicated",),
    ),
    "value-output": Case(Attention, tokens, "v", LINEAR),
    "query-key": Case(Attention, tokens, "q", ("zero",)),
    "bottleneck": Case(_sequence(nn.Linear(16, 8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), tokens, "0", LINEAR),
    "bottleneck with batch norm": Case(
        _sequence(
            nn.Conv2d(1, 6, 3),
            nn.ReLU(),
            nn.Conv2d(6, 8, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 7, 1),
            nn.ReLU(),
            nn.Conv2d(7, 3, 1),
        ),
        images,
        "2",
        ("duplicated", "low rank"),
    ),
    "gated": Case(Gated, tokens, "gate", NONLINEAR),
    "RMS norm": Case(RootMeanSquare, tokens, "embed", ("zero",)),
}
EACH = [(name, kind) for name, case in CASES.items() for kind in case.kinds]


@torch.no_grad()
def plant(graph: WidthGraph, name: str, kind: str) -> int:
    """Make two channels of a group depend on others, in all that writes it; return the rank that is left."""
    group = graph[name]
    for site in group.sites:
        if site.role not in {"writer", "per-channel"} or site.parameter.endswith("num_batches_tracked"):
            continue
        entry = graph.analysis.parameters[site.parameter]
        for positions in channel_positions(graph.analysis.space, entry.axes[site.dim], group.factor):
            rows = entry.tensor.movedim(site.dim, 0)
            a, b = (rows[positions[channel]].clone() for channel in (0, 1))
            if kind == "low rank":
                # Whatever a batch norm makes of each channel, all are made of as many as the rank.
                if site.role == "writer":
                    rows[positions[-1]], rows[positions[-2]] = a - 2 * b, a + 3 * b
                continue
            rows[positions[-1]] = {"duplicated": a, "zero": 0 * a, "combined": a - 2 * b}[kind]
            rows[positions[-2]] = {"duplicated": b, "zero": 0 * a, "combined": a + 3 * b}[kind]
    return group.width - 2


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def planted(name: str, kind: str) -> tuple[torch.fx.GraphModule, Tensor, str, int]:
    """Return a traced network with dependent channels, its inputs, the group and its rank."""
    torch.manual_seed(0)
    case = CASES[name]
    x = case.inputs()
    gm = fxwidth.trace(trained_like(case.build()), x[:4])
    graph = WidthGraph(analyze_module(gm))
    own = [g for g in graph.free if any(s.parameter == f"{case.group}.weight" and s.role == "writer" for s in g.sites)]
    # Not the heads, but the channels in them.
    group = max(own, key=lambda group: group.width)
    return gm, x, group.name, plant(graph, group.name, kind)


# Noise is given the means and deviations that batch norm knows: of channels that depend on each other before it, these
# follow from each other, which statistics made up for a test do not.
@pytest.mark.parametrize(
    ("name", "kind", "with_data"), [(*one, d) for one in EACH for d in (True, False) if d or one[1] != "low rank"]
)
def test_a_group_shrinks_to_its_rank(name: str, kind: str, with_data: bool) -> None:
    gm, x, group, rank = planted(name, kind)
    with torch.no_grad():
        expected = gm(x)
    fxwidth.resize(gm, {group: rank}, data=[x] if with_data else None)
    assert fxwidth.analyze(gm)[group].width == rank
    with torch.no_grad():
        assert relative(gm(x), expected) < 1e-9


@pytest.mark.parametrize("name", ["residual", "bottleneck", "value-output", "bottleneck with batch norm"])
def test_below_its_rank_the_function_changes(name: str) -> None:
    """The check above can fail."""
    gm, x, group, rank = planted(name, "low rank" if "batch norm" in name else "combined")
    with torch.no_grad():
        expected = gm(x)
    fxwidth.resize(gm, {group: rank - 1}, data=[x])
    with torch.no_grad():
        assert relative(gm(x), expected) > 1e-5


@pytest.mark.parametrize("selection", ["greedy", "cholesky", "backward", "spectral_pruning", "projection"])
@pytest.mark.parametrize("name", ["residual", "bottleneck", "grouped"])
def test_every_method_that_looks_at_more_than_one_channel_finds_the_rank(name: str, selection: str) -> None:
    gm, x, group, rank = planted(name, "combined")
    with torch.no_grad():
        expected = gm(x)
    fxwidth.resize(gm, {group: rank}, data=[x], selection=selection)
    with torch.no_grad():
        assert relative(gm(x), expected) < 1e-8
