"""Layers of low rank as two: exact where they are, near the best where they are not, and only where it saves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth.costs.registry import cost_polynomial
from fxwidth.factorization.chosen_ranks import Candidate, ranks_for_cost
from fxwidth.passes import FactorizeLinear
from tests.passes.networks import ExportedLowRank, LowRank, images, largest, settled


def costs(gm: torch.fx.GraphModule) -> dict[str, float]:
    return {name: cost_polynomial(fxwidth.analyze(gm), name)({}) for name in ("params", "flops")}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (LowRank, {"error": 0.0}), (LowRank, {"flops": 0.81}), (ExportedLowRank, {"params": 0.6}),
        *(pytest.param(ExportedLowRank, one, marks=pytest.mark.slow) for one in ({"error": 0.0}, {"flops": 0.81})),
    ],
)  # fmt: skip
def test_what_is_of_low_rank_is_exact(kind: type[nn.Module], options: dict[str, Any]) -> None:
    model, x = settled(kind()), images(64)
    gm = fxwidth.trace(model, x[:2])
    optimizer = torch.optim.Adam(gm.parameters())
    before, wanted, old = copy.deepcopy(model.state_dict()), model(x), costs(gm)
    assert FactorizeLinear(**options, data=[x], optimizer=optimizer)(gm).modified
    assert largest(gm(x), wanted) < 1e-12
    assert largest(gm.train()(x), wanted) < 1e-12
    assert all(costs(gm)[name] <= share * old[name] for name, share in options.items() if name != "error")
    assert sum(parameter.numel() for parameter in gm.parameters()) == costs(gm)["params"] < old["params"]
    assert {*map(id, optimizer.param_groups[0]["params"])} == {*map(id, gm.parameters())}
    gm(x).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("bias", [True, False])
def test_what_is_not_loses_hardly_more_than_the_best(bias: bool) -> None:
    torch.manual_seed(1)
    layer = nn.Linear(24, 20, bias=bias).double()
    mixed = torch.randn(24, 24, dtype=torch.float64) @ torch.diag(torch.logspace(0, -3, 24, dtype=torch.float64))
    x = torch.randn(1000, 24, dtype=torch.float64) @ mixed + torch.randn(24, dtype=torch.float64)
    wanted = layer(x)
    gm = fxwidth.trace(nn.Sequential(copy.deepcopy(layer), nn.ReLU(), nn.Linear(20, 3).double()), x[:2])
    assert FactorizeLinear(error=0.05, data=[x], only="0")(gm).modified
    rank = gm.get_parameter("0.0.weight").shape[0]
    assert 1 < rank < 10
    wanted = wanted.detach()
    found = (gm.get_submodule("0")(x).detach() - wanted).square().sum()
    # The best of that rank are the first principal components of the outputs; a bias takes their mean.
    outputs = wanted - wanted.mean(0) if bias else wanted
    best = torch.linalg.svdvals(outputs)[rank:].square().sum()
    assert float(best * (1 - 1e-9)) <= float(found) <= 1.03 * float(best)
    assert float(found) <= 0.051 * float(outputs.square().sum())


def test_layers_stay_where_two_would_not_be_smaller() -> None:
    gm = fxwidth.trace(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).double(), torch.randn(2, 6).double())
    assert not FactorizeLinear(error=0.0)(gm).modified
    assert not FactorizeLinear(params=1.0)(gm).modified


class Shared(nn.Module):
    """Weights of rank one that two layers share, that are called twice, and that have a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.twice, self.hooked = (nn.Linear(8, 8) for _ in range(4))
        for layer in (self.one, self.twice, self.hooked):
            layer.weight.data = torch.ones(8, 8)
        self.other.weight = self.one.weight
        self.hooked.register_forward_hook(lambda _, __, output: 2 * output)

    def forward(self, x: Tensor) -> Tensor:
        x = self.other(torch.relu(self.one(x)))
        return self.hooked(torch.relu(self.twice(torch.relu(self.twice(x)))))


def test_shared_weights_and_layers_with_hooks_stay() -> None:
    x = torch.randn(2, 8)
    gm = fxwidth.trace(Shared(), x)
    text = str(gm.graph)
    assert not FactorizeLinear(error=0.0)(gm).modified
    assert str(gm.graph) == text


def test_names_choose_layers() -> None:
    model, x = settled(LowRank()), images(64)
    for options, wanted in (({"only": "layer"}, {"layer"}), ({"keep": ["layer", "kern*"]}, {"point"})):
        gm = fxwidth.trace(model, x[:2])
        FactorizeLinear(error=0.0, data=[x], **options)(gm)  # type: ignore[arg-type]
        found = {name.partition(".")[0] for name, _ in gm.named_parameters() if ".0." in name}
        assert found == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"takes one of params=, flops= and error=, but received none"),
        ({"params": 0.5, "error": 0.1}, r"takes one of params=, flops= and error=, but received params, error"),
        ({"error": 1.0}, r"error=1.0 is the largest share of its outputs that a layer may lose, in \[0, 1\)"),
        ({"params": 200.0}, r"params=200.0 as a ratio"),
        ({"error": 0.1, "only": 3}, "only= takes names or patterns of layers, but received 3"),
        ({"error": 0.1, "data": 3}, "data is a int; pass an iterable of batches"),
        ({"error": 0.1, "only": "nothing"}, "only='nothing' names no layer"),
        ({"params": 0.001}, "params=0.001 is out of reach"),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], message: str) -> None:
    gm = fxwidth.trace(settled(LowRank()), images())
    text = str(gm.graph)
    with pytest.raises(fxwidth.FxwidthError, match=message):
        FactorizeLinear(**options)(gm)
    assert str(gm.graph) == text


def test_ranks_under_a_budget_are_the_best_that_can_be_found() -> None:
    """All choices of two small layers, gone through."""
    import numpy as np

    from fxwidth.selection.error_curves import logarithmic

    rng = np.random.default_rng(0)
    tried = 0
    for _ in range(20):
        layers = []
        for name, (inputs, outputs) in (("a", (12, 10)), ("b", (9, 14))):
            energies = np.sort(rng.exponential(size=min(inputs, outputs)) ** 3)[::-1]
            tails = np.concatenate([np.cumsum(energies[::-1])[::-1], [0.0]])
            layers.append(Candidate(name, inputs, outputs, 1, tails / tails[0]))
        present = sum(one.cost(None) for one in layers)
        limit = int(present * rng.uniform(0.4, 0.9))
        ranks = ranks_for_cost(layers, present, limit, "params")

        def total(choice: list[int | None], layers: list[Candidate] = layers) -> tuple[int, float]:
            cost = sum(one.cost(rank) for one, rank in zip(layers, choice, strict=True))
            curves = [logarithmic(one.lost) for one in layers]
            return cost, sum(
                0.0 if rank is None else float(own[rank]) for own, rank in zip(curves, choice, strict=True)
            )

        own_cost, own_error = total([ranks.get(one.name) for one in layers])
        choices: list[list[int | None]] = [[None, *range(1, one.largest + 1)] for one in layers]
        every = [total([a, b]) for a in choices[0] for b in choices[1]]
        best = min(error for cost, error in every if cost <= limit)
        assert own_cost <= limit
        # A price cannot reach what lies inside of the hull: what is left over goes step by step.
        assert own_error <= best * 1.5 + 1e-9
        tried += own_error <= best * 1.05 + 1e-9
    assert tried >= 12
