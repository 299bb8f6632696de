"""Attention with dropout, which a resized graph has in parts and the class of torch as one op."""

import pytest
import torch
from torch import nn

import fxwidth

_X = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
_LAYER = {"dim_feedforward": 64, "batch_first": True}


class Classifier(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(6, 32)
        self.inner = inner
        self.last = nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(self.first(x)).mean(1))


class Attention(nn.Module):
    def __init__(self, mask: torch.Tensor | None = None, pads: bool = False, dropout: float = 0.1) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, dropout=dropout, batch_first=True)
        self.pads = pads
        self.register_buffer("mask", mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padding = (x.sum(-1) > 0) & (torch.arange(5, device=x.device) > 0) if self.pads else None
        return self.attention(x, x, x, key_padding_mask=padding, attn_mask=self.mask, need_weights=False)[0]


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, **_LAYER), 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x, x.flip(1))


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, **_LAYER), 1, enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x, mask=self.mask, is_causal=True)


# Dropout is 0.1 by default.
_CASES = {
    "attention": Attention,
    "with a mask of scores": lambda: Attention(torch.linspace(-1, 1, 25, dtype=torch.float64).view(5, 5)),
    "with a mask of places": lambda: Attention(torch.ones(5, 5, dtype=torch.bool).triu(1)),
    "with padding": lambda: Attention(pads=True),
    "layer": lambda: nn.TransformerEncoderLayer(32, 4, **_LAYER),
    "encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, **_LAYER), 2, enable_nested_tensor=False
    ),
    "decoder": Decoder,
    "causal": Causal,
}


def _planned(make, is_training=False, device="cpu") -> tuple[nn.Module, torch.fx.GraphModule]:
    torch.manual_seed(0)
    with torch.device(device):
        model = Classifier(make()).double().train(is_training)
        gm = fxwidth.trace(model, _X.to(device))
    plan = fxwidth.plan(fxwidth.analyze(gm), params=0.5, for_module=model)
    heads = [name for name in plan.widths if name.endswith("#0")]
    assert heads, "no number of heads changes: nothing is shown"
    return model, fxwidth.resize(gm, plan)


# The others are these with a layer around them, or with another kind of mask.
_QUICK = ("attention", "with padding", "decoder", "causal")


@pytest.mark.parametrize("is_training", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "name", [name if name in _QUICK else pytest.param(name, marks=pytest.mark.slow) for name in _CASES]
)
def test_the_class_holds_it_as_one_op_and_drops_out_as_before(name, is_training):
    model, gm = _planned(_CASES[name], is_training)
    assert fxwidth.write_back(gm, model) is model
    assert model.training == is_training
    model.eval()
    gm.eval()
    for batch in (2, 3):
        x = torch.cat([_X, _X[:1]])[:batch]
        assert torch.allclose(model(x), gm(x), rtol=0, atol=1e-12)
    model.train()
    assert not torch.equal(model(_X), model(_X))


@pytest.mark.parametrize(
    "name",
    [
        "attention",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("decoder", "with a mask of places", "causal")),
    ],
)
def test_it_is_held_where_there_are_no_values(name):
    model, gm = _planned(_CASES[name], device="meta")
    assert fxwidth.write_back(gm, model).first.out_features < 32


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_another_dropout_is_refused(device):
    model, gm = _planned(Attention, device=device)
    model.inner.attention.dropout = 0.2
    with pytest.raises(fxwidth.FxwidthError, match="in training"):
        fxwidth.write_back(gm, model)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), "meta"])
def test_another_scale_or_another_mask_is_refused(device):
    model, gm = _planned(lambda: Attention(torch.zeros(5, 5, dtype=torch.float64)), device=device)
    scale = next(node for node in gm.graph.nodes if node.target is torch.mul)
    scale.update_arg(1, 0.3)
    gm.recompile()
    with pytest.raises(fxwidth.FxwidthError, match=r"it does attention .*scale.* where attention .*0\.3.* is needed"):
        fxwidth.write_back(gm, model)
    model, gm = _planned(lambda: Attention(torch.zeros(5, 5, dtype=torch.float64)), device=device)
    mask = next(node for node in gm.graph.nodes if node.target is torch.add)
    mask.replace_all_uses_with(mask.args[0])
    gm.graph.erase_node(mask)
    gm.recompile()
    with pytest.raises(fxwidth.FxwidthError, match="it does"):
        fxwidth.write_back(gm, model)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), "meta"])
def test_another_order_of_positions_is_refused(device):
    model, gm = _planned(Causal, device=device)
    above = next(node for node in gm.graph.nodes if node.target is torch.triu)
    above.update_arg(1, 2)
    gm.recompile()
    with pytest.raises(fxwidth.FxwidthError, match=r"where mul .* is needed"):
        fxwidth.write_back(gm, model)


def test_what_no_op_tells_is_told_by_values():
    model, gm = _planned(Attention)
    scaled = next(node for node in gm.graph.nodes if node.target is torch.mul and isinstance(node.args[1], float))
    turned = next(node for node in gm.graph.nodes if node.target is torch.transpose)
    query, key = scaled.args[0], turned.args[0]
    scaled.prepend(key)
    scaled.update_arg(0, key)
    turned.update_arg(0, query)
    gm.recompile()
    with pytest.raises(fxwidth.FxwidthError, match=r"differ by .* in evaluation"):
        fxwidth.write_back(gm, model)
