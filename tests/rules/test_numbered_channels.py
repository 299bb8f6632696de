"""Outputs that are indices: what they number keeps its numbers, so it keeps its width."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxwidth
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.rules import reduction
from fxwidth.rules.registry import RULES
from fxwidth.verification.replay_oracle import replay_difference
from tests.oracles.judges import analysed, random_maps

# Functions of [batch, channels] that tell channels by their numbers.
NUMBERING: dict[str, Callable[[Tensor], Tensor]] = {
    "argmax": lambda h: h.argmax(-1),
    "argmax of all": lambda h: h.argmax(),
    "argmin": lambda h: h.argmin(1, keepdim=True),
    "max": lambda h: h.max(-1)[1],
    "min": lambda h: h.min(1).indices,
    "topk": lambda h: h.topk(2).indices,
    "sort": lambda h: h.sort(-1, descending=True)[1],
    "argsort": lambda h: h.argsort(-1),
    "stable argsort": lambda h: torch.argsort(h, dim=-1, stable=True),
    "kthvalue": lambda h: h.kthvalue(2)[1],
    "mode": lambda h: h.mode(-1)[1],
    "median": lambda h: h.median(-1).indices,
    "nanmedian": lambda h: h.nanmedian(-1).indices,
    "cummax": lambda h: h.cummax(-1)[1],
    "cummin": lambda h: h.cummin(-1)[1],
    "searchsorted": lambda h: torch.searchsorted(h.abs().cumsum(-1), torch.full_like(h[:, :1], 0.5)),
    "bucketize": lambda h: torch.bucketize(torch.ones(2, dtype=h.dtype), h[0].abs().cumsum(-1)),
    "one hot": lambda h: F.one_hot(h.argmax(-1), 12),
    "bincount": lambda h: torch.bincount(h.argmax(-1), minlength=12),
    "max pool": lambda h: F.max_pool1d(h.unsqueeze(1), 2, return_indices=True)[1],
    "adaptive max pool": lambda h: F.adaptive_max_pool1d(h.unsqueeze(1), 1, return_indices=True)[1],
    "gathered": lambda h: h.gather(1, h.topk(1)[1]),
    "multinomial": lambda h: torch.multinomial(h.softmax(-1), 2),
    "nonzero": lambda h: (h > 0).nonzero(),
    "where": lambda h: torch.where(h > 0)[1],
    "counted": lambda h: (h > 0).long().cumsum(-1),
}


class Numbered(nn.Module):
    """Reads channels, and numbers them too."""

    def __init__(self, number: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.into, self.out, self.number = nn.Linear(5, 12), nn.Linear(12, 3), number

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.into(x))
        return self.out(h), self.number(h)


@pytest.mark.parametrize("name", NUMBERING)
def test_what_is_numbered_stays(name):
    torch.manual_seed(0)
    graph = fxwidth.trace(Numbered(NUMBERING[name]).eval(), torch.randn(4, 5))
    width_graph = fxwidth.analyze(graph)
    # Positions are no groups at all.
    assert "into" not in width_graph or width_graph["into"].pinned is not None


# What asks for channels without numbering them leaves them free: pins are no default.
@pytest.mark.parametrize("ask", [lambda h: h.max(-1)[0], lambda h: h.amax(-1), lambda h: h.mean(-1)])
def test_what_is_not_numbered_is_free(ask):
    graph = fxwidth.trace(Numbered(ask).eval(), torch.randn(4, 5))
    assert fxwidth.analyze(graph)["into"].pinned is None


@pytest.mark.parametrize("name", ["argmax", "argmax of all", "argmin", "max"])
def test_a_rule_that_frees_them_is_seen(name, monkeypatch):
    """The replay compares indices too: with some channels gone, others have their numbers."""
    monkeypatch.setitem(RULES, name.partition(" ")[0], reduction._reduction("maximum"))
    inputs = [torch.randn(4, 5)]
    analysis = analysed(Numbered(NUMBERING[name]), inputs)
    assert WidthGraph(analysis).free
    assert replay_difference(analysis, random_maps(analysis, 0.5), inputs) > 1e-2
