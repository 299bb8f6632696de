"""A module that is replaced by its ops does in training what it did before: dropout, batch norms, and nothing else."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxwidth
from fxwidth.errors import FxwidthError
from fxwidth.rewriting.lowering import Lowering
from fxwidth.tracing import analyze_module
from fxwidth.verification import largest_difference
from tests.network_cases import tokens
from tests.oracles import ROUNDING, as_one_node, assert_rewrites, randomise


class Around(nn.Module):
    """A layer between two linear ones, so that nothing it does is seen outside."""

    def __init__(self, layer: nn.Module, call: Callable[..., Tensor], width: int = 24, memory: bool = False) -> None:
        super().__init__()
        self.into, self.layer, self.head = nn.Linear(16, width), layer, nn.Linear(width, 7)
        self.memory = nn.Linear(16, width) if memory else None
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        memory = () if self.memory is None else (self.memory(x),)
        return self.head(self.call(self.layer, self.into(x), *memory))


def plainly(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def encoder_layer(**options: Any) -> Around:
    return Around(nn.TransformerEncoderLayer(24, 4, 40, 0.4, **options), plainly)


def encoder() -> Around:
    layer = nn.TransformerEncoderLayer(24, 4, 40, 0.4, batch_first=True)
    return Around(nn.TransformerEncoder(layer, 2, nn.LayerNorm(24), enable_nested_tensor=False), plainly)


def causal_encoder() -> Around:
    layer = nn.TransformerEncoderLayer(24, 4, 40, 0.4, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    return Around(layer, lambda layer, x: layer(x, src_mask=mask, is_causal=True))


def decoder() -> Around:
    layer = nn.TransformerDecoderLayer(24, 4, 40, 0.4, batch_first=True)
    return Around(nn.TransformerDecoder(layer, 2), lambda layer, x, memory: layer(x, memory), memory=True)


def attention(need_weights: bool = True, mask: Tensor | None = None, **options: Any) -> Around:
    layer = nn.MultiheadAttention(24, 4, dropout=0.4, batch_first=True, **options)

    def call(layer: nn.Module, x: Tensor) -> Tensor:
        return x + layer(x, x, x, key_padding_mask=mask, need_weights=need_weights)[0]

    return Around(layer, call)


def cross_attention(**options: Any) -> Around:
    """Keys and values of widths of their own."""

    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key, self.value = nn.Linear(16, 20), nn.Linear(16, 12)
            self.into, self.head = nn.Linear(16, 24), nn.Linear(24, 7)
            self.layer = nn.MultiheadAttention(24, 4, dropout=0.4, kdim=20, vdim=12, batch_first=True, **options)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(self.into(x), self.key(x), self.value(x), need_weights=False)[0])

    return Crossed()  # type: ignore[return-value]


PADDING = torch.tensor([[False, False, False, True, True], [False, False, False, False, True]])

MODELS: dict[str, Callable[[], nn.Module]] = {
    "encoder layer": lambda: encoder_layer(batch_first=True),
    "encoder layer, norm first": lambda: encoder_layer(norm_first=True, activation="gelu"),
    "encoder layer, norm and batch first": lambda: encoder_layer(norm_first=True, batch_first=True, bias=False),
    "encoder layer, batch second, gelu": lambda: encoder_layer(activation="gelu"),
    "encoder": encoder,
    "causal encoder": causal_encoder,
    "decoder": decoder,
    "attention with weights": attention,
    "attention": lambda: attention(need_weights=False),
    "attention, padded": lambda: attention(False, PADDING),
    "attention, padded, with weights": lambda: attention(True, PADDING),
    "attention with biases of keys": lambda: attention(False, add_bias_kv=True, add_zero_attn=True),
    "attention without biases": lambda: attention(bias=False),
    "attention to others": cross_attention,
    "attention to others with biases of keys": lambda: cross_attention(add_bias_kv=True),
}
by_model = pytest.mark.parametrize("name", MODELS)


def _scaled(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return x * (1 - p / 3) if training else x


def _scaled_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any, dropout_p: float, is_causal: bool) -> Tensor:
    return (1 - dropout_p / 3) * _fused(q, k, v, attn_mask, 0.0, is_causal)


_fused = F.scaled_dot_product_attention


@contextmanager
def dropout_that_scales() -> Iterator[None]:
    """Let every dropout scale by a number, so that two networks with dropout can be compared."""
    with patch.multiple(F, dropout=_scaled, scaled_dot_product_attention=_scaled_attention):
        yield


def grown(model: nn.Module) -> tuple[nn.Module, fx.GraphModule]:
    """Return a model, and its graph after all groups that can grow without a change of function have grown."""
    model = randomise(model.eval()).double()
    gm = fxwidth.trace(copy.deepcopy(model), torch.randn(2, 5, 16, dtype=torch.float64))
    wg = fxwidth.analyze(gm)
    plan = {g.name: g.width + 1 + i % 2 for i, g in enumerate(wg.free) if g.inexact_growth is None}
    assert len(plan) >= 2
    fxwidth.resize(gm, plan)
    assert gm.meta["fxwidth_history"][-1]["lowered"]
    return model, gm


@by_model
def test_removals_replay_and_the_new_graph_trains(name):
    gm = assert_rewrites(MODELS[name](), tokens()())
    assert gm.meta["fxwidth_history"][-1]["lowered"]
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    gm.eval()
    assert torch.equal(gm(x), gm(x))
    gm.train()
    assert not torch.allclose(gm(x), gm(x))
    optimizer = torch.optim.SGD(gm.parameters(), 0.05)
    before = [tensor.clone() for tensor in gm.parameters()]
    gm(x).square().mean().backward()
    optimizer.step()
    assert any(not torch.equal(one, other) for one, other in zip(before, gm.parameters(), strict=True))
    gm.eval()
    assert torch.equal(gm(x), gm(x))


def test_dropout_stands_where_it_stood():
    model, gm = grown(encoder())
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    assert largest_difference([gm(x)], [model(x)]) < 1e-10
    with dropout_that_scales():
        for module in (model.train(), gm.train()):
            module.into.train(False)
        expected, plain = model(x), model.eval()(x)
        assert largest_difference([plain], [expected]) > 1e-2
        assert largest_difference([gm(x)], [expected]) < 1e-10
        # A part that is frozen alone has no dropout, as before.
        for module in (model.train(), gm):
            module.get_submodule("layer.layers.0.self_attn").eval()
        assert largest_difference([gm(x)], [model(x)]) < 1e-10
        assert largest_difference([model(x)], [expected]) > 1e-3


@by_model
def test_growth_and_dropout(name):
    model, gm = grown(MODELS[name]())

    x = torch.randn(2, 5, 16, dtype=torch.float64)
    assert largest_difference([gm(x)], [model(x)]) < 1e-10
    with dropout_that_scales():
        assert largest_difference([gm.train()(x)], [model.train()(x)]) < 1e-10


def test_a_lost_dropout_is_seen(monkeypatch):
    monkeypatch.setattr(Lowering, "_dropped", lambda self, source, dropout: source)
    model, gm = grown(attention())
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    with dropout_that_scales():
        assert largest_difference([gm.train()(x)], [model.train()(x)]) > 1e-3


def test_any_batch_copies_and_pickles():
    gm = assert_rewrites(fxwidth.trace(encoder(), tuple(tokens()())), tokens()()).train()
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    stored = io.BytesIO()
    torch.save(gm, stored)
    stored.seek(0)
    for other in (copy.deepcopy(gm), torch.load(stored, weights_only=False)):
        torch.manual_seed(3)
        expected = gm(x)
        torch.manual_seed(3)
        assert torch.equal(other(x), expected)
        assert not torch.equal(other(x), other(x))
        assert torch.equal(other.eval()(x), gm.eval()(x))
        gm.train()


def test_a_second_resize():
    gm = assert_rewrites(encoder(), tokens()())
    again = assert_rewrites(gm, tokens()(), seed=1)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    assert not torch.allclose(again.train()(x), again(x))


def test_attention_without_dropout_stays_fused():
    layer = nn.MultiheadAttention(24, 4, batch_first=True)
    gm = assert_rewrites(Around(layer, lambda m, x: m(x, x, x, need_weights=False)[0]), tokens()())
    assert F.scaled_dot_product_attention in {node.target for node in gm.graph.nodes}
    assert torch.bmm not in {node.target for node in gm.graph.nodes}


# -- modules of one's own, as one node --


class Halves(nn.Module):
    """A module that cannot stay as it is: it holds a literal."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 12), nn.Linear(6, 7)

    def halve(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return x[..., :6] + x[..., 6:]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.dropout(self.halve(x), 0.3, self.training))


