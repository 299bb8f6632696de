"""What is known of a random network's values without any rule or literal_rule: copies, batches, modes, gradients."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx

import fxwidth
from fxwidth.analysis.roles import Role
from fxwidth.axes.positions import channel_positions
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.verification.replay_oracle import largest_difference
from tests.fuzz.networks import INPUTS, POSITIONS, Program, RandomNetwork, example_input
from tests.oracles.judges import ROUNDING, randomise

# Ops behind which every channel is read by parameters alone, or not at all: these can take over what a copy said. A
# padded convolution is none of them: at the border, its bias cannot stand for a channel that is constant.
READ_BY_PARAMETERS = (
    *("pointwise conv", "linear", "depthwise conv", "flatten", "flatten last", "shuffle", "fold", "repeat"),
    *("cat", "split", "chunk", "slice", "tile", "roll", "pad", "ones", "zeros", "add", "mul", "interleave", "update"),
    *("relu", "cosine", "glu", "gain", "batch norm", "same by strides", "copied part", "added part"),
    *("set part by method", "filled part", "shifted", "samples of parts", "samples of channels", "expanded"),
    *("messages", "frequencies", "set at places"),
)


def traced_network(program: Program) -> fx.GraphModule:
    """Return the graph of a random network in eval mode, with telling numbers in it."""
    torch.manual_seed(0)
    return fxwidth.trace(randomise(RandomNetwork(program).double().eval()), example_input())


def values(module: fx.GraphModule, x: Tensor, training: bool = False) -> list[Tensor]:
    """Return what a module computes in one of its modes; it stays as it was."""
    module = copy.deepcopy(module).train(training)
    torch.manual_seed(1)
    with torch.no_grad():
        return list(module(x))


def longer(x: Tensor) -> Tensor:
    """Return a batch that begins with another one."""
    return torch.cat([x, 0.5 * x.flip(0)[:2] + 0.1])


def assert_same(actual: list[Tensor], expected: list[Tensor], what: str) -> None:
    difference = largest_difference(actual, expected)
    assert difference < ROUNDING, f"{what}: outputs differ by {difference:.1e}"


def assert_samples_apart(module: fx.GraphModule, x: Tensor) -> None:
    """Assert that in eval mode more samples change nothing of what the others give."""
    alone = values(module, x)
    assert_same([y[: len(x)] for y in values(module, longer(x))], alone, "samples beside others")


def check_growth(program: Program) -> None:
    """Grow what can be grown: the function is the same at other batch sizes and in training, batch statistics too."""
    module, x = traced_network(program), example_input()
    batches = [(batch, training) for batch in (x, longer(x)) for training in (False, True)]
    before = [values(module, *given) for given in batches]
    groups = fxwidth.analyze(module).free
    plan = {group.name: group.width + 1 + i % 3 for i, group in enumerate(groups) if group.inexact_growth is None}
    fxwidth.resize(module, plan)
    for (batch, training), expected in zip(batches, before, strict=True):
        assert_same(values(module, batch, training), expected, f"grown, {len(batch)} samples, train({training})")
    assert_samples_apart(module, x)


def check_training(program: Program) -> None:
    """Halve all that is free: the network still trains, every parameter that had a gradient has one."""
    module, x = traced_network(program), example_input()
    assert_samples_apart(module, x)
    before = _with_gradients(module, x)
    fxwidth.resize(module, {group.name: max(2, group.width // 2) for group in fxwidth.analyze(module).free})
    assert_samples_apart(module, x)
    gradients = _with_gradients(module, x)
    assert set(gradients) == set(before), f"gradients of {set(gradients) ^ set(before)}"
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def _with_gradients(module: fx.GraphModule, x: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a training step, by parameter; the module stays as it was."""
    module = copy.deepcopy(module).train()
    sum(y.square().mean() for y in module(x)).backward()
    return {name: own.grad for name, own in module.named_parameters() if own.grad is not None}


def check_copies(program: Program, fewer: int = 0) -> int:
    """Make half of each group's channels copies of the other half, and drop as many; return how many groups are halved.

    What copies say can be told by the others, so the function is the same, whatever the rules are. With `fewer`, as
    many more are dropped of each group.
    """
    module, x = traced_network(program), example_input()
    width_graph = fxwidth.analyze(module)
    groups = [group for group in width_graph.free if group.width % 2 == 0 and group.sites_as(Role.WRITER)]
    for group in groups:
        copy_halves(width_graph, group)
    before = [values(module, batch) for batch in (x, longer(x))]
    data = [torch.randn(64, INPUTS, POSITIONS, dtype=torch.float64) for _ in range(4)]
    fxwidth.resize(module, {group.name: max(1, group.width // 2 - fewer) for group in groups}, data=data, rotate=False)
    for batch, expected in zip((x, longer(x)), before, strict=True):
        assert_same(values(module, batch), expected, f"without copies, {len(batch)} samples")
    return len(groups)


@torch.no_grad()
def copy_halves(width_graph: WidthGraph, group: ChannelGroup) -> None:
    """Give the second half of a group's channels what makes the first half."""
    half, analysis = group.width // 2, width_graph.analysis
    for site in group.sites:
        if site.role == Role.READER:
            continue
        entry = analysis.parameters[site.parameter]
        moved = entry.tensor.movedim(site.dim, 0)
        for positions in channel_positions(analysis.space, entry.axes[site.dim], group.factor):
            moved[torch.from_numpy(positions[half:])] = moved[torch.from_numpy(positions[:half])].clone()
