"""Misuses of the public functions, and what the message of each has to say: what was received, and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, TensorDataset

import fxwidth


@dataclass(frozen=True)
class Misuse:
    """One misuse.

    Attributes:
        what: what is wrong, as a table tells it.
        call: does it.
        received: what of the message names the place and what was received.
        remedy: what of it says what would do.
    """

    what: str
    call: Callable[[], Any]
    received: str
    remedy: str


def network() -> nn.Module:
    """Return a network of two hidden layers on 8 inputs."""
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))


def inputs(count: int = 2) -> Tensor:
    """Return inputs of the network, [count, 8]."""
    return torch.randn(count, 8)


def graph() -> fx.GraphModule:
    """Return the graph of a new network."""
    return fxwidth.trace(network(), inputs())


def groups() -> fxwidth.WidthGraph:
    """Return the channel groups of a new network."""
    return fxwidth.analyze(graph())


def _file() -> Path:
    path = Path(mkdtemp()) / "x.safetensors"
    fxwidth.save(graph(), path)
    return path


def _outdated() -> fxwidth.WidthGraph:
    gm = graph()
    wg = fxwidth.analyze(gm)
    fxwidth.resize(gm, {"0": 8}, selection="magnitude")
    return wg


def _not_finite() -> fxwidth.WidthGraph:
    gm = graph()
    with torch.no_grad():
        gm.get_parameter("0.weight")[0, 0] = float("nan")
    return fxwidth.analyze(gm)


class Branching(nn.Module):
    """Fails on what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        """Fail."""
        raise ValueError(f"no such branch for {x.dim()} dims")


# A type checker sees most of these misuses, and is not asked.
api: Any = fxwidth
mse = nn.functional.mse_loss

