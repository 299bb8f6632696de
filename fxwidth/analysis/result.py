"""What one run of a graph has shown: its tape, its axes, and which node did what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxwidth.analysis.graph_state import GraphState
from fxwidth.axes.factor_space import FactorSpace
from fxwidth.axes.factors import Axis, Factor, constant
from fxwidth.axes.pins import HELD, Pin
from fxwidth.recording.data_dependent import ValueReader, ValueRecord
from fxwidth.recording.tape import Axes, OpCall
from fxwidth.runtime.pytrees import deep_tensors, sample_count

Dim = tuple[str, int]


@dataclass(frozen=True)
class LostGroup:
    """A group of width one of which nothing is known any more but its name, where it occurs, and why."""

    name: str
    dims: tuple[Dim, ...]
    why: str


@dataclass(frozen=True)
class TensorSpec:
    """The shape, dtype, device and layout of an input."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    layout: torch.layout = torch.strided

    def with_batch(self, size: int) -> TensorSpec:
        """Return the spec for another batch size."""
        return replace(self, shape=(size, *self.shape[1:]))


@dataclass(frozen=True)
class ParameterAxes:
    """A parameter or buffer of the model: the fake tensor that stood for it, and one new factor per dim."""

    name: str
    tensor: Tensor
    fake: Tensor
    origins: tuple[Factor | None, ...]
    axes: Axes


@dataclass(eq=False)
class Analysis:
    """All that one run of a graph has shown: its tape, its axes, and which fx node did what.

    `output_names` are those by which a caller finds its outputs. `states` are those of its outputs that are inside of
    objects such as caches, by `id`: their sizes may change. `effects` is what nodes do besides of which no op tells, as
    to put hooks on gradients. `keeping` are the nodes that keep tensors in attributes, with those of them that their
    next calls read. `is_single` tells that the inputs are one sample, without a batch. `training_calls` are what nodes
    do in training that do nothing in evaluation, or return something else, and `in_training` what they return there,
    each with what that stands for. `lost` are groups of width one that cannot be told any more. `memo` is for
    `fxwidth.memo.per_graph`, and `seen` is what the module was.
    """

    module: fx.GraphModule
    space: FactorSpace
    mode: FakeTensorMode
    parameters: dict[str, ParameterAxes]
    inputs: tuple[Any, ...]
    batch: Factor | None
    record: ValueRecord | None = None
    calls: list[OpCall] = field(default_factory=list)
    node_calls: dict[str, range] = field(default_factory=dict)
    keeping: dict[str, list[Tensor]] = field(default_factory=dict)
    part_calls: dict[int, list[range]] = field(default_factory=dict)
    node_values: dict[str, Any] = field(default_factory=dict)
    node_axes: dict[str, tuple[Axes, ...]] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)
    output_names: list[str] = field(default_factory=list)
    states: set[Tensor] = field(default_factory=set)
    effects: dict[str, str] = field(default_factory=dict)
    computed_sizes: frozenset[int] = frozenset()
    is_single: bool = False
    training_calls: dict[str, list[OpCall]] = field(default_factory=dict)
    in_training: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    axes: dict[Tensor, Axes] = field(default_factory=dict)
    lost: tuple[LostGroup, ...] = ()
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)
    seen: GraphState | None = None

    @cached_property
    def names(self) -> dict[Tensor, str]:
        """The names of parameters and buffers by the fakes that stand for them."""
        return {entry.fake: name for name, entry in self.parameters.items()}

    def samples_in(self, values: Any) -> int:
        """Return how many samples there are in one value per placeholder, or in a list of single ones."""
        if self.takes_lists:
            return next((len(value) for value in values if deep_tensors(value)), 0)
        return 1 if self.is_single else sample_count(values)

    @property
    def takes_lists(self) -> bool:
        """Tell whether the first input is a list of single samples, as detectors take images of any sizes."""
        if self.batch is not None or self.record is None:
            return False
        return isinstance(next((value for value in self.inputs if deep_tensors(value)), None), (list, tuple))

    def axes_of(self, tensor: Tensor) -> Axes:
        """Return the axes of a tensor; one that was never seen has fixed dims."""
        axes = self.axes.get(tensor)
        if axes is None:
            axes = tuple(constant(size, Pin(HELD)) for size in tensor.shape)
            self.set_axes(tensor, axes)
        return axes

    def set_axes(self, tensor: Tensor, axes: Sequence[Axis]) -> None:
        """Say of what a tensor is made."""
        self.axes[tensor] = tuple(axes)

    def in_memory_of(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors seen so far that are in the memory of one: what it is a view of, and other views."""
        place = tensor.untyped_storage()._cdata
        known = [entry.fake for entry in self.parameters.values()] + deep_tensors(self.inputs)
        known += [output for call in self.calls for output in call.outputs]
        return [other for other in known if other is not tensor and other.untyped_storage()._cdata == place]

    def known_values(self, finds: int | None = None) -> ValueReader | None:
        """Return a new reader of what is on record for ops that depend on values, or None where there are none."""
        return None if self.record is None else ValueReader(self.record, self.mode, finds)

    def calls_of_part(self, part: nn.Module) -> list[OpCall]:
        """Return the ops that a module inside of a node's module ran."""
        return [self.calls[i] for run in self.part_calls.get(id(part), ()) for i in run]

    def calls_of(self, node: str) -> list[OpCall]:
        """Return the ops that an fx node ran."""
        return [self.calls[i] for i in self.node_calls.get(node, range(0))]
