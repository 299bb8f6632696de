"""Widths at which an op over channels has no result, or one that says nothing, are neither planned nor carried out."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth import FxwidthError

WIDTH = 8


class Between(nn.Module):
    """Has an op over the channels between two layers."""

    def __init__(self, op: Callable[[Tensor], Tensor] | nn.Module) -> None:
        super().__init__()
        self.up, self.op, self.down = nn.Linear(6, WIDTH), op, nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.op(self.up(x)))


class Standardised(nn.Module):
    """Weight standardisation."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, WIDTH), nn.Linear(7, 3)
        self.weight = nn.Parameter(torch.randn(7, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean(1, keepdim=True)) / (self.weight.std(1, keepdim=True) + 1e-5)
        return self.down(torch.relu(nn.functional.linear(torch.relu(self.up(x)), weight)))


class GroupNormed(nn.Module):
    """Group norm of vectors: one channel per group would be taken off itself."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, WIDTH), nn.GroupNorm(2, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)))


def _by_deviation(**options: object) -> Callable[[Tensor], Tensor]:
    return lambda h: h / h.std(-1, keepdim=True, **options)


CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "weight standardisation": (Standardised, 2),
    "deviation": (lambda: Between(_by_deviation()), 2),
    "biased deviation": (lambda: Between(_by_deviation(correction=0)), 2),
    "more is taken off": (lambda: Between(_by_deviation(correction=3)), 4),
    "variance and mean": (lambda: Between(lambda h: h * torch.var_mean(h, -1, keepdim=True)[0]), 2),
    "layer norm": (lambda: Between(nn.LayerNorm(WIDTH)), 2),
    "RMS norm": (lambda: Between(nn.RMSNorm(WIDTH)), 2),
    "softmax": (lambda: Between(nn.Softmax(-1)), 2),
    "group norm of vectors": (GroupNormed, 2),
    "nothing": (lambda: Between(nn.ReLU()), 1),
}


def mixed_group(gm: torch.fx.GraphModule, least: int) -> fxwidth.ChannelGroup:
    groups = [group for group in fxwidth.analyze(gm).free if group.least.width == least and group.width in (8, 4)]
    assert len(groups) == 1
    return groups[0]


@pytest.mark.parametrize("name", CASES)
def test_the_least_width_is_kept(name: str) -> None:
    make, least = CASES[name]
    x = torch.randn(5, 6, dtype=torch.float64)
    gm = fxwidth.trace(make().double().eval(), x)
    group = mixed_group(gm, least)
    if least > 1:
        with pytest.raises(
            FxwidthError, match=rf"cannot shrink from {group.width} to {least - 1}: a .* needs {least} ent"
        ):
            fxwidth.resize(gm, {group.name: least - 1})
    with pytest.raises(FxwidthError, match="out of reach"):
        fxwidth.plan(fxwidth.analyze(gm), params=1, min_width=1)
    smallest = fxwidth.plan(fxwidth.analyze(gm), params=_fewest(gm), min_width=1)
    assert smallest[group.name] == least
    fxwidth.resize(gm, smallest)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = gm(x)
    assert y.isfinite().all()
    # Outputs follow their inputs still.
    assert float(y.detach().std(0).max()) > 1e-6


def _fewest(gm: torch.fx.GraphModule) -> int:
    """Return how many parameters are left when every group has its least width."""
    try:
        fxwidth.plan(fxwidth.analyze(gm), params=1, min_width=1)
    except FxwidthError as error:
        return int(str(error).partition("smallest width ")[2].split()[0])
    raise AssertionError("one parameter is in reach")


def test_plans_go_to_width_one() -> None:
    gm = fxwidth.trace(Between(nn.ReLU()).eval(), torch.randn(5, 6))
    assert fxwidth.plan(fxwidth.analyze(gm), shrink_energy=0.999) == {"up": 1}
    assert fxwidth.plan(fxwidth.analyze(gm), shrink_energy=0.999, min_width=2) == {"up": 2}
    # 7 + 6 parameters at width one.
    assert fxwidth.plan(fxwidth.analyze(gm), params=23) == {"up": 2}
    assert fxwidth.plan(fxwidth.analyze(gm), params=13) == {"up": 1}
    with pytest.raises(FxwidthError, match="out of reach"):
        fxwidth.plan(fxwidth.analyze(gm), params=13, min_width=2)


class TwoFactors(nn.Module):
    """A layer norm over heads and channels per head together: one of the two may come to one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).view(-1, 2, 4)
        return self.down(self.norm((h / h.square().sum(-1, keepdim=True)).flatten(1)))


def test_widths_that_do_not_go_together() -> None:
    gm = fxwidth.trace(TwoFactors().eval(), torch.randn(5, 6))
    heads, channels = (group.name for group in fxwidth.analyze(gm).free)
    with pytest.raises(FxwidthError, match="do not go together: a layer norm needs 2 entries"):
        fxwidth.resize(gm, {heads: 1, channels: 1})
    fxwidth.resize(gm, {heads: 1, channels: 2})
    assert gm(torch.randn(5, 6)).isfinite().all()
