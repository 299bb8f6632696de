"""A parameter that is used in two ways: what a resize writes to it for one use must not change the other.

The other use is a term of its own among the outputs, which looks at nothing but what belongs to channel 0, and that one
always stays: so the term is the same after every resize.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxwidth
from fxwidth.verification.replay_oracle import largest_difference
from tests.oracles.judges import ROUNDING, randomise

INPUTS, WIDTH, OUT = 6, 8, 3


def _written_through_a_view(value: Tensor) -> Tensor:
    new = torch.zeros_like(value)
    new.view(-1).add_(value.view(-1))
    return new.sum()


# Of the parameter times a table that is zero but for channel 0.
TERMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda t, table: (t * table).sum(),
    "norm": lambda t, table: (t * table).norm(),
    "exponential": lambda t, table: torch.expm1(t * table).sum(),
    "dot product": lambda t, table: torch.dot(t.flatten(), table.flatten()),
    "product with itself": lambda t, table: (t * table).reshape(-1, 1).T @ t.reshape(-1, 1),
    "cosine": lambda t, table: F.normalize((t * table).flatten(), dim=0)[:1] + (t * table).square().sum(),
    "element": lambda t, _: t.flatten()[:1],
    "selected": lambda t, _: t.flatten()[0],
    "divided": lambda t, table: ((t * table - 1) / (t * table).norm()).reshape(-1)[:1],
    "written to new memory": lambda t, table: torch.zeros_like(t).add_(t * table).sum(),
    "through a view": lambda t, table: _written_through_a_view(t * table),
}
SHOWN = {
    "returned": lambda term, _: term,
    "scales the input": lambda term, x: x[:, :1] * term,
    "added to the input": lambda term, x: x + term.reshape(-1)[:1],
    "decides": lambda term, x: torch.where(term.reshape(-1)[:1] > 0, x * term.reshape(-1)[:1], x),
}


def rectified() -> nn.ModuleDict:
    return nn.ModuleDict({"into": nn.Linear(INPUTS, WIDTH), "act": nn.ReLU(), "out": nn.Linear(WIDTH, OUT)})


def linear() -> nn.ModuleDict:
    return nn.ModuleDict({"into": nn.Linear(INPUTS, WIDTH), "act": nn.Identity(), "out": nn.Linear(WIDTH, OUT)})


def batch_normed() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "into": nn.Linear(INPUTS, WIDTH),
            "act": nn.ReLU(),
            "out": nn.Linear(WIDTH, OUT, bias=False),
            "norm": nn.BatchNorm1d(OUT),
        }
    )


def bottleneck() -> nn.ModuleDict:
    return nn.ModuleDict(
        {"into": nn.Linear(INPUTS, WIDTH, bias=False), "norm": nn.BatchNorm1d(WIDTH), "out": nn.Linear(WIDTH, OUT)}
    )


def layer_normed() -> nn.ModuleDict:
    return nn.ModuleDict({"into": nn.Linear(INPUTS, WIDTH), "norm": nn.LayerNorm(WIDTH), "out": nn.Linear(WIDTH, OUT)})


def weight_normed() -> nn.ModuleDict:
    out = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, OUT))
    return nn.ModuleDict({"into": nn.Linear(INPUTS, WIDTH), "act": nn.ReLU(), "out": out})


# Each network, and its parameters and buffers to which a resize may write.
NETS: dict[Callable[[], nn.ModuleDict], tuple[str, ...]] = {
    rectified: ("into.weight", "out.weight", "out.bias"),
    linear: ("into.weight", "into.bias", "out.weight", "out.bias"),
    batch_normed: ("out.weight", "norm.running_mean", "norm.running_var", "norm.bias"),
    bottleneck: ("into.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "out.weight"),
    layer_normed: ("norm.weight", "norm.bias", "out.weight"),
    weight_normed: ("out.parametrizations.weight.original0", "out.parametrizations.weight.original1"),
}
CASES = [(make, name) for make, names in NETS.items() for name in names]


class TwoUses(nn.Module):
    """A chain of layers, and a term made of one of their parameters."""

    def __init__(self, layers: nn.ModuleDict, name: str = "", term: str = "sum", shown: str = "returned") -> None:
        super().__init__()
        self.layers, self.name, self.term, self.shown = layers, name, TERMS[term], SHOWN[shown]
        if name:
            self.register_buffer("table", _table(self._parameter()))

    def _parameter(self) -> Tensor:
        value = self.layers
        for part in self.name.split("."):
            value = value[part] if isinstance(value, nn.ModuleDict) else getattr(value, part)
        return value

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x
        for layer in self.layers.values():
            h = layer(h)
        return h, self.shown(self.term(self._parameter(), self.table), x) if self.name else x


def _table(parameter: Tensor) -> Tensor:
    table = torch.zeros_like(parameter)
    table.view(-1)[0] = 1.5
    return table


def dependent(layers: nn.ModuleDict) -> nn.ModuleDict:
    """Make channel 0 so loud that it always stays, 4 to 6 shares of 1 to 3, and 7 constant."""
    layers = randomise(layers).double().eval()
    with torch.no_grad():
        into, norm = layers["into"], getattr(layers, "norm", None)
        vectors = [into.bias] if into.bias is not None else []
        if norm is not None and norm.weight.shape == (WIDTH,):
            vectors += [norm.bias]
            vectors += [norm.running_mean] if isinstance(norm, nn.BatchNorm1d) else []
            for scale in (norm.weight, *([norm.running_var] if isinstance(norm, nn.BatchNorm1d) else [])):
                scale[4:7] = scale[1:4]
        for tensor in (into.weight, *vectors):
            tensor[0] *= 30
            tensor[4:7] = 0.5 * tensor[1:4]
        into.weight[7] = 0
        if isinstance(layers["out"].weight, nn.Parameter):  # behind a norm, loud is what is read so
            layers["out"].weight[:, 0] *= 30
    return layers


def halved(
    model: nn.Module, x: Tensor, width: int = WIDTH // 2, **options: Any
) -> tuple[list[Tensor], list[Tensor], dict[str, str]] | None:
    """Return what a model gives before and after channels are dropped, and what was not refitted; None if pinned."""
    gm = fxwidth.trace(model, x)
    groups = [group for group in fxwidth.analyze(gm).free if group.width == WIDTH]
    names = [g.name for g in groups if any((s.parameter, s.dim) == ("layers.into.weight", 0) for s in g.sites)]
    if not names:
        return None
    with torch.no_grad():
        before = [value.clone() for value in gm(x)]
        fxwidth.resize(gm, {names[0]: width}, **options)
        return before, list(gm(x)), fxwidth.report(gm).resizes[-1]["not_refitted"]


def rows() -> Tensor:
    return torch.randn(64, INPUTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


OPTIONS: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "data": lambda x: {"data": [x]},
    "unrotated": lambda x: {"data": [x], "rotate": False},
    "noise": lambda _: {},
}
# After a change of basis, evidence without data is of that basis alone; a layer norm sees another variance.
EXACT = [(make, options) for make in NETS for options in ("data", "unrotated") if make is not layer_normed]


@pytest.mark.parametrize(("make", "options"), EXACT)
def test_one_use_takes_over_everything(make: Callable[[], nn.ModuleDict], options: str) -> None:
    results = halved(TwoUses(dependent(make())), rows(), **OPTIONS[options](rows()))
    assert results is not None
    before, after, missed = results
    assert not missed
    torch.testing.assert_close(after[0], before[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("term", "shown", "options", "width"),
    [
        *(("sum", "returned", options, 2) for options in OPTIONS),
        *(pytest.param("sum", "returned", options, 4, marks=pytest.mark.slow) for options in OPTIONS),
        *(pytest.param(term, "returned", "data", 2, marks=pytest.mark.slow) for term in list(TERMS)[2:]),
        *(pytest.param("sum", shown, "data", 2, marks=pytest.mark.slow) for shown in list(SHOWN)[2:]),
        (list(TERMS)[1], "returned", "data", 2),
        ("sum", list(SHOWN)[1], "data", 2),
    ],
)
def test_the_other_use_stays_as_it_was(term: str, shown: str, options: str, width: int) -> None:
    changed, checked = {}, 0
    for make, name in CASES:
        model = TwoUses(dependent(make()), name, term, shown)
        results = halved(model, rows(), width, **OPTIONS[options](rows()))
        if results is None:
            continue
        before, after, _ = results
        checked += 1
        difference = largest_difference([after[1]], [before[1]])
        if not difference < ROUNDING:
            changed[make.__name__, name] = difference
    assert not changed
    assert checked >= 3
