"""Growth keeps the function where it says so, and says so wherever it can."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxwidth
from fxwidth.growth.recipes import Fill, Recipe
from fxwidth.resizing import parameters
from tests.oracles.growth import (
    EXACT,
    change,
    check_all,
    check_refusals,
    check_together,
    recipes,
    sequence,
    width_graph,
)
from tests.zoo.models import FULL_SIZE, SMALL, RMSTransformer, build

# -- models of the field -------------------------------------------------------------------------------------------


WIDE = ("resnet18", "mobilenet_v2", "shufflenet_v2_x1_0", "squeezenet1_1")


@pytest.mark.parametrize("name", SMALL)
def test_small_models(name: str) -> None:
    model, x = build(name)
    wg = width_graph(model, x)
    check = check_together if name in WIDE else check_all
    check(wg, x)
    check_refusals(wg, x)


@pytest.mark.slow
@pytest.mark.parametrize("name", dict.fromkeys([*WIDE, *FULL_SIZE]))
def test_every_group_of_large_models(name: str) -> None:
    model, x = build(name)
    x = torch.cat([x, x])[:2]  # a batch of one is traced as two
    wg = width_graph(model, x)
    for i, group in enumerate(wg.free):
        if group.inexact_growth is None:
            assert change(wg, {group: group.width + (1, 5)[i % 2]}, x) < EXACT, f"{group.name}: {group.growth}"
    check_together(wg, x)
    check_refusals(wg, x)


@pytest.mark.parametrize("name", [n for n in SMALL if n not in ("vit", "swin", "convnext", "rms_transformer")])
def test_convolutional_networks_grow_freely(name: str) -> None:
    model, x = build(name)
    assert set(recipes(width_graph(model, x)).values()) == {"FREE"}


def test_vit_by_recipe() -> None:
    model, x = build("vit")
    wg = width_graph(model, x)
    found = recipes(wg)
    prefix = "encoder.layers.encoder_layer_0."
    assert found["class_token:2"] == "MEAN"
    assert found[prefix + "self_attention.in_proj_weight#0"] == "FREE"
    # Queries and keys are rows of one parameter, which cannot be zero for one of them alone.
    assert found[prefix + "self_attention.in_proj_weight#1"] == "ZERO"
    assert found[prefix + "mlp.0"] == "FREE"
    assert wg["class_token:2"].growth.norms == tuple(
        call.index for call in wg.analysis.calls if call.name == "native_layer_norm"
    )


def test_swin_says_what_stands_in_the_way() -> None:
    model, x = build("swin")
    wg = width_graph(model, x)
    inexact = {group.name: group.inexact_growth for group in wg.free if group.inexact_growth is not None}
    reason = "its layer norm sees new channels that cannot be at the mean of the others (native_layer_norm at node"
    assert list(inexact) == ["features.0.0"]
    assert inexact["features.0.0"].startswith(reason)
    assert recipes(wg)["features.2.reduction"] == "MEAN"


class Merged(nn.Module):
    """A stream that is normalised in pairs of neighbours, as in swin's patch merging."""

    def __init__(self) -> None:
        super().__init__()
        self.write, self.norm, self.read = nn.Linear(4, 6), nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.write(x)
        return self.read(self.norm(torch.cat([x[:, ::2], x[:, 1::2]], -1)))


def test_a_norm_over_several_parts_is_named() -> None:
    x = sequence(2, 4, 4)
    wg = width_graph(Merged(), x)
    assert wg["write"].inexact_growth == (
        "its layer norm sees several concatenated parts (native_layer_norm at node norm)"
    )
    check_refusals(wg, x)


def test_convnext_says_what_stands_in_the_way() -> None:
    model, x = build("convnext")
    wg = width_graph(model, x)
    inexact = [group for group in wg.free if group.inexact_growth is not None]
    assert inexact
    assert all("cannot be at the mean of the others" in str(group.inexact_growth) for group in inexact)
    assert all(group.sites[0].parameter.startswith("features") for group in inexact)


# -- streams and norms ---------------------------------------------------------------------------------------------


