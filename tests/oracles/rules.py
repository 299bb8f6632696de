"""The rule oracle: one op call at a time, its operands permuted, cut and grown as its rule says they may be.

A permutation of one factor on every operand must permute the results in the places where the rule put the factor.
That finds missing couplings and wrong orders; the counts in the table of samples, and dims that turn out independent
when they are permuted alone, find couplings and pins without need.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxwidth.analysis.axis_propagation import analyze_axes
from fxwidth.analysis.data_dependent_runs import record_values
from fxwidth.analysis.result import Analysis
from fxwidth.axes.factors import Axis, Factor, axis_size
from fxwidth.axes.index_maps import NEW, IndexMaps, Indices
from fxwidth.recording.tape import Axes, OpCall, plain_kernels, tensors_in, unbind
from fxwidth.rules.registry import resized_call
from tests.oracles.sample_calls import Operand, Sample, Sizes


@dataclass
class Probe:
    """One sample call: its operands, its analysis, and its results at the sizes of the sample."""

    sample: Sample
    arguments: list[Any]
    operands: list[Tensor]
    analysis: Analysis
    results: list[Tensor]

    @property
    def operand_axes(self) -> list[Axes]:
        return [self.analysis.parameters[f"operand{i}"].axes for i in range(len(self.operands))]

    @property
    def result_axes(self) -> list[Axes]:
        return [self.analysis.axes_of(tensor) for tensor in tensors_in(self.analysis.node_values["call"])]

    @property
    def call(self) -> OpCall:
        """The op on the tape, for samples that are recorded as one."""
        (call,) = self.analysis.calls
        return call

    def factors(self) -> list[Factor]:
        """Return the free factors of operands and results."""
        axes = [axis for row in [*self.operand_axes, *self.result_axes] for axis in row]
        found = (factor for axis in axes for factor in self.analysis.space.factors(axis))
        return list(dict.fromkeys(factor for factor in found if factor.size))

    def fixed_dims(self) -> int:
        """Count the operand dims in which nothing is free."""
        space = self.analysis.space
        return sum(axis_size(axis) > 1 and space.is_constant(axis) for axes in self.operand_axes for axis in axes)

    def run(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """Run the op with the literals of the sample."""
        return run(self.sample, self.arguments, operands)


def make_probe(sample: Sample, equal: int | None = None) -> Probe:
    """Analyse a sample call, and run it where its numbers can be compared."""
    arguments = sample.arguments(Sizes(equal))
    leaves, spec = pytree.tree_flatten((arguments, sample.keywords))
    torch.manual_seed(1)
    operands = [leaf.make() for leaf in leaves if isinstance(leaf, Operand)]
    root, graph = nn.Module(), fx.Graph()
    nodes = []
    for i, operand in enumerate(operands):
        root.register_buffer(f"operand{i}", operand)
        nodes.append(graph.get_attr(f"operand{i}"))
    waiting = iter(nodes)
    filled = [next(waiting) if isinstance(leaf, Operand) else leaf for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(filled, spec)
    call = graph.create_node("call_function", sample.overload(), tuple(args), kwargs, name="call")
    # The graph returns nothing, so that no size is pinned for being the model's output.
    graph.output(())
    assert call.name == "call"
    module = fx.GraphModule(root, graph)
    analysis = analyze_axes(module, [], record_values(module, []) if sample.by_value else None)
    results = run(sample, arguments, operands) if sample.by_value else []
    return Probe(sample, arguments, operands, analysis, results)


def run(sample: Sample, arguments: list[Any], operands: Sequence[Tensor]) -> list[Tensor]:
    waiting = iter([operand.clone() for operand in operands])
    args, kwargs = pytree.tree_map(
        lambda leaf: next(waiting) if isinstance(leaf, Operand) else leaf, (arguments, sample.keywords)
    )
    with plain_kernels():
        return tensors_in(sample.overload()(*args, **kwargs))


def take(tensor: Tensor, axes: Sequence[Axis], maps: IndexMaps) -> Tensor:
    """Return a tensor after a resize; new positions hold numbers that occur nowhere else."""
    for dim, axis in enumerate(axes):
        if not maps.changes(axis):
            continue
        indices = torch.from_numpy(maps.indices(axis))
        tensor = tensor.index_select(dim, indices.clamp(min=0))
        shape = [1] * tensor.dim()
        shape[dim] = -1
        new = (indices == NEW).reshape(shape)
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            tensor = torch.where(new, torch.rand_like(tensor) * 0.8 + 0.1, tensor)
    return tensor


def maps_of(probe: Probe, kept: Mapping[Factor, Indices]) -> IndexMaps:
    return IndexMaps(probe.analysis.space, kept)


def shuffled(size: int, generator: np.random.Generator) -> Indices:
    """Return a permutation that moves something."""
    while True:
        order = generator.permutation(size)
        if (order != np.arange(size)).any():
            return order


def same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return len(actual) == len(expected) and all(
        one.shape == other.shape and torch.allclose(one, other, rtol=1e-10, atol=1e-12, equal_nan=True)
        for one, other in zip(actual, expected, strict=True)
    )


def check_permutations(probe: Probe, seed: int = 0) -> None:
    """Assert that each factor alone can be permuted on all operands, and permutes the results as their axes say."""
    generator = np.random.default_rng(seed)
    for factor in probe.factors():
        maps = maps_of(probe, {factor: shuffled(factor.size, generator)})
        operands = [take(*pair, maps) for pair in zip(probe.operands, probe.operand_axes, strict=True)]
        expected = [take(*pair, maps) for pair in zip(probe.results, probe.result_axes, strict=True)]
        actual = run_prescribed(probe, maps, operands) if probe.sample.names_channels else probe.run(operands)
        assert same(actual, expected), f"{probe.sample.op}: permuting {factor} is not seen in the result"


def check_prescription(probe: Probe, kept: Mapping[Factor, Indices]) -> None:
    """Assert that the prescribed call has results of the prescribed shapes, and where it only moves or maps, values."""
    maps = maps_of(probe, kept)
    operands = [take(*pair, maps) for pair in zip(probe.operands, probe.operand_axes, strict=True)]
    if probe.sample.by_value:
        actual = run_prescribed(probe, maps, operands)
    else:
        with probe.analysis.mode:
            fakes = [torch.empty(operand.shape, dtype=operand.dtype) for operand in operands]
            run_prescribed(probe, maps, fakes)
        return
    if not any(call.contractions or call.reductions for call in probe.analysis.calls):
        # What names a channel that is gone names nothing any more, as if the channel were zero.
        results = probe.run(_without_removed(probe, maps)) if probe.sample.names_channels else probe.results
        for tensor, result, axes in zip(actual, results, probe.result_axes, strict=True):
            assert same([_old_part(tensor, axes, maps)], [_old_part(take(result, axes, maps), axes, maps)])


def _without_removed(probe: Probe, maps: IndexMaps) -> list[Tensor]:
    """Return the operands at their old sizes with zeros for the entries that a resize removes."""
    operands = []
    for operand, axes in zip(probe.operands, probe.operand_axes, strict=True):
        for dim, axis in enumerate(axes):
            gone = np.setdiff1d(np.arange(axis_size(axis)), maps.indices(axis))
            operand = operand.index_fill(dim, torch.from_numpy(gone), 0)
        operands.append(operand)
    return operands


def run_prescribed(probe: Probe, maps: IndexMaps, operands: Sequence[Tensor]) -> list[Tensor]:
    """Run what the tape of a sample becomes, and check the shape of every result on the way."""
    entries = probe.analysis.parameters.values()
    values = {entry.fake: operand for operand, entry in zip(operands, entries, strict=True)}
    for call in probe.analysis.calls:
        func, arguments = resized_call(call, maps)
        args, kwargs = unbind(func, pytree.tree_map(lambda leaf: values.get(leaf, leaf), arguments))
        results = tensors_in(func(*args, **kwargs))
        for output, result in zip(call.outputs, results, strict=True):
            values[output] = result
            wanted = tuple(maps.size(axis) for axis in probe.analysis.axes_of(output))
            assert tuple(result.shape) == wanted, f"{func} prescribed for {probe.sample.op}"
    return [values[tensor] for tensor in tensors_in(probe.analysis.node_values["call"])]


def _old_part(tensor: Tensor, axes: Sequence[Axis], maps: IndexMaps) -> Tensor:
    for dim, axis in enumerate(axes):
        if maps.changes(axis):
            tensor = tensor.index_select(dim, torch.from_numpy(np.nonzero(maps.indices(axis) != NEW)[0]))
    return tensor


def removal(factor: Factor, generator: np.random.Generator) -> Indices:
    count = int(generator.integers(1, max(2, factor.size)))
    return np.sort(generator.permutation(factor.size)[:count])


def growth(factor: Factor, generator: np.random.Generator) -> Indices:
    return np.concatenate([np.arange(factor.size), np.full(int(generator.integers(1, 4)), NEW)])


def coupled_without_need(probe: Probe) -> list[str]:
    """Return the operand dims that the op treats as independent although the rule couples or pins them.

    Such a dim can be permuted alone, and cut alone, and the results follow in one dim or not at all.
    """
    found = []
    occurrences = [
        factor for axes in probe.operand_axes for axis in axes for factor in probe.analysis.space.factors(axis)
    ]
    for i, (operand, axes) in enumerate(zip(probe.operands, probe.operand_axes, strict=True)):
        for dim, axis in enumerate(axes):
            size = operand.shape[dim]
            factors = probe.analysis.space.factors(axis)
            is_free = len(factors) == 1 and factors[0].size == size and occurrences.count(factors[0]) == 1
            if size > 1 and not is_free and _acts_alone(probe, i, dim, size):
                found.append(f"operand {i} dim {dim}")
    return found


def _acts_alone(probe: Probe, operand: int, dim: int, size: int) -> bool:
    generator = np.random.default_rng(0)
    keeps = [shuffled(size, generator) for _ in range(2)]
    keeps += [np.delete(np.arange(size), random.Random(0).randrange(size))]
    for kept in keeps:
        index = torch.from_numpy(kept)
        changed = list(probe.operands)
        changed[operand] = changed[operand].index_select(dim, index)
        try:
            results = probe.run(changed)
        except (RuntimeError, IndexError, ValueError):
            return False
        if not all(map(lambda new, old: _follows(new, old, index, size), results, probe.results)):
            return False
    return True


def _follows(new: Tensor, old: Tensor, index: Tensor, size: int) -> bool:
    if same([new], [old]):
        return True
    return any(old.shape[dim] == size and same([new], [old.index_select(dim, index)]) for dim in range(old.dim()))
