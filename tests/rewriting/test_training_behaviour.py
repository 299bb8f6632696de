"""A module that is replaced by its ops does in training what it did before: dropout, batch norms, and nothing else."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxwidth
from fxwidth.rewriting.lowering import Lowering
from fxwidth.verification.replay_oracle import largest_difference
from tests.oracles.judges import assert_rewrites
from tests.oracles.training_modes import dropout_that_scales, grown
from tests.zoo.network_cases import tokens


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


def test_no_hook_stays_behind():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    gm = fxwidth.trace(nn.Sequential(nn.Linear(8, 8), encoder).eval(), torch.randn(2, 5, 8))
    fxwidth.resize(gm, {group.name: max(1, group.width // 2) for group in fxwidth.analyze(gm).free})
    assert fxwidth.report(gm).resizes[-1]["lowered"]
    assert not torch.nn.modules.module._has_any_global_hook()
