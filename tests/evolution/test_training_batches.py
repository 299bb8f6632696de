"""Batches given to `Evolver.step`: of other sizes than the example, in other forms, or of no use."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxwidth
from fxwidth import FxwidthError, FxwidthWarning


class Tagger(nn.Module):
    """Classes of tokens, in sequences of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.hidden, self.out = nn.Embedding(50, 12), nn.Linear(12, 24), nn.Linear(24, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return scores, [n, length, 5]."""
        return self.out(self.hidden(self.tokens(tokens)).relu())


def graph() -> torch.fx.GraphModule:
    torch.manual_seed(0)
    return fxwidth.trace(Tagger().double(), torch.randint(50, (4, 10)))


def batch(length: int) -> Tensor:
    return torch.randint(50, (4, length), generator=torch.Generator().manual_seed(length))


def loss(scores: Tensor, tags: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), tags.flatten() % 5)


OPTIONS: dict[str, Any] = {"every": 3, "rounds": 2, "params": 0.5}


def test_batches_of_other_lengths_are_left_out_with_a_word() -> None:
    evolver, alone = (fxwidth.Evolver(graph(), **OPTIONS) for _ in range(2))
    for step in range(6):
        inputs = batch(7 if step == 1 else 10)
        if step == 2:
            with pytest.warns(FxwidthWarning, match=r"1 of the 3 batches.*has shape \(4, 7\).*\(4, 10\).*data="):
                assert evolver.step(inputs) is not None
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                evolver.step(inputs)
        if step == 1:
            alone.step()
        else:
            alone.step(inputs)
    assert len(evolver.history) == 2
    assert evolver.history == alone.history
    for one, other in zip(evolver.gm.parameters(), alone.gm.parameters(), strict=True):
        assert torch.equal(one, other)
    assert fxwidth.report(evolver.gm).resizes[0]["evidence"] == "training and noise"


def test_where_no_batch_is_of_use_noise_is_looked_at() -> None:
    evolver = fxwidth.Evolver(graph(), **OPTIONS)
    plans = [evolver.step(batch(length)) for length in (6, 7)]
    with pytest.warns(FxwidthWarning, match=r"3 of the 3 batches.*Random inputs are looked at"):
        plans.append(evolver.step(batch(8)))
    assert [plan is None for plan in plans] == [True, True, False]
    assert fxwidth.report(evolver.gm).resizes[0]["evidence"] == "noise"


def test_a_loss_needs_batches_and_the_step_can_be_taken_again_with_them() -> None:
    evolver = fxwidth.Evolver(graph(), **OPTIONS, loss=loss)
    for length in (6, 7):
        evolver.step(batch(length), batch(length))
    before = evolver.state_dict()
    for _ in range(2):
        with pytest.raises(FxwidthError, match=r"there are none: 3 of the 3 batches.*\(4, 6\)"):
            evolver.step(batch(8), batch(8))
    assert evolver.state_dict()["progress"] == before["progress"]
    with pytest.warns(FxwidthWarning, match="2 of the 3 batches"):
        assert evolver.step(batch(10), batch(10)) is not None


def test_a_batch_that_is_not_finite_is_left_out() -> None:
    torch.manual_seed(0)
    gm = fxwidth.trace(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).double(), torch.ones(2, 6).double())
    evolver = fxwidth.Evolver(gm, every=2, rounds=1, params=0.6)
    evolver.step(torch.full((4, 6), float("nan")).double())
    with pytest.warns(FxwidthWarning, match="NaN"):
        assert evolver.step(torch.randn(4, 6).double()) is not None


def test_another_kind_of_batch_is_refused() -> None:
    evolver = fxwidth.Evolver(graph(), every=1, rounds=1, params=0.6)
    with pytest.raises(FxwidthError, match=r"is torch\.float32"):
        evolver.step(torch.randn(4, 10))


class Named(nn.Module):
    """A model whose inputs have names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Return scores, [n, 10]."""
        return self.b(self.a(image).relu())


FORMS = {
    "dict": (lambda x, y: {"image": x, "label": y}, lambda scores, rest: F.cross_entropy(scores, rest["label"])),
    "pair": (lambda x, y: (x, y), F.cross_entropy),
    "dict and target": (lambda x, y: ({"image": x}, y), F.cross_entropy),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_means_in_a_step_what_it_means_in_data(form: str) -> None:
    make, loss = FORMS[form]
    x, y = torch.randn(16, 8, generator=torch.Generator().manual_seed(1)).double(), torch.arange(16) % 10
    found = []
    for is_given in (True, False):
        torch.manual_seed(0)
        gm = fxwidth.trace(Named().double(), x)
        data = {"data": [make(x, y)]} if is_given else {}
        evolver = fxwidth.Evolver(gm, every=1, rounds=1, params=0.8, loss=loss, recalibrate=False, **data)
        assert (evolver.step() if is_given else evolver.step(make(x, y))) is not None
        found.append(gm.state_dict())
    assert found[0].keys() == found[1].keys()
    for name, one in found[0].items():
        assert torch.equal(one, found[1][name])
