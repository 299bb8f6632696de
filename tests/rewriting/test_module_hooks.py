"""Hooks of modules are called after a resize as before it, or the groups for which that cannot be keep their widths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

import fxwidth
from fxwidth import FxwidthError
from fxwidth.rewriting import trial_rewrites


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(h + self.attention(h, h, h)[0])


def rows() -> Tensor:
    return torch.randn(2, 5, 6, requires_grad=True)


HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], Any]] = {
    "forward": lambda part, hook: part.register_forward_hook(hook),
    "before": lambda part, hook: part.register_forward_pre_hook(hook),
    "backward": lambda part, hook: part.register_full_backward_hook(hook),
    "before backward": lambda part, hook: part.register_full_backward_pre_hook(hook),
}


def calls_of(gm: nn.Module, calls: list[int]) -> int:
    calls.clear()
    gm(rows()).sum().backward()
    return len(calls)


@pytest.mark.parametrize("place", ["attention", "attention.out_proj", "up"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_are_called_after_a_resize(kind: str, place: str) -> None:
    model, calls = Attentive().eval(), list[int]()
    HOOKS[kind](model.get_submodule(place), lambda *_: calls.append(1))
    gm = fxwidth.trace(model, rows())
    before = calls_of(gm, calls)
    width_graph = fxwidth.analyze(gm)
    fxwidth.resize(gm, {group.name: max(1, group.width - 2) for group in width_graph.free})
    assert calls_of(gm, calls) == before
    assert before or place == "attention.out_proj"
    told = [group.pinned or "" for group in width_graph.groups]
    assert any("MultiheadAttention has hooks, which nothing would call" in why for why in told) == (
        place == "attention"
    )
    assert bool(width_graph.free) == (place == "up")


def test_hooks_that_are_put_on_later_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_rewrites, "_hooked_nodes", lambda _: [])
    gm = fxwidth.trace(Attentive().eval(), rows())
    gm.attention.register_forward_hook(lambda *_: None)
    before = [tensor.clone() for tensor in gm.parameters()]
    with pytest.raises(
        FxwidthError, match=r"'attention' .* and MultiheadAttention has hooks, which nothing would call"
    ):
        fxwidth.resize(gm, {g.name: max(1, g.width - 2) for g in fxwidth.analyze(gm).free})
    assert all(torch.equal(one, other) for one, other in zip(before, gm.parameters(), strict=True))


def test_hooks_by_which_torch_computes_weights_are_ops() -> None:
    model = Attentive().eval()
    model.attention.out_proj = spectral_norm(model.attention.out_proj)
    told = [group.pinned or "" for group in fxwidth.analyze(fxwidth.trace(model, rows())).groups]
    assert not any("has hooks" in why for why in told)
