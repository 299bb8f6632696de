"""What sees fewer channels and cannot make up for them is on record."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxwidth

PRODUCT = "it sums products of two activations over its channels"


class Normalized(nn.Module):
    """Channels brought to length one before they are read."""

    def __init__(self, *, by_length: bool = True) -> None:
        super().__init__()
        self.inner, self.outer, self.by_length = nn.Linear(6, 8), nn.Linear(8, 3), by_length

    def forward(self, x: Tensor) -> Tensor:
        """Return [rows, 3]."""
        x = torch.tanh(self.inner(x))
        result: Tensor = self.outer(F.normalize(x, dim=-1) if self.by_length else x)
        return result


class Scores(nn.Module):
    """Products of queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Return [batch, rows, rows]."""
        return self.queries(x) @ self.keys(x).mT


class WeightOfActivations(nn.Module):
    """Channels that are read by a weight that depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.mixture = nn.Linear(6, 8), nn.Linear(6, 2)
        self.experts = nn.Parameter(torch.randn(2, 8, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return [rows, 3]."""
        weight = torch.einsum("bk,kio->bio", self.mixture(x).softmax(-1), self.experts)
        return torch.einsum("bi,bio->bo", torch.relu(self.inner(x)), weight)


def told(model: nn.Module, x: Tensor, plan: dict[str, int], **options: object) -> set[str]:
    gm = fxwidth.trace(model.double(), x)
    drops = any(width < fxwidth.analyze(gm)[name].width for name, width in plan.items())
    fxwidth.resize(gm, plan, data=[x] if drops else None, **options)
    return set(fxwidth.report(gm).resizes[-1]["not_refitted"].values())


@pytest.mark.parametrize(
    ("model", "group", "expected"),
    [
        (Normalized(), "inner", {"it takes a vector norm over its channels"}),
        (Normalized(by_length=False), "inner", set()),
        (WeightOfActivations(), "experts:1", {PRODUCT}),
    ],
)
def test_products_and_reductions_of_activations_are_told(model: nn.Module, group: str, expected: set[str]) -> None:
    x = torch.randn(64, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert told(model, x, {group: 5}) == expected


def test_growth_loses_nothing_that_could_be_told() -> None:
    x = torch.randn(64, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert told(Normalized(by_length=False), x, {"inner": 9}) == set()


def test_products_in_a_new_basis_miss_least_and_are_not_told() -> None:
    x = torch.randn(8, 16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert told(Scores(), x, {"queries": 5}) == set()
    assert told(Scores(), x, {"queries": 5}, rotate=False) == {PRODUCT}
