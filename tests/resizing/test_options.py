"""Every option of `plan` and `resize` does the same on every way to a resized network, and does something at all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_manager import PassManager
from torch.nn import functional as F

import fxwidth
from fxwidth.costs.registry import COSTS, Cost
from fxwidth.options import has_target
from fxwidth.passes import AnalyzeWidths, Pipeline, PlanWidths, ReportWidths, ResizeWidths
from tests.zoo import nets
from tests.zoo.nets import trained_like

# Small: the network is resized in five ways for each option.
images = partial(nets.images, size=5)

# What is shown meanwhile makes no difference to what is done.
PLAN = [name for name in signature(fxwidth.plan).parameters if name not in ("width_graph", "progress")]
# Those that say on which ranks all is done are tried in tests/distributed.
_ELSEWHERE = ("gm", "plan", "progress", "process_group", "shard")
RESIZE = [name for name in signature(fxwidth.resize).parameters if name not in _ELSEWHERE]


class Network(nn.Module):
    """Batch norms, a linear bottleneck, a stream that grows inexactly, and several groups of equal width."""

    def __init__(self, width: int = 12, narrow: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.narrow = nn.Conv2d(width, narrow, 1)  # nothing nonlinear between it and what reads it
        self.wide = nn.Conv2d(narrow, 12, 1)
        self.head_norm = nn.BatchNorm2d(12)
        self.merged = nn.LayerNorm(24)
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.norm(self.stem(x)).relu()).relu()
        x = self.head_norm(self.wide(self.narrow(x))).relu().mean((2, 3))
        return self.head(self.merged(torch.cat([x[:, ::2], x[:, 1::2]], 1).repeat(1, 2)))


@dataclass
class Sizes:
    """One number for two layers, and one for another."""

    width: int = 12
    narrow: int = 10


class Configured(Network):
    """The same network, built from its sizes alone."""

    def __init__(self, config: Sizes) -> None:
        super().__init__(config.width, config.narrow)
        self.config = config


def network() -> nn.Module:
    torch.manual_seed(0)
    return trained_like(Network())


def labelled() -> list[tuple[Tensor, Tensor]]:
    x = images(48)
    return [(x[:24], torch.arange(24) % 4), (x[24:], torch.arange(24) // 6)]


Options = Mapping[str, Any]
HALF = {"params": 0.6}
GROWING = {"grow_energy": 0.0, "grow_step": 2, "shrink_energy": 0.0}
TASK = {"data": labelled(), "loss": F.cross_entropy}


@dataclass(frozen=True)
class Row:
    """An option at a value that is not its default, beside others without which it would do nothing."""

    value: Callable[[fx.GraphModule], Any]
    beside: Callable[[], Options] = field(default=lambda: HALF)


def _optimizer(gm: fx.GraphModule) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(gm.parameters(), lr=0.01)
    x, y = labelled()[0]
    F.cross_entropy(gm(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def _of(value: Any) -> Callable[[fx.GraphModule], Any]:
    return lambda _: value


ROWS: dict[str, Row] = {
    "budget": Row(_of(fxwidth.Budget(flops=0.5)), dict),
    "params": Row(_of(0.5), dict),
    "flops": Row(_of(0.5), dict),
    "activation_memory": Row(_of(0.7), dict),
    "latency": Row(_of(0.8), dict),
    "data": Row(_of(labelled())),
    "loss": Row(_of(F.cross_entropy), lambda: {"params": 0.45, "data": labelled()}),
    "selection": Row(_of("magnitude")),
    "shrink_energy": Row(_of(0.4), dict),
    "grow_energy": Row(_of(0.0), lambda: {"grow_step": 2, "shrink_energy": 0.0}),
    "grow_step": Row(_of(2), lambda: {"shrink_energy": 0.0}),
    "ratio": Row(_of(0.5), dict),
    "min_width": Row(_of(7)),
    "max_width": Row(_of(9), lambda: {"shrink_energy": 0.0}),
    "align": Row(_of(4)),
    "same_width": Row(_of([["stem", "middle"]])),
    "only": Row(_of("middle"), lambda: {"params": 0.9}),
    "keep": Row(_of(["stem"])),
    "within": Row(_of(["middle", "stem", "norm"]), lambda: {"params": 0.95}),
    "exact": Row(_of(False), lambda: {"grow_energy": 0.0, "grow_step": 2, "shrink_energy": 0.0}),
    "rotate": Row(_of(False)),
    "for_module": Row(lambda _: Configured(Sizes()).eval()),
    "optimizer": Row(_optimizer),
    "recalibrate": Row(_of(False), lambda: {**HALF, "data": labelled()}),
    "fold": Row(_of(False)),
    "directions": Row(_of("random"), lambda: GROWING),
    "also": Row(lambda gm: [copy.deepcopy(gm)]),
    "reader_step": Row(_of(True), lambda: {**GROWING, **TASK, "directions": "tiny"}),
}


@pytest.fixture(autouse=True)
def _same_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all graphs take the same time: what is measured differs each time, and with it the widths."""
    monkeypatch.setitem(COSTS, "latency", Cost("latency", "microseconds", COSTS["params"].polynomial))


def test_every_option_has_a_row() -> None:
    assert set(ROWS) == {*PLAN, *RESIZE}


def _some(options: Options, names: list[str]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in names}


