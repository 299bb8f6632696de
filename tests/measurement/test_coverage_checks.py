"""The checks of the coverage sweeps hold for sound networks, and see what is wrong with others."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxwidth
from benchmarks.coverage import _markdown
from benchmarks.coverage_cases import Call
from benchmarks.coverage_check import check_fxwidth
from benchmarks.coverage_modes import COLUMNS, RIGHT, ModeChecks, holds, summed_up
from benchmarks.coverage_runs import Run, equal, other_batch, rearranged, run


class Network(nn.Module):
    """Batch norm, two kinds of noise, and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.norm, self.hidden = nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 12)
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.into(x)).relu()
        h = h + F.dropout(self.hidden(h), 0.3, self.training)
        return self.out(F.dropout(h, 0.1, self.training))


def call() -> Call:
    return Call((torch.randn(2, 6, generator=torch.Generator().manual_seed(1)),))


def checked(model: nn.Module, arguments: Call | None = None) -> dict[str, Any]:
    return check_fxwidth(model.eval(), arguments or call())


def test_a_sound_network_is_right() -> None:
    result = checked(Network())
    assert result["status"] == "right"
    assert set(result["checks"]) == {name for names in COLUMNS.values() for name in names}
    assert set(result["checks"].values()) == {RIGHT}


# Networks that cannot be held to a check


class NoTraining(Network):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise ValueError("targets are missing")
        return super().forward(x)


