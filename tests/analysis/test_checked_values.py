"""Values that are read to raise an error, and decide nothing else, pin nothing; others do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxwidth

Way = Callable[["Reads", Tensor], Tensor]


class Reads(nn.Module):
    """Reads a flag before its layers, and does what it is told with it."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        self.way = way
        self.first, self.last, self.other = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.way(self, x).relu())


def raises(net: Reads, x: Tensor) -> Tensor:
    if not (x.abs() < 50).all():
        raise ValueError(f"too large: {x}")
    return net.first(x) + 0 * net.other(x)


def asserts(net: Reads, x: Tensor) -> Tensor:
    assert bool((x.abs() < 50).all()), "too large"
    return net.first(x) + 0 * net.other(x)


def two_checks(net: Reads, x: Tensor) -> Tensor:
    if (x > 50).any():
        raise ValueError("too large")
    h = net.first(x)
    if (h < -5000).any():
        raise ValueError("too small")
    return h + 0 * net.other(x)


def branches(net: Reads, x: Tensor) -> Tensor:
    return net.first(x) + 0 * net.other(x) if (x.abs() < 50).all() else net.other(x).flip(-1) + net.first(x)


def skips(net: Reads, x: Tensor) -> Tensor:
    if (x > 50).any():
        x = x - 50
    return net.first(x) + 0 * net.other(x)


def fails_in_an_op(net: Reads, x: Tensor) -> Tensor:
    rows = torch.zeros(1, 4) if (x > 50).any() else x
    return net.first(rows.expand(len(x), 4).contiguous().view(3, 4)) + 0 * net.other(x)


def looks_further(net: Reads, x: Tensor) -> Tensor:
    if (x > 50).any():
        h = net.other(x)
        if not (h > 50).any():
            raise ValueError("no large one there either")
        return h.flip(-1)
    return net.first(x) + 0 * net.other(x)


def looks_at_numbers(net: Reads, x: Tensor) -> Tensor:
    """Where some are large, there are large ones: the error is there for the flag alone."""
    if (x > 50).any():
        if int((x > 50).sum()) == 0:
            raise ValueError("there are none")
        return net.other(x).flip(-1) + net.first(x)
    return net.first(x) + 0 * net.other(x)


def looks_before(net: Reads, x: Tensor) -> Tensor:
    has_some = bool((x > 40).any())
    if (x > 50).any():
        if not has_some:
            raise ValueError("there are none")
        return net.other(x).flip(-1) + net.first(x)
    return net.first(x) + 0 * net.other(x)


def goes_on(net: Reads, x: Tensor) -> Tensor:
    try:
        if (x > 50).any():
            raise ValueError("too large")
    except ValueError:
        return net.other(x).flip(-1) + net.first(x)
    return net.first(x) + 0 * net.other(x)


def validates(net: Reads, x: Tensor) -> Tensor:
    spread = torch.distributions.Normal(h := net.first(x), torch.ones_like(h))
    return spread.log_prob(net.other(x))


def traced(way: Way) -> tuple[nn.Module, torch.fx.GraphModule]:
    torch.manual_seed(0)
    net = Reads(way).eval()
    return net, fxwidth.trace(net, torch.randn(3, 4))


@pytest.mark.parametrize("way", [raises, asserts, two_checks, validates])
def test_a_check_pins_nothing_and_stays_a_check(way: Way) -> None:
    net, gm = traced(way)
    group = fxwidth.analyze(gm)["first"]
    assert group.pinned is None
    x = torch.randn(5, 4)
    fxwidth.resize(gm, {"first": 5}, selection="magnitude", fold=False)
    assert gm(x).shape == (5, 3)
    assert torch.equal(gm(x), net(x))
    large = torch.full((5, 4), 80.0)
    for module in (net, gm) if way is not validates else ():
        with pytest.raises((ValueError, AssertionError), match="too large"):
            module(large)


@pytest.mark.parametrize(
    "way", [branches, skips, fails_in_an_op, looks_further, looks_at_numbers, looks_before, goes_on]
)
def test_what_goes_on_with_other_values_pins(way: Way) -> None:
    _, gm = traced(way)
    group = fxwidth.analyze(gm)["first"]
    assert "branched on a value" in str(group.pinned) or "was not used" in str(group.pinned)


def test_looking_at_checks_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    net = Reads(two_checks).eval()
    state = torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    gm = fxwidth.trace(net, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    fxwidth.analyze(gm)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