MISUSES: tuple[Misuse, ...] = (
    # Tracing
    Misuse("trace without inputs", lambda: api.analyze(api.trace(Branching())), "", "example_inputs"),
    Misuse("a batch without samples", lambda: api.evolve(network(), inputs(0), params=0.5), "0 samples", "one or more"),
    Misuse("inputs of another width", lambda: api.trace(network(), torch.randn(2, 5)), "(2, 5)", "example_inputs"),
    Misuse(
        "a DataLoader as inputs",
        lambda: api.trace(network(), DataLoader(TensorDataset(inputs()))),
        "DataLoader",
        "batch",
    ),
    Misuse("a shape as inputs", lambda: api.trace(network(), (2, 8)), "", "tensor"),
    Misuse("a function as a model", lambda: api.trace(lambda x: x, inputs()), "function", "Module"),
    Misuse("a state dict as a model", lambda: api.trace(network().state_dict(), inputs()), "OrderedDict", "Module"),
    Misuse(
        "an argument that is not there",
        lambda: api.trace(network(), {"images": inputs()}),
        "has 1 (images)",
        "a dict of inputs by name",
    ),
    Misuse("a fault in forward", lambda: api.trace(Branching(), inputs()), "no such branch", "misuse_cases.py"),
    Misuse(
        "an exported program without parameters",
        lambda: api.trace(torch.export.export(nn.ReLU(), (inputs(),)), inputs()),
        "nothing in the ExportedProgram is a parameter",
        "Export a module whose weights are nn.Parameter",
    ),
    Misuse(
        "an optimizer as a model",
        lambda: api.trace(torch.optim.SGD(network().parameters()), inputs()),
        "SGD",
        "Module",
    ),
    # Analysis
    Misuse("analyze a module", lambda: api.analyze(network()), "Sequential", "fxwidth.trace"),
    Misuse("a group that is not there", lambda: groups()["conv1"], "'conv1'", "print(fxwidth.analyze(gm))"),
    Misuse("explain a name that is not there", lambda: groups().explain("0", "5"), "'5'", "print(fxwidth.analyze(gm))"),
    Misuse(
        "explain a dim that is not there", lambda: groups().explain("0.weight:3", "2"), "0.weight has no dim 3", "dim"
    ),
    Misuse("draw to another kind of file", lambda: groups().draw("x.doc"), "x.doc", ".svg"),
    Misuse("draw to a missing folder", lambda: groups().draw("/no/such/folder/x.svg"), "/no/such/folder", "folder"),
    # Planning
    Misuse("plan a module", lambda: api.plan(network(), params=0.5), "Sequential", "fxwidth.analyze(gm)"),
    Misuse("report a module", lambda: api.report(network()), "received Sequential", "fxwidth.report(gm)"),
    Misuse("plan a graph", lambda: api.plan(graph(), params=0.5), "received Sequential", "fxwidth.analyze(gm)"),
    Misuse("a percentage of 250", lambda: api.plan(groups(), params=250.0), "params=250.0", "ratio"),
    Misuse("a negative target", lambda: api.plan(groups(), params=-0.5), "params=-0.5", "(0, 100]"),
    Misuse("a percentage as a whole number", lambda: api.plan(groups(), params=5), "5 is a count", "pass 0.05"),
    Misuse("a target out of reach", lambda: api.plan(groups(), params=10), "params=10", "Raise params"),
    Misuse("another library's word", lambda: api.plan(groups(), pruning_ratio=0.5), "pruning_ratio", "params="),
    Misuse("a misspelt option", lambda: api.plan(groups(), parms=0.5), "parms", "params"),
    Misuse("a budget that bounds nothing", api.Budget, "", "params"),
    Misuse("a cost that is not there", lambda: api.Budget(costs={"energy": 0.5}), "energy", "fxwidth.cost"),
    Misuse(
        "a dict as a budget",
        lambda: api.plan(groups(), budget={"params": 0.5}),
        "{'params': 0.5}",
        "fxwidth.Budget",
    ),
    Misuse(
        "two targets",
        lambda: api.plan(groups(), params=0.5, budget=api.Budget(flops=0.5)),
        "params=0.5",
        "budget=",
    ),
    Misuse(
        "thresholds under a budget",
        lambda: api.plan(groups(), params=0.5, grow_step=2),
        "grow_step",
        "without a budget",
    ),
    Misuse("data without a budget", lambda: api.plan(groups(), data=[inputs()]), "data", "budget"),
    Misuse(
        "a pattern without a match",
        lambda: api.plan(groups(), params=0.5, keep="layer*"),
        "keep='layer*'",
        "print(width_graph)",
    ),
    Misuse(
        "min_width above max_width",
        lambda: api.plan(groups(), params=0.5, min_width=9, max_width=4),
        "9",
        "max_width",
    ),
    Misuse("align of zero", lambda: api.plan(groups(), params=0.5, align=0), "align=0", "at least 1"),
    Misuse(
        "a selection that is not there",
        lambda: api.plan(groups(), params=0.5, selection="gredy"),
        "gredy",
        "greedy",
    ),
    Misuse("a loss without data", lambda: api.plan(groups(), params=0.5, loss=mse), "loss", "data="),
    Misuse(
        "data without targets for a loss",
        lambda: api.plan(groups(), params=0.5, loss=mse, data=[inputs(16)]),
        "loss",
        "target",
    ),
    Misuse("data that are used up", lambda: api.plan(groups(), params=0.5, data=iter([])), "data", "batch"),
    Misuse(
        "data of another width",
        lambda: api.plan(groups(), params=0.5, data=[torch.randn(4, 5)]),
        "(4, 5)",
        "(2, 8)",
    ),
    Misuse("data with NaN", lambda: api.plan(groups(), params=0.5, data=[inputs() * float("nan")]), "", "finite"),
    Misuse("weights with NaN", lambda: api.plan(_not_finite(), params=0.5), "0.weight", "NaN"),
    Misuse(
        "groups of an earlier graph",
        lambda: api.plan(_outdated(), params=0.5),
        "0.weight was [16, 8]",
        "fxwidth.analyze(gm)",
    ),
    # Resizing
    Misuse("resize a module", lambda: api.resize(network(), {"0": 8}), "Sequential", "fxwidth.trace"),
    Misuse("resize without a plan", lambda: api.resize(graph(), None), "None", "plan"),
    Misuse("a ratio as a plan", lambda: api.resize(graph(), 0.5), "0.5", "fxwidth.plan"),
    Misuse("a width of zero", lambda: api.resize(graph(), {"0": 0}), "0", "at least"),
    Misuse("a ratio as a width", lambda: api.resize(graph(), {"0": 0.5}), "0.5", "width"),
    Misuse(
        "the width of an output",
        lambda: api.resize(graph(), {"4": 3}),
        "'4' must keep its width 4",
        "Remove it from the plan",
    ),
    Misuse(
        "channels that are not there",
        lambda: api.resize(graph(), {"0": [0, 99]}),
        "channel 99 of group '0'",
        "0 to 15",
    ),
    Misuse("channels twice", lambda: api.resize(graph(), {"0": [1, 1, 2]}), "[1, 1, 2]", "ascending"),
    Misuse(
        "an optimizer of another model",
        lambda: api.resize(graph(), {"0": 8}, optimizer=torch.optim.SGD(network().parameters())),
        "SGD with 6 parameters",
        "gm.parameters()",
    ),
    Misuse(
        "a scheduler as an optimizer",
        lambda: api.resize(
            graph(), {"0": 8}, optimizer=torch.optim.lr_scheduler.StepLR(torch.optim.SGD(network().parameters()), 1)
        ),
        "StepLR",
        "optimizer",
    ),
    Misuse(
        "directions that look, without a loss",
        lambda: api.resize(graph(), {"0": 18}, directions="tiny"),
        "directions='tiny'",
        "data=",
    ),
    Misuse(
        "directions that are not there",
        lambda: api.resize(graph(), {"0": 18}, directions="ortogonal"),
        "ortogonal",
        "orthogonal",
    ),
    Misuse("scores of another length", lambda: api.resize(graph(), {"0": 8}, selection=lambda *_: [1.0]), "[1]", "16"),
    Misuse(
        "a companion of another network",
        lambda: api.resize(graph(), {"0": 8}, also=[nn.Linear(2, 2)]),
        "also",
        "copy.deepcopy(gm)",
    ),
    Misuse(
        "an output that is not there",
        lambda: api.evolve(network(), inputs(), params=0.5, output="model"),
        "model",
        "module",
    ),
    # Training
    Misuse("an Evolver of a module", lambda: api.Evolver(network(), params=0.5), "Sequential", "fxwidth.trace"),
    Misuse(
        "an Evolver that never acts",
        lambda: api.Evolver(graph(), params=0.5, every=0),
        "every= ",
        "at least 1, but received 0",
    ),
    Misuse(
        "epochs where steps are counted",
        lambda: api.Evolver(graph(), params=0.5).epoch(),
        "epoch()",
        "every='epoch'",
    ),
    Misuse(
        "a state of something else",
        lambda: api.Evolver(graph(), params=0.5).load_state_dict({"a": 1}),
        "a dict with a",
        "Evolver.state_dict",
    ),
    Misuse("a penalty of a module", lambda: api.spectral_penalty(network()), "Sequential", "fxwidth.trace"),
    Misuse(
        "a kind of penalty that is not there",
        lambda: api.spectral_penalty(graph(), kind="nuclear"),
        "nuclear",
        "spectral",
    ),
    # Files
    Misuse("save a module", lambda: api.save(network(), "x.safetensors"), "Sequential", "fxwidth.trace"),
    Misuse(
        "save to a missing folder",
        lambda: api.save(graph(), "/no/such/folder/x.safetensors"),
        "/no/such/folder",
        "folder",
    ),
    Misuse(
        "load a missing file",
        lambda: api.load("nothing.safetensors", network, inputs()),
        "nothing.safetensors",
        "fxwidth.save",
    ),
    Misuse("load into another model", lambda: api.load(_file(), nn.Linear(8, 4), inputs()), "", "model"),
    Misuse("load without a model", lambda: api.load(_file()), "", "model"),
    Misuse(
        "write back to another class",
        lambda: api.write_back(graph(), nn.Linear(8, 4)),
        "none of Linear",
        "pass a module of the class that was traced",
    ),
    # Passes and registering
    Misuse(
        "a pass without a plan",
        lambda: api.passes.ResizeWidths().call(graph()),
        "ResizeWidths has no plan",
        "PlanWidths",
    ),
    Misuse("a pass with a misspelt option", lambda: api.passes.PlanWidths(parms=0.5), "parms", "params"),
    Misuse("a method whose name is taken", lambda: api.selection_method("greedy"), "greedy", "choose another"),
    Misuse("a cost whose name is taken", lambda: api.cost("params", unit="entries"), "params", "choose another"),
    Misuse(
        "a rule for no class of optimizers",
        lambda: api.optimizer_state_rule(nn.Linear),
        "Linear",
        "torch.optim.Optimizer",
    ),
)