def _for_plan(options: Options) -> dict[str, Any]:
    # What a resize does not turn a plan must not count on.
    turns = options.get("rotate", True) and options.get("fold", True) and not {"optimizer", "also"} & options.keys()
    if has_target(options):
        return {**_some(options, PLAN), "rotate": turns}
    # Refused where they would be ignored.
    return {name: value for name, value in _some(options, PLAN).items() if name not in ("data", "loss", "selection")}


def _for_resize(options: Options) -> dict[str, Any]:
    # A loss is refused where it would be ignored.
    grows_by_it = options.get("reader_step") or options.get("directions") in ("gradmax", "tiny")
    return {name: value for name, value in _some(options, RESIZE).items() if name != "loss" or grows_by_it}


def _direct(gm: fx.GraphModule, options: Options) -> None:
    chosen = fxwidth.plan(fxwidth.analyze(gm), **_for_plan(options))
    fxwidth.resize(gm, chosen, **_for_resize(options))


def _evolve(gm: fx.GraphModule, options: Options) -> None:
    assert fxwidth.evolve(gm, **options) is gm


def _evolver(gm: fx.GraphModule, options: Options) -> None:
    rounds = {"rounds": 1} if has_target(options) else {}
    assert fxwidth.Evolver(gm, every=1, **rounds, **options).step() is not None


def _passes(gm: fx.GraphModule, options: Options) -> None:
    passes = [AnalyzeWidths(), PlanWidths(**_for_plan(options)), ResizeWidths(**_for_resize(options))]
    assert PassManager(passes)(gm).modified


def _pipeline(gm: fx.GraphModule, options: Options) -> None:
    assert Pipeline(ResizeWidths(**_for_resize(options)), PlanWidths(**_for_plan(options)), ReportWidths())(gm).modified


WAYS = {"evolve": _evolve, "Evolver": _evolver, "passes": _passes}


def _resized(way: Callable[[fx.GraphModule, Options], None], row: Row, name: str | None) -> fx.GraphModule:
    """Return the network after a resize with an option (None: without it), and the optimizer's state with it."""
    # Held: whether a model that nobody has any more is still there to be told of depends on Python's collections.
    model = network()
    gm = fxwidth.trace(model, images(4))
    options = dict(row.beside())
    if name is not None:
        options[name] = row.value(gm)
    way(gm, options)
    optimizer = options.get("optimizer")
    if optimizer is not None:
        gm.moments = [optimizer.state[p]["exp_avg"] for p in gm.parameters()]
    return gm


def _tensors(gm: fx.GraphModule) -> dict[str, Tensor]:
    moments = {f"moment {i}": moment for i, moment in enumerate(getattr(gm, "moments", []))}
    return {**{name: tensor.detach() for name, tensor in gm.state_dict().items()}, **moments}


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and not _apart(one, other)


def _apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return by how much tensors of two networks differ, or their shapes."""
    return {
        name: float((one[name] - other[name]).abs().max()) if shape == other[name].shape else (shape, other[name].shape)
        for name, shape in ((name, one[name].shape) for name in one.keys() & other.keys())
        if shape != other[name].shape or not torch.equal(one[name], other[name])
    }


@pytest.mark.parametrize("name", ROWS)
def test_an_option_does_the_same_on_every_way(name: str) -> None:
    wanted = _resized(_direct, ROWS[name], name)
    for way, run in WAYS.items():
        if (name, way) == ("ratio", "Evolver"):
            continue  # which resizes again and again, and refuses it
        gm = _resized(run, ROWS[name], name)
        apart = _apart(_tensors(gm), _tensors(wanted))
        assert _same(_tensors(gm), _tensors(wanted)), f"{name}= through {way} gives another network: {apart}"
        records = [one.meta["fxwidth_history"][-1] for one in (gm, wanted)]
        assert records[0] == records[1], f"{name}= through {way} is reported otherwise"


@pytest.mark.parametrize("name", ["data", "optimizer", "also"])
def test_an_option_does_the_same_in_a_pipeline(name: str) -> None:
    wanted, gm = (_resized(way, ROWS[name], name) for way in (_direct, _pipeline))
    assert _same(_tensors(gm), _tensors(wanted))
    assert gm.meta["fxwidth_history"] == wanted.meta["fxwidth_history"]


@pytest.mark.parametrize("name", ROWS)
def test_an_option_does_something(name: str) -> None:
    row = ROWS[name]
    without = row if row.beside() else Row(row.value, lambda: {"shrink_energy": 0.05})
    assert not _same(_tensors(_resized(_direct, row, name)), _tensors(_resized(_direct, without, None)))


@pytest.mark.parametrize("method", ["gradmax", "tiny"])
@pytest.mark.parametrize("target", [GROWING, {"params": 1.5}])
def test_directions_that_look_at_the_task_do_the_same_on_every_way(method: str, target: Options) -> None:
    row = Row(_of(None), lambda: {**TASK, **target, "directions": method})
    wanted = _resized(_direct, row, None)
    assert wanted.meta["fxwidth_history"][-1]["not_informed"] == {}
    for way, run in WAYS.items():
        assert _same(_tensors(_resized(run, row, None)), _tensors(wanted)), f"{method} through {way} differs"


def test_options_that_make_no_sense_together_are_refused_on_every_way_before_anything_changes() -> None:
    gm = fxwidth.trace(network(), images(4))
    before = copy.deepcopy(gm.state_dict())
    for way in (_evolve, _evolver):
        for options in ({"loss": F.cross_entropy}, {**HALF, "recalibrate": True}, {**HALF, "selection": "nothing"}):
            with pytest.raises(fxwidth.FxwidthError):
                way(gm, options)
            assert _same(dict(gm.state_dict()), before)
