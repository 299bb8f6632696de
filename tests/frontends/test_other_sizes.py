"""Exported graphs run at every size at which the model's own code runs, before a resize and after it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxwidth
from fxwidth import FxwidthError, FxwidthWarning
from fxwidth.frontends.call_signature import arguments_of, call_of
from fxwidth.frontends.sizes_of_one import allow_ones
from fxwidth.runtime.pytrees import flatten_each
from tests.oracles.judges import randomise


class Exported(nn.Module):
    """Asks what only real tensors and those of the exporter answer, so that symbolic tracing ends."""

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError
        return self.rest(x)


class Attends(Exported):
    """A block of a decoder, with a table of positions as long as the longest sequence."""

    def __init__(self, longest: int = 24) -> None:
        super().__init__()
        self.up, self.places = nn.Linear(5, 8), nn.Parameter(torch.randn(longest, 8))
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 3)

    def rest(self, x: Tensor) -> Tensor:
        h = self.up(x) + self.places[: x.shape[1]]
        q, k, v = (layer(h).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=bool(x.shape[1] > 1))
        h = h + self.out(mixed.transpose(1, 2).flatten(2))
        return self.b(F.gelu(self.a(h)))


class Slides(Attends):
    """Remembers the last positions alone, as many as there are at most."""

    def rest(self, x: Tensor) -> Tensor:
        h = self.up(x)
        h = h + self.places[: x.shape[1]]
        return self.b(F.gelu(self.a(h[:, -100:]))) + h[:, -100::2].mean((1, 2), keepdim=True)


class Sees(Exported):
    """A small network of convolutions with a skip connection, for images whose sides are multiples of four."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 12, 3, 2, 1)
        self.c, self.d = nn.Conv2d(20, 6, 1), nn.Conv2d(6, 2, 1)

    def rest(self, x: Tensor) -> Tensor:
        low = self.a(x).relu()
        high = F.interpolate(self.b(low).relu(), size=low.shape[-2:])
        n, c, h, w = low.shape
        low = low.view(n, c, h // 2, 2, w // 2, 2).mean((3, 5))
        return self.d(self.c(torch.cat([F.interpolate(low, scale_factor=2.0), high], 1)).relu())


class Normed(Exported):
    """Norms a batch, which asks in training for more than one value of each channel, and mixes places."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.q, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12)
        self.drop, self.b = nn.Dropout(0.0), nn.Conv2d(4, 2, 1)

    def rest(self, x: Tensor) -> Tensor:
        h = self.norm(self.q(self.a(x).relu()))
        n, _, height, width = h.shape
        q, k, v = h.reshape(n, 3, 4, height * width).unbind(1)
        mixed = (q.transpose(-1, -2) @ k).softmax(-1) @ v.transpose(-1, -2)
        return self.b(self.drop(mixed.transpose(-1, -2).reshape(n, 4, height, width)))


class Whole(Exported):
    """Has a weight for each position, and so takes one length alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mix, self.down = nn.Linear(5, 8), nn.Linear(6, 6), nn.Linear(8, 3)

    def rest(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        return self.down(h + self.mix(h.transpose(1, 2)).transpose(1, 2))


def rows(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, 5, generator=torch.Generator().manual_seed(length), dtype=torch.float64)


def images(height: int, width: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64)


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomise(kind()).double().eval()


CASES: dict[str, tuple[Callable[[], nn.Module], list[Tensor]]] = {
    "lengths": (Attends, [rows(8), rows(2, 3), rows(1), rows(5, 1), rows(24)]),
    "last positions": (Slides, [rows(8), rows(3, 4), rows(20)]),
    # As many positions as there are channels, or as the table has.
    "as long as the table": (lambda: Attends(8), [rows(8), rows(3, 4), rows(1, 1)]),
    "positions of normed images": (Normed, [images(16, 16), images(9, 12, 3), images(32, 5, 1)]),
    "image sizes": (Sees, [images(16, 16), images(16, 24, 3), images(32, 8), images(20, 20, 1)]),
}


def halves(gm: fx.GraphModule) -> dict[str, list[int]]:
    """Return every other channel of each group that is free."""
    return {group.name: list(range(0, group.width, 2)) for group in fxwidth.analyze(gm).free if group.width > 1}


@pytest.mark.parametrize("name", CASES)
def test_a_graph_runs_at_all_sizes_of_the_model(name: str) -> None:
    kind, inputs = CASES[name]
    model = made(kind)
    gm = fxwidth.trace(model, inputs[0])
    assert type(gm).__name__ == "Exported"
    for x in inputs:
        torch.testing.assert_close(gm(x), model(x))


@pytest.mark.parametrize("name", CASES)
def test_it_trains_at_all_sizes_of_the_model(name: str) -> None:
    kind, inputs = CASES[name]
    model = made(kind)
    gm = fxwidth.trace(copy.deepcopy(model), inputs[0])
    for x in inputs:
        for training in (True, False):
            torch.testing.assert_close(gm.train(training)(x), model.train(training)(x))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(gm.state_dict()[key], value)


@pytest.mark.parametrize("name", CASES)
def test_resized_it_does_what_one_traced_at_another_size_does(name: str) -> None:
    kind, inputs = CASES[name]
    graphs = [fxwidth.trace(copy.deepcopy(made(kind)), x) for x in inputs[:2] if min(x.shape) > 1]
    assert len(graphs) == 2
    plans = [halves(gm) for gm in graphs]
    assert plans[0]
    assert all(plan == plans[0] for plan in plans)
    for gm in graphs:
        fxwidth.resize(gm, plans[0], fold=False)
    for x in inputs:
        for gm in graphs[1:]:
            torch.testing.assert_close(gm(x), graphs[0](x))


def test_rows_that_other_lengths_take_are_no_channels() -> None:
    for model in (made(Attends), made(lambda: Attends(8))):
        graph = fxwidth.analyze(fxwidth.trace(model, rows(8)))
        told = graph.why_pinned("places:0") if "places:0" in graph else graph.why_pinned("places")
        assert "a size of the inputs says" in told


class Gates(nn.Module):
    """Gates one half of its channels with the other, and adds as many rows of a table as there are positions."""

    def __init__(self, read: Callable[[Tensor, int], int]) -> None:
        super().__init__()
        self.read = read
        self.places = nn.Parameter(torch.zeros(20, 8))
        self.up, self.down = nn.Linear(5, 16), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        half = self.read(h, -1) // 2
        return self.down(h[..., :half] * h[..., half:].sigmoid() + self.places[: self.read(h, 1)])


@pytest.mark.parametrize(
    "read",
    [
        lambda h, dim: h.shape[dim],
        lambda h, dim: h.size(dim),
        lambda h, dim: h.size(dim=dim),
        lambda h, dim: h.size()[dim],
    ],
)
def test_half_of_the_channels_is_no_size_of_the_input(read: Callable[[Tensor, int], int]) -> None:
    gm = fxwidth.trace(made(lambda: Gates(read)), rows(6))
    graph = fxwidth.analyze(gm)
    rest = [group for group in graph.free if "up.weight" in {site.parameter for site in group.sites}]
    assert [group.width for group in rest] == [8]
    assert "a size of the inputs says" in graph.why_pinned(
        next(name for name in ("places", "places:0") if name in graph)
    )
    narrow = fxwidth.resize(gm, {group.name: 5 for group in rest})
    assert narrow is not None
    assert gm.up.out_features == 10
    assert gm(rows(9)).shape == (2, 9, 3)


class Windows(Exported):
    """Pads images to whole windows, again and again, so that sizes are made of sizes of sizes."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 3, 3, 2, 1) for _ in range(depth))
        self.last = nn.Linear(3, 2)

    def rest(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            n, c, h, w = x.shape
            x = F.pad(x, (0, -w % 3, 0, -h % 3))
            rows, columns = x.shape[2] // 3, x.shape[3] // 3
            parts = x.view(n, c, rows, 3, columns, 3).transpose(3, 4).reshape(n, c, rows * columns, 9)
            x = parts.softmax(-1).view(n, c, rows, columns, 3, 3).transpose(3, 4).reshape(n, c, 3 * rows, 3 * columns)
            x = layer(x[:, :, :h, :w])
        return self.last(x.mean((2, 3)))


@pytest.mark.slow
def test_sizes_that_are_too_involved_stay_those_of_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(Windows)
    open_sizes: list[int] = []
    for most in (1, 10**9):
        monkeypatch.setattr("fxwidth.frontends.involved_sizes._MOST_BOUNDS", most)
        gm = fxwidth.trace(model, images(20, 20))
        open_sizes.append(sum(size is None for shape in gm.fxwidth_inputs.shapes for size in shape))
        for x in (images(20, 20), images(20, 20, 1), images(20, 20, 5)):
            torch.testing.assert_close(gm(x), model(x))
        if most == 1:
            with pytest.raises(FxwidthError, match="traced with"):
                gm(images(21, 20))
    assert open_sizes == [1, 3]


@pytest.mark.parametrize("same", [True, False])
def test_one_sample_is_taken_where_sizes_are_compared_with_each_other(*, same: bool) -> None:
    """As a batch times a width with a number of places, which the exporter does where it lays out tensors anew."""
    model, x = made(Attends), rows(8)
    gm = fxwidth.trace(model, x)
    compared = "4*leaves[0].size()[0] != leaves[0].size()[1] // 2"
    gm.fxwidth_inputs.guards = (compared,)
    arguments = arguments_of(model, call_of(x))
    leaves, structures = flatten_each((argument.value for argument in arguments), (Tensor,))
    if not same:
        model.b.bias.data.add_(1)
        gm.b.bias = nn.Parameter(gm.b.bias.detach() - 1)
    allow_ones(gm, model, arguments, structures, leaves, {})
    if same:
        torch.testing.assert_close(gm(x[:1]), model(x[:1]))
    else:
        with pytest.raises(FxwidthError, match=r"inputs with 4\*leaves"):
            gm(x[:1])
    with pytest.raises(FxwidthError, match="inputs with"):
        gm(rows(16))


def test_what_takes_one_length_alone_says_so() -> None:
    model = made(Whole)
    gm = fxwidth.trace(model, rows(6))
    torch.testing.assert_close(gm(rows(6, 5)), model(rows(6, 5)))
    with pytest.raises(FxwidthError, match=r"traced with \(any, 6, 5\)"):
        gm(rows(7))
    fxwidth.resize(gm, {"up": 4})
    assert gm(rows(6, 3)).shape == (3, 6, 3)


def test_a_resize_that_would_lose_other_sizes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = fxwidth.trace(made(Attends), rows(8))
    # As if rows that other lengths take were channels.
    monkeypatch.setattr("fxwidth.rules.slicing._pin_if_computed", lambda *_: None)
    table = next(group for group in fxwidth.analyze(gm).free if {site.parameter for site in group.sites} == {"places"})
    with pytest.warns(FxwidthWarning, match=r"fails on inputs of shapes \[\(2, 16, 5\)\]"):
        fxwidth.resize(gm, {table.name: 1}, selection="magnitude", fold=False)
    with pytest.raises(RuntimeError):
        gm(rows(16))


def test_a_resize_after_which_other_sizes_give_other_results_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = fxwidth.trace(made(Slides), rows(8))
    before = [tensor.clone() for tensor in gm.state_dict().values()]
    monkeypatch.setattr("fxwidth.rewriting.other_sizes._shapes", lambda _, inputs: next(answers))
    answers = iter([[(2, 16, 3)], [(2, 8, 3)]])
    with pytest.raises(FxwidthError, match=r"\(2, 8, 3\) for inputs of shapes \[\(2, 16, 5\)\]"):
        fxwidth.resize(gm, {"a": 6}, selection="magnitude", fold=False)
    assert all(torch.equal(one, two) for one, two in zip(gm.state_dict().values(), before, strict=True))
