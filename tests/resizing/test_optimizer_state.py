"""An optimizer goes on over a resize as if nothing had happened to the channels that stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import fxwidth

MAKERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adadelta": torch.optim.Adadelta,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True),
    "rprop": torch.optim.Rprop,
    "asgd": torch.optim.ASGD,
    "adafactor": torch.optim.Adafactor,
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(5 * 16, 3),
    ).double()  # fmt: skip


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(8, 1, 6, 6, generator=generator, dtype=torch.float64),
        torch.randint(0, 3, (8,), generator=generator),
    )


def train(gm: nn.Module, optimizer: Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(gm(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("width", [4, 9])
def test_state_follows_the_parameters(kind: str, width: int) -> None:
    gm = fxwidth.trace(network(), batch(0)[0])
    optimizer = MAKERS[kind](list(gm.parameters()))
    train(gm, optimizer, range(3))
    fxwidth.resize(gm, {"0": width, "3": width}, optimizer=optimizer)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in gm.parameters()), "each parameter exactly once"
    assert {id(p) for p in optimizer.state} <= set(held)
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() == parameter.dim() and kind != "adafactor":
                assert value.shape == parameter.shape, key
    old = [p.detach().clone() for p in gm.parameters()]
    train(gm, optimizer, range(3, 5))
    assert all(not torch.equal(a, b) for a, b in zip(old, gm.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_surviving_entries_are_the_old_ones(kind: str) -> None:
    gm = fxwidth.trace(network(), batch(0)[0])
    optimizer = MAKERS[kind](list(gm.parameters()))
    train(gm, optimizer, range(3))
    key = "momentum_buffer" if kind == "sgd" else "exp_avg_sq"
    old = optimizer.state[gm.get_parameter("3.weight")][key].clone()
    fxwidth.resize(gm, {"0": 8}, optimizer=optimizer)
    new = optimizer.state[gm.get_parameter("3.weight")][key]
    assert torch.equal(new[:, :6], old)
    expected = torch.zeros_like(new[:, 6:]) if kind == "sgd" else 0.1 * old.mean(1, keepdim=True).expand_as(new[:, 6:])
    assert torch.allclose(new[:, 6:], expected, atol=0)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_growing_and_shrinking_again_leaves_the_loss_curve(kind: str) -> None:
    plain = fxwidth.trace(network(), batch(0)[0])
    reference = train(plain, MAKERS[kind](list(plain.parameters())), range(8))
    gm = fxwidth.trace(network(), batch(0)[0])
    optimizer = MAKERS[kind](list(gm.parameters()))
    losses = train(gm, optimizer, range(4))
    fxwidth.resize(gm, {"0": 9, "3": 8}, optimizer=optimizer)
    zero_gradients_of_new_channels(gm)
    fxwidth.resize(gm, {"0": 6, "3": 5}, optimizer=optimizer)
    losses += train(gm, optimizer, range(4, 8))
    assert losses == pytest.approx(reference, rel=1e-9)


def test_a_step_between_growing_and_shrinking_hardly_shows() -> None:
    plain = fxwidth.trace(network(), batch(0)[0])
    reference = train(plain, MAKERS["sgd"](list(plain.parameters())), range(8))
    gm = fxwidth.trace(network(), batch(0)[0])
    optimizer = MAKERS["sgd"](list(gm.parameters()))
    losses = train(gm, optimizer, range(4))
    fxwidth.resize(gm, {"0": 7, "3": 6}, optimizer=optimizer)
    losses += train(gm, optimizer, range(4, 5))
    assert losses == pytest.approx(reference[:5], rel=1e-9)
    fxwidth.resize(gm, {"0": 6, "3": 5}, optimizer=optimizer, data=[batch(4)])
    losses += train(gm, optimizer, range(5, 8))
    assert losses == pytest.approx(reference, rel=0.1)


def zero_gradients_of_new_channels(gm: nn.Module) -> None:
    """Evaluate in between, as a training loop would: the function is the same, and nothing must depend on it."""
    x, y = batch(99)
    nn.functional.cross_entropy(gm(x), y).backward()
    gm.zero_grad()


def test_gradients_follow() -> None:
    gm = fxwidth.trace(network(), batch(0)[0])
    x, y = batch(0)
    nn.functional.cross_entropy(gm(x), y).backward()
    old = gm.get_parameter("0.weight").grad.clone()
    fxwidth.resize(gm, {"0": 8})
    assert torch.equal(gm.get_parameter("0.weight").grad[:6], old)


def test_schedulers_go_on() -> None:
    gm = fxwidth.trace(network(), batch(0)[0])
    optimizer = MAKERS["sgd"](list(gm.parameters()))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train(gm, optimizer, range(1))
    fxwidth.resize(gm, {"0": 4}, optimizer=optimizer)
    train(gm, optimizer, range(1, 2))
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.025


def test_lbfgs_is_refused() -> None:
    gm = fxwidth.trace(network(), batch(0)[0])
    with pytest.raises(fxwidth.FxwidthError, match="LBFGS keeps one history for all parameters"):
        fxwidth.resize(gm, {"0": 4}, optimizer=torch.optim.LBFGS(gm.parameters()))
    assert gm.get_parameter("0.weight").shape[0] == 6
