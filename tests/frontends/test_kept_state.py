"""State that a model's code keeps in Python goes on in the graph as in the model."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth.verification.replay_oracle import largest_difference
from tests.oracles.judges import ROUNDING
from tests.oracles.untouched import untouched

KEPT: list[Tensor] = []
IN, HIDDEN, OUT = 6, 8, 3


def rows(count: int = 5, seed: int = 3) -> Tensor:
    return torch.randn(count, IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Part(nn.Module):
    """A part of a model that does something to what it keeps; symbolic tracing can follow it, or not."""

    def __init__(self, keep: Callable[[Any, Tensor], Any], looks: bool) -> None:
        super().__init__()
        self.keep, self.looks = keep, looks
        self.layer = nn.Linear(HIDDEN, HIDDEN)
        self.step, self.state, self.last, self.many = 0, {"n": 0}, None, list[Tensor]()
        self.box, self.own_random, self.numpy_random = Box(), random.Random(0), np.random.default_rng(0)
        self.old_random = np.random.RandomState(0)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.ones(HIDDEN, dtype=x.dtype)
        if self.looks:
            scale[1:] = 0.5
        h = self.layer(x) * scale
        factor = self.keep(self, h)
        return h if factor is None else h * factor


def network(keep: Callable[[Any, Tensor], Any], looks: bool = False) -> nn.Module:
    torch.manual_seed(0)
    parts = nn.Linear(IN, HIDDEN), nn.ReLU(), Part(keep, looks), nn.Linear(HIDDEN, HIDDEN), nn.ReLU()
    return nn.Sequential(*parts, nn.Linear(HIDDEN, OUT)).double()


def count(part: Part, _: Tensor) -> float:
    part.step += 1
    return min(1.0, part.step / 4)


def count_in_training(part: Part, _: Tensor) -> float:
    part.step += part.training
    return 1 / (1 + part.step)


def count_in_dict(part: Part, _: Tensor) -> float:
    part.state["n"] += 1
    return float(part.state["n"])


def switch(part: Part, _: Tensor) -> float:
    first, part.last = part.last is None, True
    return 2.0 if first else 1.0


def count_later(part: Part, _: Tensor) -> float:
    part.step += 1
    return 1.0 if part.step < 4 else 0.5


def write(part: Part, h: Tensor) -> None:
    part.last = torch.zeros(HIDDEN, dtype=torch.float64)
    part.last.copy_(h[0].detach())


def write_to_a_view(part: Part, h: Tensor) -> None:
    part.last = torch.zeros(HIDDEN, dtype=torch.float64)
    part.last[2:].copy_(h[0, 2:].detach())


def write_as_a_result(part: Part, h: Tensor) -> None:
    part.last = torch.zeros(HIDDEN, dtype=torch.float64)
    torch.mul(h[0].detach(), 2, out=part.last)


class Box:
    """No module and no container."""

    value: Any = 0.0


def of_item(part: Part, h: Tensor) -> float:
    factor, part.last = 1 + (part.last or 0.0), h.detach().mean().item()
    return factor


def of_running_item(part: Part, h: Tensor) -> float:
    part.state["n"] = 0.9 * part.state["n"] + 0.1 * h.mean().item()
    return 1 + part.state["n"]


def of_rows(part: Part, h: Tensor) -> float:
    factor, part.step = 1 + part.step, h.shape[0]
    return factor


def in_object(part: Part, h: Tensor) -> Any:
    factor, part.box.value = 1 + part.box.value, h.detach().mean()
    return factor


def item_in_object(part: Part, h: Tensor) -> Any:
    factor, part.box.value = 1 + part.box.value, (h.mean() > 0).item()
    return factor


def drawn(part: Part, _: Tensor) -> float:
    return part.own_random.random()


def drawn_by_numpy(part: Part, _: Tensor) -> float:
    return float(part.numpy_random.uniform(0.5, 1.5))


def drawn_in_training(part: Part, _: Tensor) -> float:
    return part.own_random.uniform(0.5, 1.5) if part.training else 1.0


def drawn_way(part: Part, _: Tensor) -> float:
    return 1.0 if part.old_random.rand() < 0.5 else 2.0


COUNTERS = [
    of_item, of_running_item, of_rows, in_object, item_in_object,
    drawn, drawn_by_numpy, drawn_in_training, drawn_way,
    count, count_in_training, count_in_dict, switch, count_later,
]  # fmt: skip
KEEPERS: dict[str, Callable[[Any, Tensor], Any]] = {
    "scalar": lambda part, h: setattr(part, "last", h.mean()),
    "feature": lambda part, h: setattr(part, "last", h.detach()),
    "list": lambda part, h: part.many.append(h.mean()),
    "of a parameter": lambda part, _: setattr(part, "last", part.layer.weight.square().sum()),
    "written to": write,
    "written to by a view": write_to_a_view,
    "written to as a result": write_as_a_result,
    "outside": lambda _, h: KEPT.append(h.mean()),
}


@pytest.mark.parametrize(
    "looks", [pytest.param(False, marks=pytest.mark.slow, id="symbolic"), pytest.param(True, id="export")]
)
@pytest.mark.parametrize("keep", COUNTERS, ids=lambda keep: keep.__name__)
def test_counters_go_on(keep: Callable[[Any, Tensor], Any], looks: bool) -> None:
    model = network(keep, looks).train()
    twin = copy.deepcopy(model)
    with untouched(model):
        gm = fxwidth.trace(model, rows())
    for mode in (True, False, True):
        gm.train(mode)
        twin.train(mode)
        for seed in range(3):
            assert largest_difference([gm(rows(4, seed))], [twin(rows(4, seed))]) < ROUNDING
    assert "3" in [group.name for group in fxwidth.analyze(gm).free]


@pytest.mark.parametrize("looks", [False, True], ids=["symbolic", "export"])
@pytest.mark.parametrize("name", KEEPERS)
def test_tensors_are_kept(name: str, looks: bool) -> None:
    KEPT.clear()
    model = network(KEEPERS[name], looks)
    twin = copy.deepcopy(model)
    with untouched(model, KEPT):
        gm = fxwidth.trace(model, rows())
        fxwidth.analyze(gm)
    found = []
    for one in (gm, twin):
        KEPT.clear()
        one(rows(4))
        part = next(part for part in one.modules() if isinstance(part, Part))
        found.append([value for value in (part.last, *part.many, *KEPT) if value is not None])
    assert len(found[0]) == 1
    assert largest_difference(*found) < ROUNDING


def sizes(part: Part, h: Tensor) -> None:
    part.step = h.dim() if isinstance(h.dim(), int) else 2


def table(part: Part, h: Tensor) -> Tensor:
    if part.last is None:
        part.last = torch.arange(HIDDEN, dtype=torch.float64)
    return part.last


def same(part: Part, _: Tensor) -> None:
    part.state["n"] += 1
    part.state["n"] -= 1


@pytest.mark.parametrize("keep", [sizes, table, same], ids=lambda keep: keep.__name__)
@pytest.mark.parametrize("looks", [False, True], ids=["symbolic", "export"])
def test_what_is_kept_once_may_be_forgotten(keep: Callable[[Any, Tensor], Any], looks: bool) -> None:
    gm = fxwidth.trace(network(keep, looks), rows())
    assert not gm.graph.find_nodes(op="call_module", target="2")


COUNTS: dict[str, Any] = {"calls": 0, "mean": 0.0}


def count_outside(_: Part, __: Tensor) -> float:
    COUNTS["calls"] += 1
    return 1 / COUNTS["calls"]


def item_outside(_: Part, h: Tensor) -> float:
    factor, COUNTS["mean"] = 1 + COUNTS["mean"], h.mean().item()
    return factor


@pytest.mark.parametrize("keep", [count_outside, item_outside], ids=lambda keep: keep.__name__)
@pytest.mark.parametrize("looks", [False, True], ids=["symbolic", "export"])
def test_what_is_counted_outside_goes_on(keep: Callable[[Any, Tensor], Any], looks: bool) -> None:
    model = network(keep, looks)
    with untouched(model, COUNTS):
        gm = fxwidth.trace(model, rows())
        fxwidth.analyze(gm)
    found = []
    for one in (gm, model):
        COUNTS.update(calls=0, mean=0.0)
        found.append([one(rows(4, seed)) for seed in range(3)])
    COUNTS.update(calls=0, mean=0.0)
    assert largest_difference(*found) < ROUNDING


class Recurrent(nn.Module):
    """Its second call reads a layer that the first one does not."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.again, self.down = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x) if self.state is None else self.up(x) + self.again(self.state)
        self.state = torch.tanh(h).detach()
        return self.down(self.state)


