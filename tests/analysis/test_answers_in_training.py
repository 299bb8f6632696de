"""The sizes of what a model returns in training alone are pinned, as those of its outputs are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth.analysis import axis_propagation


class EarlyExits(nn.Module):
    """One answer in evaluation, by what it finds, and one of each head in training."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6 if i == 0 else 8, 8) for i in range(3)])
        self.heads = nn.ModuleList([nn.Linear(8, 3) for _ in range(3)])

    def answers(self, x: Tensor) -> list[Tensor]:
        answers: list[Tensor] = []
        for layer, head in zip(self.layers, self.heads, strict=True):
            x = torch.relu(layer(x))
            answers.append(head(x))
            if not self.training and answers[-1].softmax(-1).amax(-1).mean() > 0.9:
                break
        return answers

    def forward(self, x: Tensor) -> Any:
        answers = self.answers(x)
        return answers if self.training else answers[-1]


class Features(EarlyExits):
    """Returns hidden features beside its answer, in a dict, in training."""

    def forward(self, x: Tensor) -> Any:
        hidden = torch.relu(self.layers[0](x))
        answer = self.heads[0](hidden)
        if not self.training and answer.sum() > 1e9:
            answer = answer * 2
        return {"answer": answer, "hidden": hidden} if self.training else {"answer": answer}


class NeedsTargets(EarlyExits):
    """Does not run in training without targets: nothing is known of what it returns there."""

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
        hidden = torch.relu(self.layers[0](x))
        answer = self.heads[0](hidden)
        if self.training:
            assert targets is not None
            return {"loss": (answer - targets).square().mean()}
        return answer if answer.sum() > -1e9 else answer * 2


def shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return {k: shapes(v) for k, v in value.items()} if isinstance(value, dict) else list(map(shapes, value))


def both(gm: nn.Module) -> list[Any]:
    x = torch.randn(4, 6)
    return [shapes(gm.train(mode)(x)) for mode in (True, False)]


@pytest.mark.parametrize("kind", [EarlyExits, Features])
def test_answers_keep_their_sizes_in_both_modes(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    gm = fxwidth.trace(kind().eval(), torch.randn(4, 6))
    before = both(gm)
    gm.eval()
    width_graph = fxwidth.analyze(gm)
    assert any("in training" in str(group.pinned) for group in width_graph.groups)
    fxwidth.resize(gm, {group.name: 2 for group in width_graph.free})
    assert both(gm) == before


def test_a_model_that_needs_targets_has_no_pins_of_training() -> None:
    gm = fxwidth.trace(NeedsTargets().eval(), torch.randn(4, 6))
    assert not any("in training" in str(group.pinned) for group in fxwidth.analyze(gm).groups)


def test_answers_that_nobody_follows_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(axis_propagation, "follow_other_answer", lambda *_: [])
    torch.manual_seed(0)
    gm = fxwidth.trace(EarlyExits().eval(), torch.randn(4, 6))
    before = both(gm)
    gm.eval()
    fxwidth.resize(gm, {group.name: 2 for group in fxwidth.analyze(gm).free})
    assert both(gm) != before