def test_rms_transformer_by_recipe() -> None:
    x = sequence(2, 5, 10)
    wg = width_graph(RMSTransformer(), x)
    found = recipes(wg)
    assert found["embed"] == "ZERO"
    assert found["gate"] == "FREE"
    heads, width = (group for group in wg.free if group.sites[0].parameter.startswith("q."))
    assert (heads.growth.recipe, width.growth.recipe) == (Recipe.FREE, Recipe.ONE_SIDED)
    # One of queries and keys is zero; the other gives it a gradient.
    fills = width.growth.fills
    assert {fills["q.weight", 0], fills["k.weight", 0]} == {Fill.ZERO, Fill.DIRECTIONS}
    check_all(wg, x)


class TiedModel(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self, norm: type[nn.Module], post: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 12)
        self.position = nn.Parameter(torch.randn(1, 5, 12))
        self.norm_1, self.norm_2 = norm(12), norm(12)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.head = nn.Linear(12, 11)
        self.head.weight = self.embedding.weight
        self.post = post

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        if self.post:
            x = self.norm_1(x + self.down(F.gelu(self.up(x))))
            x = self.norm_2(x + self.down(F.gelu(self.up(x))))
        else:
            x = x + self.down(F.gelu(self.up(self.norm_1(x))))
            x = self.norm_2(x)
        return self.head(x)


TOKENS = torch.arange(10).reshape(2, 5)


@pytest.mark.parametrize(("norm", "recipe"), [(nn.LayerNorm, Recipe.MEAN), (nn.RMSNorm, Recipe.ZERO)])
def test_tied_embedding(norm: type[nn.Module], recipe: Recipe) -> None:
    wg = width_graph(TiedModel(norm), TOKENS)
    assert recipes(wg) == {"position:2": recipe.name, "up": "FREE"}
    check_all(wg, TOKENS)


def test_post_norm_stream_is_inexact() -> None:
    wg = width_graph(TiedModel(nn.LayerNorm, post=True), TOKENS)
    assert recipes(wg) == {"position:2": "inexact", "up": "FREE"}
    check_refusals(wg, TOKENS)


def test_post_norm_with_rms_is_exact() -> None:
    # A zero stays zero through an RMS norm, so its output can be added to and normalised again.
    wg = width_graph(TiedModel(nn.RMSNorm, post=True), TOKENS)
    assert recipes(wg) == {"position:2": "ZERO", "up": "FREE"}
    check_all(wg, TOKENS)