class SometimesSkipped(nn.Module):
    """Stochastic depth: nothing in evaluation, random factors in training."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(0.7).div_(0.7)


class Deep(Halves):
    """One value with and without dropout, a batch norm, and stochastic depth."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.skip = nn.BatchNorm1d(6), nn.Dropout(0.5), SometimesSkipped()

    def forward(self, x: Tensor) -> Tensor:
        x = self.halve(x)
        x = self.norm(x.mean(1)) if x.dim() == 3 else self.norm(x)
        return self.second(x + 2 * self.skip(self.drop(x)))


def lowered(model: nn.Module) -> fx.GraphModule:
    """Return a model as one node, every group halved."""
    gm = as_one_node(randomise(model.eval()).double())
    analyze_module(gm, (torch.randn(4, 5, 16, dtype=torch.float64),))
    fxwidth.resize(gm, {group.name: group.width // 2 for group in fxwidth.analyze(gm).free}, fold=False)
    assert gm.meta["fxwidth_history"][-1]["lowered"]
    return gm


def test_functional_dropout():
    gm = lowered(Halves())
    (drop,) = [gm.get_submodule(str(node.target)) for node in gm.graph.nodes if "dropout" in str(node.target)]
    assert isinstance(drop, nn.Dropout)
    assert drop.p == 0.3
    assert gm.model.fxwidth_dropout_0 is drop


def test_parts_that_know_their_mode_stay_modules():
    gm = lowered(Deep())
    assert [str(node.target) for node in gm.graph.nodes if node.op == "call_module"] == [
        "model.norm",
        "model.drop",
        "model.skip",
    ]
    x = torch.randn(64, 5, 16, dtype=torch.float64)
    assert torch.equal(gm(x), gm(x))
    statistics = gm.model.norm.running_mean.clone()
    gm.train()
    gm(x)
    assert not torch.equal(gm.model.norm.running_mean, statistics)
    assert gm.model.norm.running_mean.shape == (3,)
    first, norm, second = gm.model.first, gm.model.norm, gm.model.second
    with torch.no_grad():
        gm.model.drop.eval()
        gm.model.skip.eval()
        half = F.relu(first(x))
        half = norm((half[..., :3] + half[..., 3:]).mean(1))
        assert largest_difference([gm(x)], [second(3 * half)]) < ROUNDING


class GroupedQueries(nn.Module):
    """Fused attention in a module of its own: keys shared by query heads, a mask of truths, or a causal one."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.head = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(32, 7)
        self.causal = causal
        self.register_buffer("mask", torch.ones(5, 5, dtype=torch.bool).tril(1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).view(x.shape[0], 5, -1, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        dropout = 0.3 if self.training else 0.0
        mask = None if self.causal else self.mask
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, self.causal, enable_gqa=True)
        return self.head(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_ones_own(causal):
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    model = randomise(GroupedQueries(causal).eval()).double()
    gm = as_one_node(copy.deepcopy(model))
    analyze_module(gm, (x,))
    assert_rewrites(as_one_node(copy.deepcopy(model)), [x])
    fxwidth.resize(gm, {g.name: g.width + 1 for g in fxwidth.analyze(gm).free if g.inexact_growth is None})
    assert gm.meta["fxwidth_history"][-1]["lowered"]
    assert largest_difference([gm(x)], [model(x)]) < 1e-10
    assert not torch.allclose(gm.train()(x), gm(x))
    with patch.object(F, "dropout", _scaled):
        assert largest_difference([gm(x)], [model(x)]) > 1e-3
        gm.model.fxwidth_dropout_0.p = 0.0
        assert largest_difference([gm(x)], [model(x)]) < 1e-10


class Pooling(nn.Module):
    """Attention called as a function, with the module's mode as an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(16, 24), nn.Linear(24, 7)
        self.q, self.k, self.v, self.c = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x).transpose(0, 1)
        biases = torch.cat([self.q.bias, self.k.bias, self.v.bias])
        weights = {f"{name}_proj_weight": getattr(self, name).weight for name in "qkv"}
        options = {"training": self.training, "need_weights": False, "use_separate_proj_weight": True, **weights}
        out = (None, biases, None, None, False, 0.4, self.c.weight, self.c.bias)
        return self.head(F.multi_head_attention_forward(x, x, x, 24, 4, *out, **options)[0].transpose(0, 1))


def test_functions_that_are_told_the_mode():
    model, gm = grown(Pooling())
    assert gm.fxwidth_dropout_0.p == 0.4
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    assert not torch.equal(gm.train()(x), gm(x))
    with dropout_that_scales():
        assert largest_difference([gm(x)], [model.train()(x)]) < 1e-10
        assert largest_difference([gm.eval()(x)], [model.eval()(x)]) < 1e-10


class InPlace(Halves):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.dropout(self.halve(x), 0.3, self.training, inplace=True))


