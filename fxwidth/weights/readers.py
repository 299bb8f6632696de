"""Parameters that read activations, seen as matrices: their entries, what they contract, who takes a constant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxwidth.analysis.def_use import def_use
from fxwidth.axes.factors import Axis, Factor, axis_size
from fxwidth.axes.index_maps import Indices
from fxwidth.axes.positions import occupied_positions, without_minor
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.memo import per_graph
from fxwidth.recording.tape import OpCall, storage_of
from fxwidth.rules.family_table import as_family, family_of, is_arithmetic, is_move, running_norm
from fxwidth.rules.op_families import Arithmetic, Convolution, Move, Norm, Product
from fxwidth.weights.reparametrised import computed_values, normed_weights, weight_values


@dataclass(frozen=True)
class ParameterView:
    """The entries of a parameter that a tensor of the tape shows, as strides into the parameter's memory."""

    parameter: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return these entries of a tensor laid out like the parameter: writing to them writes to it."""
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)

    def overlaps(self, other: ParameterView) -> bool:
        """Tell whether two views of one parameter have entries in common."""
        if self._first > other._last or other._first > self._last:
            return False
        # Without a gap, every position between the first and the last is an entry.
        if self._is_dense or other._is_dense:
            return True
        return bool(np.intersect1d(self._entries(), other._entries(), assume_unique=True).size)

    @property
    def _first(self) -> int:
        return self.offset

    @property
    def _last(self) -> int:
        return self.offset + sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))

    @property
    def _is_dense(self) -> bool:
        return prod(self.size) == self._last - self._first + 1

    def _entries(self) -> Indices:
        positions = np.zeros(1, dtype=np.int64)
        for size, stride in zip(self.size, self.stride, strict=True):
            positions = (positions[:, None] + np.arange(size)[None, :] * stride).reshape(-1)
        return positions + self.offset


@dataclass(frozen=True)
class Reader:
    """A contraction of an activation with parameters: the weight as blocks [groups, rows, channels per group].

    Attributes:
        call: the op on the analysis tape.
        source: the name of the op's argument that holds the activation.
        source_dim: the dim of the activation that is contracted.
        weight: the name of the op's argument that holds the weight.
        weight_dim: the contracted dim of the weight.
        axis: what the contracted dim is made of, without the positions counted as samples.
        minor: how many neighbouring positions of the contracted dim belong to one channel and count as samples.
        groups: how many groups of a convolution share the channels, major.
        outputs: how many output channels there are per group.
        view: the parameter entries that the weight is, or None when it is computed from parameters.
    """

    call: OpCall
    source: str
    source_dim: int
    weight: str
    weight_dim: int
    axis: Axis
    minor: int
    groups: int
    outputs: int
    view: ParameterView | None

    @property
    def key(self) -> tuple[int, str]:
        """What tells one reader from another."""
        return self.call.index, self.source

    @property
    def transposed(self) -> bool:
        """Tell whether the op is a transposed convolution."""
        return bool(self.call.arguments.get("transposed"))

    @property
    def strides(self) -> int:
        """The share of a transposed convolution's kernel that meets one output position, inverted."""
        return prod(self.call.arguments["stride"]) if self.transposed else 1

    def blocks(self, weight: Tensor) -> Tensor:
        """Return a weight operand as [groups, rows, channels per group], rows being output channel major."""
        moved = weight.movedim(self.weight_dim, -1)
        if self.transposed:
            return moved.reshape(-1, self.groups, moved.shape[-1] // self.groups).transpose(0, 1)
        if self.minor > 1:
            return moved.reshape(-1, moved.shape[-1] // self.minor, self.minor).transpose(1, 2).flatten(0, 1)[None]
        return moved.reshape(self.groups, -1, moved.shape[-1])

    def operand(self, blocks: Tensor, like: Tensor) -> Tensor:
        """Return the weight operand whose blocks these are."""
        moved = like.movedim(self.weight_dim, -1)
        if self.transposed:
            flat = blocks.transpose(0, 1)
        elif self.minor > 1:
            flat = blocks[0].reshape(-1, self.minor, blocks.shape[-1]).transpose(1, 2)
        else:
            flat = blocks
        return flat.reshape(moved.shape).movedim(-1, self.weight_dim)


class Wiring:
    """How the parameters of a width graph meet its activations, looked up by op, tensor and parameter.

    Attributes:
        analysis: that of the graph.
        roles: what its parameters do for their channels.
        readers: in the order of the tape.
        memo: what has been found of it.
    """

    def __init__(self, width_graph: WidthGraph) -> None:
        # Not the width graph itself, which remembers its wiring: it is to go as soon as nobody holds it.
        self.analysis = width_graph.analysis
        self.memo: dict[Any, Any] = {}
        self.roles = width_graph.roles
        self._normed = normed_weights(self.analysis)
        self.readers: list[Reader] = list(self._find_readers())

    @cached_property
    def uses(self) -> dict[str, list[tuple[OpCall, Tensor]]]:
        """Where each parameter, or what is made of it, meets something that is no parameter."""
        result: dict[str, list[tuple[OpCall, Tensor]]] = {}
        inner = {index for normed in self._normed.values() for index in normed.inner}
        for call in self.analysis.calls:
            if call.index in inner or self._is_inside(call):
                continue
            for tensor in call.inputs:
                for name in self._made_of.get(tensor, ()):
                    result.setdefault(name, []).append((call, tensor))
        return result

    @cached_property
    def shown(self) -> frozenset[str]:
        """The parameters that a model's output holds, itself or something that is made of parameters alone."""
        return frozenset(name for tensor in self.analysis.outputs for name in self._made_of.get(tensor, ()))

    @cached_property
    def _made_of(self) -> dict[Tensor, frozenset[str]]:
        """Of which parameters each tensor that is made of parameters alone is made, numbers without dims included."""
        result = {entry.fake: frozenset({name}) for name, entry in self.analysis.parameters.items()}
        for call in self.analysis.calls:
            inputs = call.inputs
            if not inputs or not all(map(self.roles.is_parameter, inputs)):
                continue
            # A gain is no part of what a norm makes with it.
            parts = [call.arguments["input"]] if _has_gain(call) else inputs
            names = frozenset().union(*(result.get(tensor, frozenset()) for tensor in parts))
            for output in call.outputs:
                result[output] = result.get(output, frozenset()) | names
        return result

    def _is_inside(self, call: OpCall) -> bool:
        """Tell whether an op makes tensors of parameters alone, which count where they are used.

        Sums of products count themselves, and so does what is read as a number, or written to memory that others see.
        """
        of_parameters = all(map(self.roles.is_parameter, call.inputs))
        return of_parameters and bool(call.outputs) and not call.contractions and not call.func._schema.is_mutable

    def used_only(self, name: str, accepts: Callable[[OpCall, Tensor], bool]) -> bool:
        """Tell whether all uses of a parameter are of one kind: then other values in it change nothing else."""
        return name not in self.shown and all(accepts(call, tensor) for call, tensor in self.uses.get(name, ()))

    @cached_property
    def weighted_fan_out(self) -> dict[Factor, float]:
        """In how many readers each factor is, each counted by the share of its positions that are of the factor."""
        result: dict[Factor, float] = {}
        for reader in self.readers:
            for factor, positions in occupied_positions(reader.axis).items():
                result[factor] = result.get(factor, 0.0) + positions / axis_size(reader.axis)
        return result

    @cached_property
    def _by_storage(self) -> dict[int, list[tuple[str, Tensor]]]:
        """Which parameter, or normed weight in its place, a memory of the tape is, and the tensor that is all of it."""
        result: dict[int, list[tuple[str, Tensor]]] = {}
        for name, entry in self.analysis.parameters.items():
            result.setdefault(storage_of(entry.fake), []).append((name, entry.fake))
        for name, normed in self._normed.items():
            # Only the weight that is used has entries that readers see.
            result[storage_of(self.analysis.parameters[name].fake)] = []
            for whole in normed.results:
                result.setdefault(storage_of(whole), []).append((name, whole))
        return result

    def view(self, tensor: Tensor) -> ParameterView | None:
        """Return which entries of which parameter a tensor of the tape is, or None when it is a computed one."""
        known = self._by_storage.get(storage_of(tensor), [])
        if len(known) != 1:
            return None
        name, whole = known[0]
        parameter = self.analysis.parameters[name].tensor
        if parameter.layout != torch.strided or whole.stride() != parameter.detach().clone().stride():
            return None
        size = tuple(1 if stride == 0 else n for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return ParameterView(name, size, tensor.stride(), int(tensor.storage_offset() - whole.storage_offset()))

    def values(self, tensor: Tensor | None, *, differentiable: bool = False) -> Tensor | None:
        """Return the numbers of a tensor of the tape that is a parameter or computed from parameters."""
        if tensor is None or not self.roles.is_parameter(tensor):
            return None
        view = self.view(tensor)
        if view is not None:
            return view.of(weight_values(self.analysis, view.parameter, differentiable=differentiable))
        return computed_values(self.analysis, tensor, differentiable=differentiable)

    def following_batch_norm(self, call: OpCall) -> OpCall | None:
        """Return the batch norm that alone takes an op's result, if it keeps running statistics."""
        (follower,) = self._only_consumer(call.outputs[0]) or (None,)
        norm = None if follower is None else running_norm(follower.func)
        if follower is None or norm is None:
            return None
        arguments = follower.arguments
        is_input = arguments["input"] is call.outputs[0]
        return follower if is_input and arguments.get(norm.mean) is not None else None

    def added_bias(self, call: OpCall) -> tuple[OpCall, Tensor] | None:
        """Return what an op, or the addition right after it, adds to each output channel, and where."""
        arguments, family = call.arguments, family_of(call.func)
        if isinstance(family, Convolution):
            return (call, arguments["bias"]) if arguments["bias"] is not None else None
        if isinstance(family, Product) and family.added is not None:
            plain = arguments.get("beta", 1) == arguments.get("alpha", 1) == 1 and arguments[family.added].dim() == 1
            return (call, arguments[family.added]) if plain else None
        value = call.outputs[0]
        while (follower := self._only_consumer(value)) and is_move(follower[0].func, Move.RESHAPE):
            following = follower[0].outputs[0]
            if following.shape[-1:] != value.shape[-1:]:
                return None
            value = following
        if follower and is_arithmetic(follower[0].func, Arithmetic.SUM) and follower[0].arguments.get("alpha", 1) == 1:
            for tensor in follower[0].inputs:
                if tensor is not value and self.roles.is_parameter(tensor) and tensor.shape == value.shape[-1:]:
                    return follower[0], tensor
        return None

    def _only_consumer(self, tensor: Tensor) -> tuple[OpCall] | None:
        consumers = def_use(self.analysis).consumers_of(tensor)
        is_result = any(tensor is output for output in self.analysis.outputs)
        return (consumers[0],) if len(consumers) == 1 and not is_result else None

    def _find_readers(self) -> Iterator[Reader]:
        for call in self.analysis.calls:
            for contraction in call.contractions:
                left, right = contraction.left, contraction.right
                for own, own_dims, other, other_dims in (
                    (left, contraction.left_dims, right, contraction.right_dims),
                    (right, contraction.right_dims, left, contraction.left_dims),
                ):
                    # Kernels that are computed from activations, for a learnt image, are no weights that read it.
                    is_weight = not isinstance(family_of(call.func), Convolution) or own is call.arguments["weight"]
                    of_activation = self.roles.is_parameter(own) and not self.roles.is_parameter(other)
                    if is_weight and of_activation and len(own_dims) == 1:
                        yield self._reader(call, other, other_dims[0], own, own_dims[0])

    def _reader(self, call: OpCall, activation: Tensor, dim: int, weight: Tensor, weight_dim: int) -> Reader:
        is_convolution = isinstance(family_of(call.func), Convolution)
        groups = call.arguments["groups"] if is_convolution else 1
        axis = self.analysis.space.normalise(call.axes[activation][dim])
        axis, minor = without_minor(axis) if not is_convolution else (axis, 1)
        transposed = bool(call.arguments.get("transposed"))
        outputs = prod(size for i, size in enumerate(_distinct(weight)) if i != weight_dim)
        if is_convolution:
            outputs = weight.shape[1] if transposed else weight.shape[0] // groups
        source, own = argument_name(call, activation), argument_name(call, weight)
        view = self.view(weight)
        return Reader(call, source, dim, own, weight_dim, axis, minor, groups, outputs, view)


@per_graph
def wiring_of(width_graph: WidthGraph) -> Wiring:
    """Return the wiring of a width graph, found once."""
    return Wiring(width_graph)


def _distinct(tensor: Tensor) -> tuple[int, ...]:
    """Return a tensor's sizes without the copies that expanding made."""
    return tuple(1 if stride == 0 else size for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _has_gain(call: OpCall) -> bool:
    return as_family(call.func, Norm) is not None and call.arguments.get("weight") is not None


def argument_name(call: OpCall, tensor: Tensor) -> str:
    """Return under which name an op takes a tensor."""
    return next(name for name, value in call.arguments.items() if value is tensor)
