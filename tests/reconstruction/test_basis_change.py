"""Linear groups in the basis of their spectrum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxwidth
from fxwidth.bases.channel_provenance import Place
from fxwidth.bases.linear_groups import linear_group
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.importance.estimates import gather_evidence
from fxwidth.reconstruction import basis_change
from fxwidth.reconstruction.basis_change import rotated
from fxwidth.reconstruction.basis_consumers import BasisChange
from fxwidth.rewriting.transaction import Transaction
from fxwidth.tracing.analyze import analyze_module
from fxwidth.weights.readers import wiring_of
from tests.zoo.nets import Attention, build, tokens, trained_like


class Bottleneck(nn.Module):
    """A sum of two linear maps, read by a third, and a nonlinear layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 10), nn.Linear(16, 10, bias=False)
        self.up, self.head = nn.Linear(10, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.one(x) + self.two(x.tanh())).relu())


class Convolutions(nn.Module):
    """Two convolutions with nothing in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)).relu())


class Fused(nn.Module):
    """One layer makes queries, keys and values; attention is one op."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(16, 3 * 2 * 6), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4).unbind()
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.head(self.out(y.transpose(1, 2).flatten(2)).relu()).mean(1)


class Packed(nn.Module):
    """torch's own attention, whose layer is cut in three."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0].relu()).mean(1)


class Windows(nn.Module):
    """Attention within each of two windows, by matrix products, with scaled queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 12) for _ in range(4))
        self.head = nn.Linear(12, 3)

    def heads(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 2, x.shape[1] // 2, 2, 6).transpose(2, 3).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, x.flip(-1)], 1)
        q, k = self.heads(self.q(x) * 0.3), self.heads(self.k(x))
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        y = (weights @ self.heads(self.v(x).tanh())).transpose(1, 2).flatten(2)
        return self.head(y.reshape(x.shape[0], -1, 12).relu()).mean(1)


class Cosines(Fused):
    """Queries and keys are brought to length one."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4).unbind()
        q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.head(self.out(y.transpose(1, 2).flatten(2)).relu()).mean(1)


class Rotary(Fused):
    """Queries and keys are turned by the place of their token."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4).unbind()
        angles = torch.arange(x.shape[1])[:, None] / torch.tensor([1.0, 3.0, 9.0]).repeat(2)
        q, k = (one * angles.cos() + torch.cat([-one[..., 3:], one[..., :3]], -1) * angles.sin() for one in (q, k))
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.head(self.out(y.transpose(1, 2).flatten(2)).relu()).mean(1)


class Gram(nn.Module):
    """Queries that are their own keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.out = nn.Linear(16, 6), nn.Linear(16, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        return self.out((q @ q.transpose(1, 2)).softmax(-1) @ self.v(x).relu()).mean(1)


class GramOfParameters(nn.Module):
    """What a layer makes meets a bare parameter, over one dim or over two."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.layer, self.bare = nn.Linear(16, 6), nn.Parameter(torch.randn(*[6] * dims))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.bare.dim() == 1:
            return self.head((y @ self.bare).relu())
        return self.head(torch.einsum("btc,tc->bt", y, self.bare).relu())


class LowRank(nn.Module):
    """Two bare parameters make a weight: the channels between them are in no activation."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(16, 6)), nn.Parameter(torch.randn(6, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x @ (self.left @ self.right)).relu()).mean(1)


def images() -> Tensor:
    return torch.randn(32, 1, 9, 9, generator=torch.Generator().manual_seed(0)).double()


def many_tokens() -> Tensor:
    """Return so many that noise is left out of the evidence."""
    return torch.randn(128, 5, 16, generator=torch.Generator().manual_seed(0)).double()


LINEAR = {"bottleneck": (Bottleneck, tokens, "one"), "attention": (Attention, tokens, "v#1"),
          "convolutions": (Convolutions, images, "first"), "queries and keys": (Attention, tokens, "q#1"),
          "fused": (Fused, tokens, "qkv#2"), "packed": (Packed, many_tokens, "attention.in_proj_weight#1"),
          "windows": (Windows, tokens, "q#1")}  # fmt: skip


def traced(name: str) -> tuple[torch.fx.GraphModule, Tensor, WidthGraph, ChannelGroup]:
    torch.manual_seed(0)
    make, inputs, group = LINEAR[name]
    x = inputs()
    gm = fxwidth.trace(trained_like(make()), x[:4])
    graph = WidthGraph(analyze_module(gm))
    return gm, x, graph, graph[group]


@pytest.mark.parametrize("name", LINEAR)
def test_a_rotation_changes_no_function(name: str) -> None:
    gm, x, graph, group = traced(name)
    evidence = gather_evidence(graph, [x], rotates=True)
    turned = evidence.rotation(group)
    assert turned is not None
    assert evidence.moments is not None
    before = {key: value.clone() for key, value in gm.state_dict().items()}
    with torch.no_grad():
        expected = gm(x)
        transaction = Transaction()
        moments = rotated(wiring_of(graph), turned, evidence.moments, transaction)
        torch.testing.assert_close(gm(x), expected, rtol=1e-8, atol=1e-9)
        changed = [key for key, value in gm.state_dict().items() if not torch.equal(value, before[key])]
        bases = [change.basis for change in turned.changes]
        assert set(changed) == {place.parameter for basis in bases for place in basis.places}
        # The moments are those of the network as it is now.
        again = gather_evidence(graph, [x]).moments
        assert again is not None
        assert_close = partial(torch.testing.assert_close, rtol=1e-7, atol=1e-8)
        for key in (view.readers.first.key for basis in bases for view in basis.views):
            assert_close(moments.contracted[key].covariance, again.contracted[key].covariance)
        for product in (basis.product for basis in bases if basis.product is not None):
            for key in ((product.call.index, side.argument) for side in (product.left, product.right)):
                assert_close(moments.products[key], again.products[key])
        transaction.roll_back()
    assert all(torch.equal(value, before[key]) for key, value in gm.state_dict().items())


@pytest.mark.parametrize("name", LINEAR)
def test_it_loses_less_than_a_subset(name: str) -> None:
    errors = {}
    for rotate in (True, False):
        gm, x, _, group = traced(name)
        with torch.no_grad():
            expected = gm(x)
        fxwidth.resize(gm, {group.name: group.width // 2}, data=[x], rotate=rotate)
        with torch.no_grad():
            errors[rotate] = float((gm(x) - expected).square().mean())
    assert errors[True] < errors[False]


@pytest.mark.parametrize("name", LINEAR)
def test_what_is_lost_is_the_tail_of_the_spectrum(name: str) -> None:
    _, x, graph, group = traced(name)
    evidence = gather_evidence(graph, [x], rotates=True)
    turned = evidence.rotation(group)
    assert turned is not None
    plain = evidence.unrotated()
    assert (evidence.errors(group)[1:-1] <= plain.errors(group)[1:-1] + 1e-9).all()
    for change in turned.changes:
        heads = change.forward @ change.backward
        torch.testing.assert_close(heads, torch.eye(group.width).double().expand_as(heads), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["conv", "grouped", "tile", "in place", "shared", "tied"])
def test_groups_behind_nonlinear_ops_keep_their_basis(name: str) -> None:
    graph, _ = build(name)
    linear = [group.name for group in graph.free if linear_group(graph, group) is not None]
    assert linear == []


def test_of_attention_values_queries_and_keys_are_rotated() -> None:
    graph, _ = build("attention")
    assert [group.name for group in graph.free if linear_group(graph, group) is not None] == ["q#1", "v#1"]


@pytest.mark.parametrize("make", [Cosines, Rotary])
def test_what_is_not_linear_in_queries_keeps_their_basis(make: type[Fused]) -> None:
    gm = fxwidth.trace(trained_like(make()), tokens()[:4])
    graph = WidthGraph(analyze_module(gm))
    assert all(linear_group(graph, group) is None for group in graph.free)


def test_each_head_of_each_end_has_a_basis_of_its_own() -> None:
    _, _, graph, group = traced("fused")
    found = linear_group(graph, group)
    assert found is not None
    reader, product = found.bases
    assert len(reader.views) == 1
    assert product.product is not None
    assert [place.inverse for place in product.places] == [False, False, True, True]
    taken = [place.positions for place in (*reader.places, *product.places) if place.parameter == "qkv.weight"]
    assert [own.shape for own in taken] == [(6, 2)] * 3
    values, queries, keys = taken
    for own, first in ((queries, 0), (keys, 12), (values, 24)):
        assert (own == torch.arange(12).reshape(2, 6).T.numpy() + first).all()


@pytest.mark.parametrize("between", [nn.ReLU(), nn.LayerNorm(10), nn.Hardtanh(), nn.Softmax(-1)])
def test_nothing_may_stand_in_between(between: nn.Module) -> None:
    x = tokens()[:, 0]
    gm = fxwidth.trace(trained_like(nn.Sequential(nn.Linear(16, 10), between, nn.Linear(10, 4), nn.ReLU())), x[:4])
    graph = WidthGraph(analyze_module(gm))
    assert all(linear_group(graph, group) is None for group in graph.free)


@pytest.mark.parametrize(
    ("name", "dead"), [("queries and keys", "k"), ("queries and keys", "q"), ("convolutions", "first")]
)
@torch.no_grad()
def test_channels_in_which_nothing_is_seen_mix_with_no_others(name: str, dead: str) -> None:
    """What reads them is loud; a basis that holds them together with others would cost those their digits."""
    gm, x, _, group = traced(name)
    layer = gm.get_submodule(dead)
    for tensor in (layer.weight, layer.bias):
        tensor.unflatten(0, (-1, group.width))[:, 1:3] = 0
    if name == "queries and keys":
        other = gm.get_submodule({"q": "k", "k": "q"}[dead])
        other.weight.unflatten(0, (-1, group.width))[:, 1:3] *= 1e6
    expected = gm(x)
    fxwidth.resize(gm, {group.name: group.width - 2})
    torch.testing.assert_close(gm(x), expected, rtol=0, atol=1e-11)


def test_an_optimizer_keeps_the_basis() -> None:
    gm, x, _, group = traced("bottleneck")
    old = gm.get_parameter("one.weight").detach().clone()
    fxwidth.resize(gm, {group.name: 5}, data=[x], optimizer=torch.optim.Adam(gm.parameters()))
    new = gm.get_parameter("one.weight").detach()
    assert all(bool((old == row).all(1).any()) for row in new)


def test_queries_that_are_their_own_keys_keep_their_basis() -> None:
    """Only an orthogonal change would keep the function, and that is not what is looked for."""
    graph = WidthGraph(analyze_module(fxwidth.trace(trained_like(Gram()), tokens()[:4])))
    assert "q" in {group.name for group in graph.free}
    assert [group.name for group in graph.free if linear_group(graph, group) is not None] == []


@pytest.mark.parametrize("make", [partial(GramOfParameters, 1), partial(GramOfParameters, 2), LowRank])
@torch.no_grad()
def test_bare_parameters_are_readers_or_keep_the_basis(make: Callable[[], nn.Module]) -> None:
    x = tokens()
    gm = fxwidth.trace(trained_like(make()), x[:4])
    graph = WidthGraph(analyze_module(gm))
    expected = gm(x)
    evidence = gather_evidence(graph, [x], rotates=True)
    moments = evidence.moments
    assert moments is not None
    assert graph.free
    transaction = Transaction()
    for group in graph.free:
        found = evidence.rotation(group)
        moments = moments if found is None else rotated(wiring_of(graph), found, moments, transaction)
    torch.testing.assert_close(gm(x), expected, rtol=1e-8, atol=1e-9)
    transaction.roll_back()


@pytest.mark.parametrize("name", ["attention", "fused", "windows"])
@torch.no_grad()
def test_a_wrong_order_of_heads_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gm, x, graph, group = traced(name)
    evidence = gather_evidence(graph, [x], rotates=True)
    found = evidence.rotation(group)
    assert found is not None
    assert evidence.moments is not None
    right, expected = basis_change._turned_place, gm(x)

    def wrong(tensor: Tensor, place: Place, one: BasisChange) -> Tensor:
        positions = place.positions[:, ::-1].copy() if place.inverse else place.positions
        return right(tensor, replace(place, positions=positions), one)

    monkeypatch.setattr(basis_change, "_turned_place", wrong)
    transaction = Transaction()
    rotated(wiring_of(graph), found, evidence.moments, transaction)
    assert float((gm(x) - expected).abs().max()) > 1e-3
    transaction.roll_back()
