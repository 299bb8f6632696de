"""An Evolver in the training loops that people write: each loop goes on after every resize as it does without."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fxwidth
from fxwidth import FxwidthError

STEPS = 48
OPTIONS: dict[str, Any] = {"params": 0.5, "rounds": 3, "every": 4, "stop": STEPS - 8}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 16, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 3),
    )  # fmt: skip


def batches(count: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    """Images that are brighter in the row that is their label."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for _ in range(count):
        y = torch.randint(3, (16,), generator=generator)
        x = 0.5 * torch.randn(16, 1, 8, 8, generator=generator)
        x[torch.arange(16), 0, 2 * y + 1] += 1
        result.append((x, y))
    return result


class Loop:
    """What all loops have in common: a graph, its optimizer, the Evolver, and the losses."""

    def __init__(self, make: Callable[[fx.GraphModule], torch.optim.Optimizer], **options: Any) -> None:
        self.gm = fxwidth.trace(network(), batches(1)[0][0]).train()
        self.optimizer = make(self.gm)
        self.evolver = fxwidth.Evolver(self.gm, self.optimizer, **{**OPTIONS, **options})
        self.losses: list[float] = []

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(self.gm(x).float(), y)
        self.losses.append(loss.item())
        return loss

    def check(self) -> None:
        """The network has learnt, was resized to its target, and its optimizer holds what it consists of."""
        assert self.evolver.finished
        assert [record["phase"] for record in self.evolver.history][:4] == ["approach", "approach", "approach", "grow"]
        first = self.evolver.history[0]["params_before"]
        assert sum(p.numel() for p in self.gm.parameters()) <= 0.5 * first
        assert all(map(math.isfinite, self.losses))
        assert sum(self.losses[-8:]) < 0.7 * sum(self.losses[:8])
        held = {parameter for group in self.optimizer.param_groups for parameter in group["params"]}
        assert held == set(self.gm.parameters())
        for parameter, state in self.optimizer.state.items():
            assert parameter in held
            for value in state.values():
                assert not isinstance(value, Tensor) or value.dim() == 0 or value.shape == parameter.shape


def adam(gm: fx.GraphModule, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(gm.parameters(), lr=0.01, **options)


def test_gradients_are_scaled() -> None:
    loop, scaler = Loop(adam), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for x, y in batches():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loop.loss(x, y)
        scaler.scale(loss).backward()
        scaler.unscale_(loop.optimizer)
        nn.utils.clip_grad_norm_(loop.gm.parameters(), 1.0)
        scaler.step(loop.optimizer)
        scaler.update()
        loop.optimizer.zero_grad()
        loop.evolver.step(x, y)
    assert scaler.get_scale() == 2.0**10
    loop.check()


def test_a_step_in_autocast_does_not_matter() -> None:
    results = []
    for inside in (False, True):
        loop = Loop(adam)
        for x, y in batches():
            loop.loss(x, y).backward()
            loop.optimizer.step()
            loop.optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
                loop.evolver.step(x, y)
        results.append(loop)
    assert results[0].evolver.history == results[1].evolver.history
    assert results[0].losses == results[1].losses


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_accumulated(set_to_none: bool) -> None:
    loop = Loop(adam, every=2, stop=STEPS // 2 - 4)
    for number, (x, y) in enumerate(batches()):
        (loop.loss(x, y) / 2).backward()
        if number % 2:
            loop.optimizer.step()
            loop.optimizer.zero_grad(set_to_none=set_to_none)
            loop.evolver.step(x, y)
    loop.check()


def test_a_resize_between_two_parts_of_a_step_keeps_the_gradients() -> None:
    loop = Loop(adam, rounds=1, every=1, stop=None)
    (x, y), (other_x, other_y) = batches(2)
    loop.loss(x, y).backward()
    before = {name: parameter.grad for name, parameter in loop.gm.named_parameters()}
    assert loop.evolver.step(x, y) is not None
    kept = loop.gm.meta["fxwidth_history"][-1]["kept"]
    for name, parameter in loop.gm.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape
        own = before[name]
        assert own is not None
        rows = kept.get(name.rpartition(".")[0])
        if rows is not None and parameter.dim() == 1:
            torch.testing.assert_close(parameter.grad, own[rows])
    loop.loss(other_x, other_y).backward()
    loop.optimizer.step()


def test_parameter_groups_and_a_fused_optimizer() -> None:
    def grouped(gm: fx.GraphModule) -> torch.optim.Optimizer:
        matrices = [parameter for parameter in gm.parameters() if parameter.dim() > 1]
        others = [parameter for parameter in gm.parameters() if parameter.dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0, "lr": 0.02}]
        return torch.optim.AdamW(groups, lr=0.01, fused=True)

    loop = Loop(grouped)
    for x, y in batches():
        loop.loss(x, y).backward()
        loop.optimizer.step()
        loop.optimizer.zero_grad()
        loop.evolver.step(x, y)
    loop.check()
    matrices, others = loop.optimizer.param_groups
    assert (matrices["weight_decay"], others["weight_decay"], others["lr"]) == (0.1, 0.0, 0.02)
    assert {p.dim() > 1 for p in matrices["params"]} == {True}
    assert {p.dim() for p in others["params"]} == {1}


@pytest.mark.parametrize("make", [
    lambda optimizer: CosineAnnealingLR(optimizer, STEPS),
    lambda optimizer: OneCycleLR(optimizer, 0.02, total_steps=STEPS),
    lambda optimizer: ReduceLROnPlateau(optimizer, patience=2),
], ids=["cosine", "one cycle", "plateau"])  # fmt: skip
def test_schedulers_go_on(make: Callable[[torch.optim.Optimizer], Any]) -> None:
    loop = Loop(adam)
    scheduler = make(loop.optimizer)
    twin = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.01)
    alone = make(twin)
    for x, y in batches():
        loss = loop.loss(x, y)
        loss.backward()
        loop.optimizer.step()
        twin.step()
        loop.optimizer.zero_grad()
        for one in (scheduler, alone):
            one.step(*([loop.losses[-1]] if isinstance(one, ReduceLROnPlateau) else []))
        loop.evolver.step(x, y)
        assert loop.optimizer.param_groups[0]["lr"] == twin.param_groups[0]["lr"]
    loop.check()


