"""What is taken apart into ops follows sizes of its inputs as the layer did: lengths of sequences and of images.

The oracle is a model traced at the other size and given the same plan: it has the same weights, and its own sizes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxwidth
from fxwidth.rewriting import free_sizes
from tests.zoo.nets import trained_like

WIDTH = 24


def _encoder(**options: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 3, 40, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Encoder(nn.Module):
    """Layers that are one node each, since torch's own code asks for what a trace does not tell."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.up, self.layers, self.down = nn.Linear(8, WIDTH), _encoder(**options), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.layers(self.up(x)))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Two sequences of lengths of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.other, self.down = nn.Linear(8, WIDTH), nn.Linear(8, WIDTH), nn.Linear(WIDTH, 5)
        self.layers = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 3, 40, batch_first=True), 1)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.down(self.layers(self.up(x), self.other(memory)))  # type: ignore[no-any-return]


class Cross(nn.Module):
    """Keys and values from two nodes, whose lengths must be one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.key, self.value = nn.Linear(8, WIDTH), nn.Linear(8, WIDTH), nn.Linear(8, WIDTH)
        self.attention, self.down = nn.MultiheadAttention(WIDTH, 3, batch_first=True), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.down(self.attention(self.up(x), self.key(memory), self.value(memory))[0])  # type: ignore[no-any-return]


class Tokens(nn.Module):
    """A part that has its width written in, on the places of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        tokens = x.permute(0, 2, 3, 1).reshape(batch * height * width, 24) @ self.weight
        rows = tokens.view(batch, height, width, 24)
        last = rows[:, : height - 1, : width - 2].mean((1, 2))
        return rows.permute(0, 3, 1, 2) + last.view(batch, 24, 1, 1)


class Image(nn.Module):
    """Convolutions around it, and something that has it kept as one node."""

    def __init__(self, part: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.part = nn.Conv2d(3, WIDTH, 3, 2), part or Tokens()
        self.down = nn.Conv2d(WIDTH, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.part(self.up(x)))  # type: ignore[no-any-return]


class _Leaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def halved(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    """Return a model with half of each group's channels, the same ones whatever the sizes of the inputs."""
    model = copy.deepcopy(model)
    gm = fx.GraphModule(model, _Leaves().trace(model))  # each layer is one node
    wg = fxwidth.analyze(gm, inputs)
    plan = {group.name: list(range(group.width // 2)) for group in wg.free if group.width > 1}
    gm = fxwidth.resize(gm, plan, fold=False, rotate=False)
    assert fxwidth.report(gm).resizes[-1]["lowered"]
    return gm


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


CASES: dict[str, tuple[Callable[[], nn.Module], Sequence[Sequence[int]], Sequence[Sequence[Sequence[int]]]]] = {
    "batch first": (lambda: Encoder(batch_first=True), [(2, 6, 8)], [[(2, 9, 8)], [(3, 1, 8)], [(1, 12, 8)]]),
    "norm first": (lambda: Encoder(batch_first=True, norm_first=True), [(2, 6, 8)], [[(5, 13, 8)], [(2, 3, 8)]]),
    "decoder": (Decoder, [(2, 6, 8), (2, 7, 8)], [[(3, 9, 8), (3, 4, 8)], [(2, 5, 8), (2, 5, 8)]]),
    "decoder, alike": (Decoder, [(2, 6, 8), (2, 6, 8)], [[(3, 9, 8), (3, 4, 8)], [(2, 5, 8), (2, 5, 8)]]),
    "keys and values": (Cross, [(2, 6, 8), (2, 6, 8)], [[(3, 9, 8), (3, 4, 8)], [(2, 5, 8), (2, 7, 8)]]),
    "images": (Image, [(2, 3, 13, 13)], [[(2, 3, 9, 17)], [(3, 3, 21, 9)]]),
}


@pytest.mark.parametrize(
    ("name", "training"),
    [
        *((name, False) for name in CASES),
        *(pytest.param(name, True, marks=() if name == "decoder" else pytest.mark.slow) for name in CASES),
    ],
)
def test_another_size_does_what_a_trace_at_it_does(name: str, training: bool) -> None:
    make, shapes, others = CASES[name]
    torch.manual_seed(0)
    model = trained_like(make()).train(training)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.0
    gm = halved(model, *(numbers(*shape) for shape in shapes))
    for given in others:
        inputs = [numbers(*shape) for shape in given]
        wanted = halved(model, *inputs)
        for mode in (False, True):
            torch.testing.assert_close(gm.train(mode)(*inputs), wanted.train(mode)(*inputs), rtol=1e-10, atol=1e-10)


class Six(Tokens):
    """Has a length written in beside the width: at another it does something else."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1).reshape(-1, 6, 24) @ self.weight
        return rows.mean(1).view(x.shape[0], -1, 24).permute(0, 2, 1)[..., None]


class Squared(Tokens):
    """A number that is no multiple of a size."""

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[3] * x.shape[3] - x.shape[3]
        tokens = x.permute(0, 2, 3, 1).reshape(-1, 24) @ self.weight
        return tokens.view(x.shape[0], -1, 24)[:, :length].permute(0, 2, 1)[..., None]


class Table(Tokens):
    """A constant that is made for the size of the example."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.permute(0, 2, 3, 1).reshape(-1, x.shape[3], 24) @ self.weight
        table = torch.tensor([float(place) for place in range(x.shape[3])], dtype=x.dtype)
        return (tokens * table[:, None]).view(x.shape[0], -1, 24).permute(0, 2, 1)[..., None]


class Asking(Tokens):
    """Does something else at every other width of the image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[3] % 2 else super().forward(x).flip(3)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[free_sizes.Followings]:
    """What was found of each node that was taken apart."""
    kept: list[free_sizes.Followings] = []

    def noting(*given: Any) -> free_sizes.Followings:
        kept.append(free_sizes.followings(*given))
        return kept[-1]

    monkeypatch.setattr("fxwidth.rewriting.old_sizes.followings", noting)
    return kept


@pytest.mark.parametrize("part", [Six, Squared, Table, Asking])
def test_another_size_is_never_made_up(part: type[nn.Module], found: list[free_sizes.Followings]) -> None:
    """Numbers in doubt stay those of the trace: the graph does at other sizes what the model does, or fails."""
    torch.manual_seed(0)
    model, x = trained_like(Image(part())).eval(), numbers(2, 3, 13, 13)
    gm = halved(model, x)
    torch.testing.assert_close(gm(x), halved(model, x)(x))
    failed = 0
    for height, width in ((13, 17), (17, 13), (17, 17), (15, 15), (15, 13), (13, 15)):
        other = numbers(2, 3, height, width)
        try:
            answer = gm(other)
        except RuntimeError:
            failed += 1
            continue
        torch.testing.assert_close(answer, halved(model, other)(other))
    assert failed
    assert len(found) >= 1


def test_a_number_that_follows_otherwise_is_seen_where_all_sizes_are_others(
    found: list[free_sizes.Followings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted fault: a product taken for a sum."""
    monkeypatch.setattr(free_sizes, "_following", _summed)
    torch.manual_seed(0)
    halved(trained_like(Image()), numbers(2, 3, 13, 13))
    assert found == [{}]


def _summed(number: int, runs: Sequence[tuple[free_sizes.FreeSize, int]]) -> free_sizes.Following | None:
    sizes = tuple(size for size, other in runs if other != number)
    return free_sizes.Following(sizes, False) if sizes else None
