"""Growth is exact in training too: what a part does there alone is followed as the tape is."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth.growth.interpreter import Interpretation
from fxwidth.verification.replay_oracle import largest_difference
from tests.oracles.judges import randomise


class InTrainingAlone(nn.Module):
    def __init__(self, work: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.work = work

    def forward(self, x: Tensor) -> Tensor:
        return self.work(x) if self.training else x


class Observer(nn.Module):
    """A range that training alone finds out, by a function of the values."""

    def __init__(self, see: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.see = see
        self.register_buffer("range", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.range.copy_(self.see(x.detach()))
        return x / self.range


class Tracker(nn.Module):
    """A mean per channel that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return x


def network(*parts: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return randomise(nn.Sequential(nn.Linear(6, 8), *copy.deepcopy(parts), nn.Linear(8, 3))).double()


def rows() -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def outputs(module: nn.Module) -> list[Tensor]:
    found = []
    for mode in (True, True, False):
        torch.manual_seed(4)
        with torch.no_grad():
            found.append(module.train(mode)(rows()))
    return found


EXACT = {
    "scaled": [InTrainingAlone(lambda x: x * 2)],
    "shifted": [InTrainingAlone(lambda x: x + 1)],
    "shifted behind a norm": [nn.LayerNorm(8), InTrainingAlone(lambda x: x + 1)],
    "scaled behind a norm": [nn.LayerNorm(8), InTrainingAlone(lambda x: x * 2)],
    "shifted before a norm": [InTrainingAlone(lambda x: x + 1), nn.LayerNorm(8)],
    "rows dropped": [nn.LayerNorm(8), InTrainingAlone(lambda x: x * x.new_empty(x.shape[0], 1).bernoulli_(0.7))],
    "observed sum": [nn.ReLU(), Observer(lambda x: x.sum() + 1)],
    "tracked": [Tracker()],
}


@pytest.mark.parametrize("name", EXACT)
def test_growth_is_exact_in_training(name: str) -> None:
    model = network(*EXACT[name])
    gm = fxwidth.trace(model, rows())
    expected = outputs(gm)
    with torch.no_grad():
        for buffer in gm.buffers():
            buffer.fill_(1)
    (group,) = [group for group in fxwidth.analyze(gm).free if group.width == 8]
    assert group.inexact_growth is None
    fxwidth.resize(gm, {group.name: 13})
    assert largest_difference(outputs(gm), expected) < 1e-12


OBSERVED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "max": (lambda x: x.max(), "in training, it takes a maximum over new channels"),
    "mean": (lambda x: x.mean(), "in training, it takes the mean over new channels, which cannot be"),
    "deviation": (lambda x: x.std(), "in training, it takes a "),
}


@pytest.mark.parametrize("name", OBSERVED)
def test_what_training_sees_of_all_channels_is_told(name: str) -> None:
    see, told = OBSERVED[name]
    (group,) = fxwidth.analyze(fxwidth.trace(network(nn.ReLU(), Observer(see)), rows())).free
    assert group.inexact_growth is not None
    assert group.inexact_growth.startswith(told)
    assert "fxwidth_in_training_0" in group.inexact_growth


def test_a_training_that_nobody_follows_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Interpretation, "_less_in_training", lambda _: False)
    gm = fxwidth.trace(network(*EXACT["shifted behind a norm"]), rows())
    expected = outputs(gm)
    (group,) = fxwidth.analyze(gm).free
    fxwidth.resize(gm, {group.name: 13})
    assert largest_difference(outputs(gm), expected) > 1e-3


def test_a_buffer_that_training_alone_writes_keeps_up() -> None:
    gm = fxwidth.trace(network(Tracker()), rows())
    (group,) = fxwidth.analyze(gm).free
    fxwidth.resize(gm, {group.name: 5})
    gm.train()(rows())
    assert gm.get_buffer("1.mean").shape == (5,)