def test_a_part_with_a_state_keeps_what_its_next_call_may_use() -> None:
    model = nn.Sequential(Recurrent(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, OUT)).double()
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gm = fxwidth.trace(model, rows())
    wg = fxwidth.analyze(gm)
    assert [group.name for group in wg.free] == ["1"]
    assert "0.again" in str(wg.why_pinned("0.up"))
    fxwidth.resize(gm, {"1": 12})
    for seed in range(3):
        assert largest_difference([gm(rows(4, seed))], [twin(rows(4, seed))]) < 1e-9


def one_kept(part: Any, h: Tensor) -> Tensor:
    before, part.last = part.last, h.detach()
    return h if before is None else h + before.mean()


def all_kept(part: Any, h: Tensor) -> Tensor:
    part.many.append(h.detach())
    return h + torch.stack([one.mean() for one in part.many]).sum()


def handed_on(part: Any, h: Tensor) -> Tensor:
    before, part.last, part.state = part.last, part.state, h.detach()
    return h + before.mean() if isinstance(before, Tensor) else h


def kept_in_object(part: Any, h: Tensor) -> Tensor:
    before, part.box.value = part.box.value, h.detach()
    return h + before.mean() if isinstance(before, Tensor) else h


def kept_outside(_: Any, h: Tensor) -> Tensor:
    before, COUNTS["last"] = COUNTS.get("last"), h.detach()
    return h if before is None else h + before.mean()


def only_kept(part: Any, h: Tensor) -> Tensor:
    part.last = h.detach()
    return h


class WithPast(nn.Module):
    """What it keeps of a call may be in the next one."""

    def __init__(self, past: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.past = past
        self.up, self.down = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, OUT)
        self.last, self.state, self.many, self.box = None, None, list[Tensor](), Box()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.past(self, torch.relu(self.up(x))))


@pytest.mark.parametrize(
    "past", [one_kept, all_kept, handed_on, kept_in_object, kept_outside], ids=lambda past: past.__name__
)
def test_a_tensor_that_the_next_call_reads_keeps_its_size(past: Callable[[Any, Tensor], Tensor]) -> None:
    """What is done to it there is in no tape of the first call: a mean takes new channels in."""
    wg = fxwidth.analyze(fxwidth.trace(WithPast(past).double(), rows()))
    assert not wg.free
    assert "it is kept, and read in the next call" in str(wg.why_pinned("up"))


def test_a_tensor_that_is_kept_for_others_may_have_another_size() -> None:
    model = WithPast(only_kept).double()
    twin, gm = copy.deepcopy(model), fxwidth.trace(model, rows())
    fxwidth.resize(gm, {"up": HIDDEN + 3})
    for seed in range(3):
        assert largest_difference([gm(rows(4, seed))], [twin(rows(4, seed))]) < 1e-9