class LayerScaled(nn.Module):
    """A pre-norm stream whose branch is scaled per channel before it is added."""

    def __init__(self, norm: nn.Module, depthwise: bool = False) -> None:
        super().__init__()
        self.write = nn.Linear(5, 8)
        self.norm, self.final = norm, nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.scale = nn.Parameter(torch.randn(8))
        self.mix = nn.Conv1d(8, 8, 3, padding=1, groups=8) if depthwise else nn.Identity()
        self.read = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.write(x)
        y = self.mix(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.scale * self.down(F.relu(self.up(self.norm(y))))
        return self.read(self.final(x))


def test_layer_scale_in_a_stream_with_layer_norms() -> None:
    x = sequence(2, 4, 5)
    wg = width_graph(LayerScaled(nn.LayerNorm(8)), x)
    growth = wg["write"].growth
    assert (growth.recipe, growth.inexact) == (Recipe.MEAN, None)
    assert growth.weights == {("down.weight", 0): "scale", ("down.bias", 0): "scale"}
    assert growth.fills["scale", 0] is Fill.ONE
    check_all(wg, x)


def test_depthwise_convolution_before_a_layer_norm_is_inexact() -> None:
    x = sequence(2, 4, 5)
    wg = width_graph(LayerScaled(nn.LayerNorm(8), depthwise=True), x)
    assert "cannot be at the mean" in str(wg["write"].inexact_growth)
    check_refusals(wg, x)


def test_norm_without_gain_is_inexact() -> None:
    x = sequence(2, 4, 5)
    wg = width_graph(LayerScaled(nn.LayerNorm(8, elementwise_affine=False)), x)
    assert wg["write"].inexact_growth == (
        "its layer norm has no gain that could be rescaled (native_layer_norm at node norm)"
    )


class SharedGain(nn.Module):
    """A norm whose gain also scales something else."""

    def __init__(self) -> None:
        super().__init__()
        self.write, self.norm, self.read = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.write(x)
        return self.read(self.norm(x)) + self.read(x * self.norm.weight)


def test_gain_with_another_use_is_inexact() -> None:
    x = sequence(3, 4)
    wg = width_graph(SharedGain(), x)
    assert wg["write"].inexact_growth == (
        "its layer norm shares its gain, which would have to be rescaled, with other ops "
        "(native_layer_norm at node norm)"
    )
    check_refusals(wg, x)


# -- attention -----------------------------------------------------------------------------------------------------


class GroupedQueries(nn.Module):
    """Attention in which several query heads share one head of keys and values."""

    def __init__(self, width: int = 12, heads: int = 6, shared: int = 2) -> None:
        super().__init__()
        self.heads, self.shared = heads, shared
        self.norm = nn.RMSNorm(width)
        self.q = nn.Linear(width, heads * 4)
        self.k, self.v = nn.Linear(width, shared * 4), nn.Linear(width, shared * 4)
        self.out = nn.Linear(heads * 4, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        y = self.norm(x)
        q = self.q(y).view(batch, length, self.heads, -1).transpose(1, 2)
        k, v = (p(y).view(batch, length, self.shared, -1).transpose(1, 2) for p in (self.k, self.v))
        k, v = (t.repeat_interleave(self.heads // self.shared, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).reshape(batch, length, -1))


class Stacked(nn.Module):
    """A block between an embedding and a head."""

    def __init__(self, block: nn.Module, width: int = 12) -> None:
        super().__init__()
        self.write, self.block, self.read = nn.Linear(5, width), block, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.block(self.write(x)))


class SelfAttention(nn.Module):
    """Torch's attention, which also averages its weights over the heads; nobody takes that average."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attention(x, x, x)
        return x + y


def test_results_that_nobody_uses_do_not_matter() -> None:
    x = sequence(2, 4, 5)
    wg = width_graph(Stacked(SelfAttention()), x)
    assert any(call.name == "mean" for call in wg.analysis.calls)
    assert recipes(wg)["block.attention.in_proj_weight#0"] == "FREE"
    check_all(wg, x)


def test_grouped_query_attention() -> None:
    x = sequence(2, 4, 5)
    wg = width_graph(Stacked(GroupedQueries()), x)
    assert all(group.inexact_growth is None for group in wg.free)
    assert len(wg.free) >= 4
    check_all(wg, x)


class CrossCovariance(nn.Module):
    """Attention between channels instead of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q(x).transpose(1, 2) @ self.k(x)).softmax(-1)
        return x + self.out((weights @ self.v(x).transpose(1, 2)).transpose(1, 2))


def test_softmax_over_channels_is_inexact() -> None:
    x = sequence(2, 4, 5)
    wg = width_graph(Stacked(CrossCovariance()), x)
    found = recipes(wg)
    assert "its softmax sees new channels" in str(wg["block.k"].inexact_growth)
    assert found["block.q"] == "FREE"
    check_all(wg, x)
    check_refusals(wg, x)


class Latents(nn.Module):
    """Learned latents, normalised by themselves, to which a stream is added."""

    def __init__(self, expanded: bool) -> None:
        super().__init__()
        self.expanded = expanded
        self.latents = nn.Parameter(torch.randn(4, 8))
        self.norm = nn.LayerNorm(8)
        self.queries, self.stream, self.head, self.out = (
            nn.Linear(8, 5), nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(5, 2),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        latents = self.latents.expand(len(x), -1, -1) if self.expanded else self.latents
        queries = torch.tanh(self.queries(self.norm(latents)))
        return self.head((latents + self.stream(x)[:, None]).mean(1)) + self.out(queries).mean(-2)


@pytest.mark.parametrize("expanded", [False, True])
def test_gains_of_norms_over_parameters_alone_are_rescaled(expanded: bool) -> None:
    torch.manual_seed(0)
    model, x = Latents(expanded).double().eval(), torch.randn(3, 6, dtype=torch.float64)
    gm, before = fxwidth.trace(model, x), model(x)
    width_graph = fxwidth.analyze(gm)
    assert width_graph["stream"].inexact_growth is None
    fxwidth.resize(gm, {"stream": 11})
    torch.testing.assert_close(gm(x), before, rtol=1e-12, atol=1e-12)


def test_growth_that_would_not_be_exact_after_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = fxwidth.trace(Latents(False), torch.randn(3, 6))
    monkeypatch.setattr(parameters, "gains_kept", lambda *_: {"norm.weight": "planted"})
    with pytest.raises(fxwidth.FxwidthError, match="growth would change what node norm computes, whose gain"):
        fxwidth.resize(gm, {"stream": 11})
    assert gm.get_parameter("stream.weight").shape == (8, 6)
