"""Spectra against numpy's decomposition of matrices written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.weights.writer_spectra import singular_values, tail_share, writer_norms
from tests.zoo.nets import NETS, build, conv, grouped, images, tokens, trained_like, width_graph


def value(graph: WidthGraph, name: str) -> np.ndarray:
    return graph.analysis.parameters[name].tensor.detach().numpy()


def by_numpy(*blocks: np.ndarray) -> np.ndarray:
    stacked = np.concatenate(blocks, 1)
    values = np.linalg.svd(stacked, compute_uv=False)
    return np.concatenate([values, np.zeros(len(stacked) - len(values))])


def group_of(graph: WidthGraph, parameter: str, dim: int = 0) -> ChannelGroup:
    return next(g for g in graph.groups if any((s.parameter, s.dim) == (parameter, dim) for s in g.sites))


def check(graph: WidthGraph, group: ChannelGroup, *blocks: np.ndarray) -> None:
    values = singular_values(graph, group)
    assert values.shape == (group.width,)
    np.testing.assert_allclose(values.numpy(), by_numpy(*blocks), rtol=1e-10, atol=1e-12)
    norms = writer_norms(graph, group)
    assert norms is not None
    np.testing.assert_allclose(norms.numpy(), np.linalg.norm(np.concatenate(blocks, 1), axis=1), rtol=1e-12)


def test_a_convolution_with_the_batch_norm_that_follows_it() -> None:
    graph, _ = build("conv")
    scale = value(graph, "3.weight") / np.sqrt(value(graph, "3.running_var") + 1e-5)
    check(graph, graph["2"], value(graph, "2.weight").reshape(8, -1) * scale[:, None])
    check(graph, graph["0"], value(graph, "0.weight").reshape(6, -1))


def test_grouped_and_transposed_convolutions() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1, groups=2), nn.ReLU(), nn.ConvTranspose2d(6, 10, 2, groups=2),
        nn.ReLU(), nn.ConvTranspose2d(10, 7, 1), nn.ReLU(), nn.Conv2d(7, 3, 1),
    )  # fmt: skip
    graph = width_graph(trained_like(model), images())
    into, through, up, last = (value(graph, f"{i}.weight") for i in (0, 2, 4, 6))
    # In each layer the groups, 2, are one factor and what is in a group another.
    channels = {g.width: g for g in graph.free}
    assert sorted(channels) == [2, 3, 4, 5, 7]
    check(graph, channels[2], into.reshape(2, -1))
    check(graph, channels[4], *into.reshape(2, 4, -1))
    check(graph, channels[3], *through.reshape(2, 3, -1))
    check(graph, channels[5], np.moveaxis(up, 1, 0).reshape(5, -1))
    check(graph, channels[7], np.moveaxis(last, 1, 0).reshape(7, -1))


def test_a_residual_stream_stacks_all_its_writers() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(1, 6, 3)
            self.a, self.b = nn.Conv2d(6, 4, 1, bias=False), nn.Conv2d(4, 6, 1, bias=False)
            self.norm = nn.BatchNorm2d(6)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head((x + self.norm(self.b(self.a(x).relu()))).mean((2, 3)))

    graph = width_graph(trained_like(Residual()), images())
    scale = value(graph, "norm.weight") / np.sqrt(value(graph, "norm.running_var") + 1e-5)
    blocks = [value(graph, "stem.weight").reshape(6, -1), value(graph, "b.weight").reshape(6, -1) * scale[:, None]]
    check(graph, graph["stem"], *blocks)


def test_a_shortcut_of_repeated_channels_stacks_every_copy() -> None:
    graph, _ = build("tile")
    # 10 channels are 4 + 4 + 2 copies of the 4 of the stem: those are cut in two groups of 2.
    first, second = (group_of(graph, "stem.weight"), None)
    assert first.width == 2
    body, stem = value(graph, "body.weight").reshape(10, -1), value(graph, "stem.weight").reshape(4, -1)
    check(graph, first, *(body[k : k + 2] for k in (0, 4, 8)), stem[:2])
    second = next(g for g in graph.free if g.width == 2 and g is not first)
    check(graph, second, *(body[k : k + 2] for k in (2, 6)), stem[2:])


def test_heads_and_what_is_in_them() -> None:
    graph, _ = build("attention")
    inside = next(g for g in graph.free if g.width == 4 and any(s.parameter == "v.weight" for s in g.sites))
    weight = value(graph, "v.weight")
    check(graph, inside, weight[:4], weight[4:])


def test_embeddings_write_and_biases_do_not() -> None:
    graph, _ = build("tied")
    stream = next(g for g in graph.free if g.width == 6)
    values = singular_values(graph, stream)
    blocks = [value(graph, "table.weight").T, value(graph, "body.weight")]
    np.testing.assert_allclose(values.numpy(), by_numpy(*blocks), rtol=1e-10)


@pytest.mark.parametrize("name", list(NETS))
def test_the_gram_matrix_gives_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, _ = build(name)
    for group in graph.free:
        direct = singular_values(graph, group)
        with monkeypatch.context() as patch:
            patch.setattr("fxwidth.weights.writer_spectra._STACKED_ENTRIES", 0)
            by_gram = singular_values(graph, group)
        torch.testing.assert_close(by_gram, direct, rtol=1e-6, atol=1e-7 * float(direct[0]))


def test_a_weight_that_is_computed_counts_as_it_is_used() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.masked = nn.Linear(16, 9)
            self.weight, self.a, self.b = (nn.Parameter(torch.empty(*shape)) for shape in ((7, 9), (7, 2), (2, 9)))
            self.halved = nn.Linear(7, 6)
            self.head = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.linear(self.masked(x).relu(), self.weight + self.a @ self.b).relu()
            half = self.halved.weight / 2
            return self.head(
                torch.cat([nn.functional.linear(x, half), nn.functional.linear(x.tanh(), half)], -1).relu()
            )

    model = trained_like(Computed())
    mask = (torch.arange(9 * 16).view(9, 16) % 3 > 0).double()
    prune.custom_from_mask(model.masked, "weight", mask)
    graph = width_graph(model, tokens()[:, 0])
    check(graph, group_of(graph, "masked.weight_orig"), value(graph, "masked.weight_orig") * mask.numpy())
    updated = value(graph, "weight") + value(graph, "a") @ value(graph, "b")
    check(graph, group_of(graph, "weight"), updated)
    half = value(graph, "halved.weight") / 2
    check(graph, group_of(graph, "halved.weight"), half)


def test_dead_and_duplicated_channels_show_as_zeros() -> None:
    graph, _ = build("conv")
    with torch.no_grad():
        weight = graph.analysis.parameters["0.weight"].tensor
        weight[1] = 0
        weight[4] = weight[2]
    values = singular_values(graph, graph["0"])
    assert (values[:4] > 1e-3).all()
    assert (values[4:] < 1e-12).all()


def test_half_precision_is_decomposed_in_float64() -> None:
    graph = width_graph(trained_like(grouped()).bfloat16(), images().bfloat16())
    for group in graph.free:
        assert singular_values(graph, group).dtype == torch.float64


def test_a_model_without_values_has_a_flat_spectrum() -> None:
    with torch.device("meta"):
        model = conv()
    graph = width_graph(model.eval(), torch.empty(4, 1, 8, 8, device="meta"))
    assert torch.equal(singular_values(graph, graph["2"]), torch.ones(8).double())
    assert writer_norms(graph, graph["2"]) is None


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20))
def test_tail_shares(values: list[float]) -> None:
    ordered = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    shares = tail_share(ordered)
    assert shares.shape == (len(values) + 1,)
    assert shares[-1] == 0
    assert shares[0] == (1 if float(ordered.sum()) > 0 else 0)
    assert (shares[:-1] >= shares[1:]).all()
    if float(ordered.sum()) > 1e-200:
        for k in range(len(values)):
            assert float(shares[k]) == pytest.approx(float(ordered[k:].sum() / ordered.sum()), rel=1e-9, abs=1e-12)
