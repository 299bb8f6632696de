"""What several tests need: models with telling numbers, analyses of them, and random removals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, fx, nn

import fxwidth
from fxwidth.analysis.axis_propagation import analyze_axes
from fxwidth.analysis.result import Analysis
from fxwidth.axes.factors import Factor
from fxwidth.axes.index_maps import IndexMaps, Indices
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.options import ResizeOptions
from fxwidth.recording.tape import tensors_in
from fxwidth.resizing.resize import resize_analyzed
from fxwidth.tracing.analyze import analyze_module
from fxwidth.verification.replay_oracle import largest_difference, reference_outputs, replay_difference, resized_outputs

# Rounding of float64 over some hundred layers; the smallest planted fault is ten orders above it.
ROUNDING = 1e-9


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and buffer random values of a sound scale: with defaults, wrong index maps do not show."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * (high - low) + low

    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if not tensor.dtype.is_floating_point or tensor.layout is not torch.strided:
            continue
        is_gain = tensor.dim() <= 1 and any(word in name for word in ("weight", "var", "gamma", "scale"))
        if is_gain:
            values = uniform(tensor, 0.75, 1.25)
        elif tensor.dim() <= 1:
            values = uniform(tensor, -0.2, 0.2)
        else:
            bound = (3.0 / max(1, tensor[0].numel())) ** 0.5
            values = uniform(tensor, -1.2 * bound, 1.2 * bound)
        with torch.no_grad():
            tensor.copy_(values)
    return model


def traced(model: nn.Module) -> fx.GraphModule:
    """Return a graph of a model: traced, or where that is not possible the model as one node."""
    if isinstance(model, fx.GraphModule):
        return model
    try:
        return fx.symbolic_trace(model)
    except Exception:
        return as_one_node(model)


def as_one_node(model: nn.Module) -> fx.GraphModule:
    """Return a graph with one node, the model."""
    graph = fx.Graph()
    names = model.forward.__code__.co_varnames[1 : model.forward.__code__.co_argcount]
    graph.output(graph.call_module("model", tuple(graph.placeholder(name) for name in names)))
    return fx.GraphModule({"model": model}, graph)


def analysed(model: nn.Module, inputs: Sequence[Any]) -> Analysis:
    """Analyse a model in eval mode with telling numbers in it."""
    return analyze_axes(traced(randomise(model.eval())), inputs)


def removals(groups: Sequence[ChannelGroup], ratio: float, seed: int = 0) -> dict[Factor, Indices]:
    """Keep a random part of the channels of each group, in order."""
    generator = np.random.default_rng(seed)
    return {
        group.factor: np.sort(generator.permutation(group.width)[: max(1, round(group.width * ratio))])
        for group in groups
    }


def random_maps(analysis: Analysis, ratio: float, seed: int = 0) -> IndexMaps:
    """Keep a random part of the channels of every free group."""
    return IndexMaps(analysis.space, removals(WidthGraph(analysis).free, ratio, seed))


def assert_replays(analysis: Analysis, inputs: Sequence[Any], ratios: Sequence[float] = (0.5, 0.3)) -> None:
    """Assert that random removals at several ratios give what zeroing the same channels gives."""
    links = len(analysis.space.links)
    for seed, ratio in enumerate(ratios):
        difference = replay_difference(analysis, random_maps(analysis, ratio, seed), inputs)
        assert difference < ROUNDING, f"kept {ratio} of every group: outputs differ by {difference:.1e}"
    # What is coupled, cut or fixed is decided by the analysis; a resize must not decide again.
    assert len(analysis.space.links) == links


def assert_replays_unchanged(analysis: Analysis, model: nn.Module, inputs: Sequence[Any]) -> None:
    """Assert that both replays give what the model does where nothing is removed."""
    with torch.no_grad():
        expected = tensors_in(model(*inputs))
    maps = IndexMaps(analysis.space, {})
    for outputs in (reference_outputs(analysis, maps, inputs), resized_outputs(analysis, maps, inputs)):
        assert largest_difference(outputs, expected) < ROUNDING, "the tape is not the model"


def assert_rewrites(model: nn.Module, inputs: Sequence[Any], ratio: float = 0.5, seed: int = 0) -> fx.GraphModule:
    """Assert that a graph that was really resized, without folding, gives what zeroing the same channels gives."""
    module = traced(randomise(model.eval()).double())
    inputs = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    width_graph = WidthGraph(analyze_module(module, tuple(inputs)))
    kept = removals(width_graph.free, ratio, seed)
    analysis = width_graph.analysis
    expected = reference_outputs(analysis, IndexMaps(analysis.space, kept), at_batch_of(analysis, inputs))
    plan = {group.name: kept[group.factor].tolist() for group in width_graph.free}
    with _without_improvements():
        resize_analyzed(width_graph, plan, ResizeOptions(fold=False), blind=True)
    with torch.no_grad():
        actual = tensors_in(module(*at_batch_of(analysis, inputs)))
    difference = largest_difference(actual, expected)
    assert difference < ROUNDING, f"kept {ratio} of every group: outputs of the new graph differ by {difference:.1e}"
    return module


def at_batch_of(analysis: Analysis, inputs: Sequence[Any]) -> list[Any]:
    """Return inputs at the batch size of an analysis, which sees a batch of one as two."""
    return [
        x if not isinstance(x, Tensor) or x.shape == spec.shape else x.repeat(2, *[1] * (x.dim() - 1))
        for x, spec in zip(inputs, analysis.inputs, strict=True)
    ]


def halved_exactly(gm: fx.GraphModule, kept: Mapping[str, Indices]) -> None:
    """Resize a graph to given channels of its groups, by name, just as if the others were zero."""
    with _without_improvements():
        fxwidth.resize(gm, {group: channels.tolist() for group, channels in kept.items()}, fold=False)


@contextmanager
def _without_improvements() -> Iterator[None]:
    """Have dropped channels taken for zero, with no variance matching."""
    norms = patch("fxwidth.weights.reparametrised.normed_weights", lambda _: {})
    with norms, patch("fxwidth.resizing.parameters._variance_ratios", lambda *_: {}):
        yield