class RandomAlways(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand_like(x[:, :1])


class RowsTogether(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


@pytest.mark.filterwarnings("ignore:The graph of NoTraining does not do")
@pytest.mark.parametrize(
    ("model", "names", "reason"),
    [
        (NoTraining, {"train", "traced in train"}, "ValueError: targets are missing"),
        (RandomAlways, {"eval", "other batch", "traced in train"}, "random in eval mode"),
        (RowsTogether, {"resized, other batch"}, "the rows of a batch depend on each other"),
    ],
)
def test_what_a_model_cannot_do_itself_is_no_fault(model: type[nn.Module], names: set[str], reason: str) -> None:
    network = model()
    checks = ModeChecks(network.double().eval(), arguments := wide(call()))
    gm = fxwidth.trace(network, arguments.args)
    checks.traced(gm, [])
    checks.traced_in_training()
    fxwidth.resize(gm, {group.name: group.width // 2 for group in fxwidth.analyze(gm).free}, fold=False)
    checks.resized(gm)
    said = {name for name, word in checks.words.items() if word.startswith("model itself: ")}
    assert names <= said
    assert any(reason in checks.words[name] for name in names)
    assert all(map(holds, checks.words.values()))


def wide(arguments: Call) -> Call:
    return Call(tuple(x.double() for x in arguments.args), arguments.kwargs)


# Planted faults: each changes a graph, or what tracing does to a model, in one way


def faulty(fault: Callable[[nn.Module, fx.GraphModule], fx.GraphModule | None], model: nn.Module) -> dict[str, str]:
    """Return what the checks say where every trace has a fault."""
    sound = fxwidth.trace

    def trace(model: nn.Module, *args: Any) -> fx.GraphModule:
        gm = sound(model, *args)
        return fault(model, gm) or gm

    model, arguments = model.double().eval(), wide(call())
    checks = ModeChecks(model, arguments)
    with patch.object(fxwidth, "trace", trace):
        with checks.looking("state", model):
            gm = fxwidth.trace(model, arguments.args)
        checks.traced(gm, [])
        checks.traced_in_training()
        checks.resized(gm)
    return checks.words


def written_over(target: Any, replacement: Callable[..., Any]) -> Callable[[nn.Module, fx.GraphModule], None]:
    """Return a fault that has another function called in a graph."""

    def fault(_: nn.Module, gm: fx.GraphModule) -> None:
        nodes = [node for node in gm.graph.nodes if node.op == "call_function" and node.target is target]
        assert nodes
        for node in nodes:
            node.target = replacement
        gm.recompile()

    return fault


def no_dropout(x: Tensor, p: float, training: bool, inplace: bool = False) -> Tensor:
    return x


def always_dropout(x: Tensor, p: float, training: bool, inplace: bool = False) -> Tensor:
    return torch.dropout(x, p, True)


def more_dropout(x: Tensor, p: float, training: bool, inplace: bool = False) -> Tensor:
    return torch.dropout(x, p + 0.2, training)


def wrapped(change: Callable[[Tensor, nn.Module], Tensor]) -> Callable[[nn.Module, fx.GraphModule], None]:
    """Return a fault that changes what a graph's hidden layer answers."""

    def fault(_: nn.Module, gm: fx.GraphModule) -> None:
        layer = gm.get_submodule("hidden")
        layer.register_forward_hook(lambda module, _, output: change(output, module))

    return fault


def frozen_statistics(_: nn.Module, gm: fx.GraphModule) -> None:
    gm.get_submodule("norm").momentum = 0.0


def another_momentum(_: nn.Module, gm: fx.GraphModule) -> None:
    gm.get_submodule("norm").momentum = 0.4


def detached(output: Tensor, module: nn.Module) -> Tensor:
    return output.detach() if module.training and output.requires_grad else output


def renamed(_: nn.Module, gm: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.call_module("inside", (graph.placeholder("x"),)))
    return fx.GraphModule({"inside": gm}, graph)


def marks(model: nn.Module, gm: fx.GraphModule) -> None:
    model.seen = True


def counts_in_the_model(model: nn.Module, gm: fx.GraphModule) -> None:
    model.norm.num_batches_tracked += 1


def draws(model: nn.Module, gm: fx.GraphModule) -> None:
    np.random.rand()  # noqa: NPY002 - the global state is what is changed


FAULTS: dict[str, tuple[Callable[[nn.Module, fx.GraphModule], fx.GraphModule | None], set[str]]] = {
    "no noise": (written_over(F.dropout, no_dropout), {"train", "traced in train"}),
    "noise in eval mode": (written_over(F.dropout, always_dropout), {"eval", "traced in train", "resized, train"}),
    "more noise": (written_over(F.dropout, more_dropout), {"train", "traced in train"}),
    "a slightly other value": (wrapped(lambda y, _: y * (1 + 1e-6)), {"eval", "train", "other batch"}),
    "an even batch alone": (wrapped(lambda y, _: y if len(y) == 2 else -y), {"other batch", "resized, other batch"}),
    "rows exchanged": (wrapped(lambda y, _: y if len(y) == 2 else y.roll(1, 0)), {"other batch"}),
    "statistics not written": (frozen_statistics, {"train", "traced in train"}),
    "statistics written otherwise": (another_momentum, {"train", "traced in train"}),
    "other names": (renamed, {"names"}),
    "an attribute is left behind": (marks, {"state", "state, traced in train"}),
    "a buffer is written": (counts_in_the_model, {"state", "state, traced in train"}),
    "numbers are drawn": (draws, {"state", "state, traced in train"}),
}
# One that each of the checks sees; all belong to the sweeps, before which the slow ones are run.
FAST = ("more noise", "an even batch alone", "a buffer is written")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAULTS]
)
def test_planted_faults_are_seen(name: str) -> None:
    fault, seen = FAULTS[name]
    words = faulty(fault, Network())
    assert seen <= {check for check, word in words.items() if not holds(word)}


def test_a_gradient_lost_by_a_resize_is_seen() -> None:
    model, arguments = Network().double().eval(), wide(call())
    checks = ModeChecks(model, arguments)
    gm = fxwidth.trace(model, arguments.args)
    checks.traced(gm, [])
    wrapped(detached)(model, gm)
    checks.resized(gm)
    assert checks.words["resized, train"] == "no finite gradient for hidden.bias, hidden.weight"


def test_the_same_noise_in_another_order_is_right() -> None:
    class Two(nn.Module):
        def __init__(self, turned: bool) -> None:
            super().__init__()
            self.one, self.two, self.out = nn.Linear(6, 5), nn.Linear(6, 4), nn.Linear(9, 3)
            self.turned = turned

        def forward(self, x: Tensor) -> Tensor:
            two = F.dropout(self.two(x), 0.5, self.training) if self.turned else None
            one = F.dropout(self.one(x), 0.3, self.training)
            two = F.dropout(self.two(x), 0.5, self.training) if two is None else two
            return self.out(torch.cat([one, two], 1))

    model, arguments = Two(False).double().eval(), wide(call())
    other = Two(True).double()
    other.load_state_dict(model.state_dict())
    one, two = (run(module, arguments, training=True).outputs for module in (model, other))
    assert not equal(one, two)
    checks = ModeChecks(model, arguments)
    checks.traced(fxwidth.trace(other.eval(), arguments.args), [])
    assert checks.words["train"] == RIGHT


def test_what_trace_warns_of_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = fxwidth.trace

    def trace(*args: Any) -> fx.GraphModule:
        warnings.warn("hidden: train() does otherwise", stacklevel=2)
        gm = sound(*args)
        written_over(F.dropout, no_dropout)(args[0], gm)
        return gm

    monkeypatch.setattr(fxwidth, "trace", trace)
    result = checked(Network())
    assert result["checks"]["train"] == "told: hidden: train() does otherwise"
    assert result["status"] == "right"


def test_a_fault_makes_a_model_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = fxwidth.trace

    def trace(*args: Any) -> fx.GraphModule:
        gm = sound(*args)
        frozen_statistics(args[0], gm)
        return gm

    monkeypatch.setattr(fxwidth, "trace", trace)
    result = checked(Network())
    assert result["status"] == "wrong"
    assert "train: in training mode: norm.running_mean is not written" in result["reason"]
    assert summed_up(result["checks"], "modes") == "wrong (train; traced in train)"
    table = _markdown("timm", {"a": {"fxwidth": result}}, "", {})
    assert "- modes: 1 wrong" in table
    assert "| wrong (train; traced in train) |" in table


def test_batches_of_other_forms() -> None:
    x = torch.arange(4.0).view(2, 2)
    images = other_batch(Call(([x[0], x[1]],), {"mask": x, "scale": torch.ones(1), "n": 2}))
    assert [t.tolist() for t in images.args[0]] == [[2, 3], [0, 1], [2, 3]]
    assert images.kwargs["mask"].tolist() == [[2, 3], [0, 1], [2, 3]]
    assert (images.kwargs["scale"].tolist(), images.kwargs["n"]) == ([1.0], 2)
    flat, lone = rearranged(Run([torch.arange(4), torch.tensor(5)], {}))
    assert flat is not None
    assert (flat.tolist(), lone) == ([2, 3, 0, 1, 2, 3], None)
    found = rearranged(Run([torch.ones(3), torch.ones(1), torch.zeros(5), torch.zeros(1)], {}))
    assert [len(t) for t in found if t is not None] == [5, 1, 3, 1, 5, 1]
    # Even counts tell nothing: a list of results is one by its form.
    found = rearranged(Run([torch.ones(4), torch.zeros(2)], {}, is_list=True))
    assert [len(t) for t in found if t is not None] == [2, 4, 2]