class OtherInTraining(Halves):
    def forward(self, x: Tensor) -> Tensor:
        x = self.halve(x)
        return self.second(torch.sin(x) if self.training else torch.cos(x))


class MoreInTraining(Halves):
    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.halve(x))
        return x + 1 if self.training else x


class LessInTraining(Halves):
    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.halve(x))
        return x if self.training else x + 1


class OtherOperand(Halves):
    def forward(self, x: Tensor) -> Tensor:
        x = self.halve(x)
        one, two = x.sin(), x.sin()
        return self.second(one if self.training else two)


class ByValue(Halves):
    def forward(self, x: Tensor) -> Tensor:
        x = self.halve(x)
        return self.second(x * 2 if self.training and torch.rand(()) < 0.5 else x)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (InPlace, "it has a dropout in place"),
        (OtherInTraining, "in training it runs aten.sin.default where in evaluation it runs aten.cos.default"),
        (MoreInTraining, "in training it runs aten.add.Tensor where in evaluation it runs nothing"),
        (LessInTraining, "in training it does not run aten.add.Tensor"),
        (OtherOperand, "in training it runs aten.view.default where in evaluation it runs aten.view.default"),
        (ByValue, "what it does in training depends on values"),
    ],
)
def test_what_else_happens_in_training_is_refused(model, reason):
    with pytest.raises(FxwidthError) as caught:
        lowered(model())
    assert f"which cannot follow what the module does in training: {reason}. Keep the groups" in str(caught.value)


class NotTrainable(Halves):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise ValueError("targets are missing")
        return super().forward(x)


def test_a_module_that_cannot_be_trained_is_lowered_as_it_is_in_evaluation():
    gm = lowered(NotTrainable())
    assert not [node for node in gm.graph.nodes if node.op == "call_module"]


def test_no_hook_stays_behind():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    gm = fxwidth.trace(nn.Sequential(nn.Linear(8, 8), encoder).eval(), torch.randn(2, 5, 8))
    fxwidth.resize(gm, {group.name: max(1, group.width // 2) for group in fxwidth.analyze(gm).free})
    assert fxwidth.report(gm).resizes[-1]["lowered"]
    assert not torch.nn.modules.module._has_any_global_hook()
