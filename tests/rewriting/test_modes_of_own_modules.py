"""Modules of one's own, as one node that is replaced by its ops, do in training what they did, or are refused."""

from __future__ import annotations

import copy
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxwidth
from fxwidth.errors import FxwidthError
from fxwidth.tracing.analyze import analyze_module
from fxwidth.verification.replay_oracle import largest_difference
from tests.oracles.judges import ROUNDING, as_one_node, assert_rewrites, randomise
from tests.oracles.training_modes import dropout_that_scales, grown, scaled


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
    with patch.object(F, "dropout", scaled):
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