def test_an_average_of_the_weights_goes_along() -> None:
    gm = fxwidth.trace(network(), batches(1)[0][0]).train()
    average = AveragedModel(gm, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
    optimizer = adam(gm)
    evolver = fxwidth.Evolver(gm, optimizer, also=[average], **OPTIONS)
    for x, y in batches():
        F.cross_entropy(gm(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        evolver.step(x, y)
        average.update_parameters(gm)
    held_out = batches(STEPS + 4)[STEPS:]
    average.eval()
    right = torch.cat([average(x).argmax(1) == y for x, y in held_out])
    assert right.float().mean() > 0.8
    shapes = [{name: tensor.shape for name, tensor in one.named_parameters()} for one in (gm, average.module)]
    assert shapes[0] == shapes[1]


def states(loop: Loop) -> list[Any]:
    return copy.deepcopy([
        loop.gm.state_dict(), loop.optimizer.state_dict(), loop.evolver.state_dict(), loop.gm.code,
    ])  # fmt: skip


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_bad_input_leaves_the_training_as_it_was() -> None:
    """A step without targets, a loss that is not finite: told, and the same step can be taken again."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) * factor[0]

    factor = [1.0]
    for spoil, words in (("targets", "targets"), ("loss", "finite")):
        loop = Loop(adam, loss=loss, directions="tiny", params=2.0, rounds=2, every=2, stop=None)
        (x, y), (other_x, other_y) = batches(2)
        for batch in ((x, y), (other_x, other_y)):
            loop.loss(*batch).backward()
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        if spoil == "targets":
            loop.evolver.step(x)
        else:
            loop.evolver.step(x, y)
            factor[0] = float("nan")
        before = states(loop)
        with pytest.raises(FxwidthError, match=words):
            loop.evolver.step(*((other_x,) if spoil == "targets" else (other_x, other_y)))
        assert same(states(loop), before)
        factor[0] = 1.0
        if spoil == "loss":
            assert loop.evolver.step(other_x, other_y) is not None


def test_what_cannot_be_evolved_is_refused_at_once() -> None:
    gm = fxwidth.trace(network(), batches(1)[0][0])
    with pytest.raises(FxwidthError, match="none of which is in the graph"):
        fxwidth.Evolver(gm, torch.optim.SGD(network().parameters(), lr=0.1), params=0.5)
    with pytest.raises(FxwidthError, match="params=1"):
        fxwidth.Evolver(gm, params=1)
    with pytest.raises(FxwidthError, match="loss="):
        fxwidth.Evolver(gm, params=2.0, directions="gradmax")
