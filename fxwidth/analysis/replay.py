"""The recorded tape run again on real numbers: removed channels once zeroed and once cut out.

The first run is the judge: it runs the ops as they were recorded, at their old sizes, and believes no literal_rule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from fxwidth.analysis.replay_places import Places
from fxwidth.analysis.result import Analysis
from fxwidth.axes.factors import axis_size
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.errors import FxwidthError
from fxwidth.recording.layouts import for_any_layout
from fxwidth.recording.tape import Axes, OpCall, functional_name, storage_of, tensors_in, unbind
from fxwidth.rules.family_table import as_family, channel_norm, is_move
from fxwidth.rules.op_families import FakeQuantization, Matrices, Move, Norm, NormKind
from fxwidth.rules.registry import ResizedCall, resized_call, revised
from fxwidth.runtime.pytrees import deep_tensors

aten = torch.ops.aten

# Checks of dtype and layout made while tracing; a replay has a dtype of its own.
_SKIPPED = aten._assert_tensor_metadata


def is_replayed(call: OpCall) -> bool:
    """Tell whether an op takes part in a replay."""
    return call.func.overloadpacket is not _SKIPPED and bool(call.outputs)


class _Replay(ABC):
    """Runs the calls of a tape on real tensors."""

    def __init__(self, analysis: Analysis, maps: IndexMaps, dtype: torch.dtype | None) -> None:
        self.analysis = analysis
        self.maps = maps
        self.places = Places(analysis, maps)
        self.values: dict[Tensor, Tensor] = {}
        self._dtype = dtype

    @abstractmethod
    def parameter(self, tensor: Tensor, axes: Axes) -> Tensor:
        """Return what stands for a parameter, a buffer, or a result on record."""

    @abstractmethod
    def execute(self, call: OpCall) -> list[Tensor]:
        """Run one op and return its results."""

    def answer(self, output: Tensor) -> Tensor:
        """Return the value of an output at its new size: that of a state may change."""
        return self.value(output)

    def run(self, inputs: Sequence[Any]) -> list[Tensor]:
        """Run the tape and return the model's outputs."""
        for _ in self.steps(inputs):
            pass
        return list(map(self.answer, self.analysis.outputs))

    def steps(self, inputs: Sequence[Any]) -> Iterator[OpCall]:
        """Run the tape, and yield each call when it has been run and the values it works with are still there."""
        with torch.no_grad():
            self._start(inputs)
        doomed = _last_uses(self.analysis)
        for call in self.analysis.calls:
            if is_replayed(call):
                with torch.no_grad():
                    self._step(call)
                yield call
            for key in doomed.get(call.index, ()):
                self.values.pop(key, None)

    def value(self, tensor: Tensor) -> Tensor:
        """Return the real tensor that stands for one of the tape; a constant met on the tape stands for itself."""
        if tensor not in self.values:
            if torch._subclasses.fake_tensor.is_fake(tensor):
                raise FxwidthError(f"the tape does not say where a tensor of shape {tuple(tensor.shape)} comes from.")
            self.values[tensor] = self._real(tensor)
        return self.values[tensor]

    def call_op(self, func: OpOverload, arguments: dict[str, Any], lift: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Run an op on what stands for its tensors, in the precision of the replay."""
        concrete = {
            name: pytree.tree_map(lambda leaf: lift(leaf) if isinstance(leaf, Tensor) else self._literal(leaf), value)
            for name, value in arguments.items()
        }
        if as_family(func, FakeQuantization) is not None:
            # Kernels take these in single precision alone.
            scales = {name: concrete[name] for name in ("scale", "zero_point") if isinstance(concrete[name], Tensor)}
            concrete |= {name: own.float() for name, own in scales.items() if own.is_floating_point()}
        op, concrete = for_any_layout(func, concrete, Tensor.contiguous)
        args, kwargs = unbind(op, concrete)
        results = [self._widened(tensor) for tensor in tensors_in(op(*args, **kwargs))]
        # What an empty tensor holds is chance, and must be the same in two runs.
        return [tensor.zero_() for tensor in results] if "empty" in functional_name(func) else results

    def laid_out(self, call: OpCall, tensor: Tensor) -> Tensor:
        """Return the value of an operand, as it lay in memory when it was recorded for a view by strides."""
        value = self.value(tensor)
        if not is_move(call.func, Move.STRIDES) or call.layouts[tensor] == (value.stride(), value.storage_offset()):
            return value
        stride, offset = call.layouts[tensor]
        memory = value.new_zeros(offset + 1 + sum((n - 1) * step for n, step in zip(value.shape, stride, strict=True)))
        return memory.as_strided(value.shape, stride, offset).copy_(value)

    def rewrite(self, call: OpCall, results: Iterable[Tensor]) -> list[Tensor]:
        """Return results computed on copies, those of an in-place op written to its target."""
        written = set(call.inputs) if call.func._schema.is_mutable else set()
        return [
            self.value(output).copy_(result) if output in written else result
            for output, result in zip(call.outputs, results, strict=True)
        ]

    def _start(self, inputs: Sequence[Any]) -> None:
        for entry in self.analysis.parameters.values():
            if entry.tensor.is_meta:
                raise FxwidthError(f"{entry.name} is on the meta device and has no values; load the weights first.")
            self.values[entry.fake] = self.parameter(self._real(entry.tensor), entry.axes)
        if len(inputs) != len(self.analysis.inputs):
            raise FxwidthError(
                f"the graph has {len(self.analysis.inputs)} inputs, but {len(inputs)} values were given."
            )
        for fake, value in zip(self.analysis.inputs, inputs, strict=True):
            recorded, given = deep_tensors(fake), deep_tensors(value)
            if [tensor.shape for tensor in recorded] != [tensor.shape for tensor in given]:
                told = _shapes(given) or type(value).__name__
                raise FxwidthError(f"an input was recorded with shape {_shapes(recorded)}, but {told} was given.")
            for tensor, real in zip(recorded, given, strict=True):
                self.values[tensor] = self._real(real)

    def _step(self, call: OpCall) -> None:
        try:
            results = self.execute(call) if call.recorded is None else self._recalled(call)
        except FxwidthError as error:
            raise FxwidthError(f"{self._place(call)}: {error}") from error
        except Exception as error:
            shapes = [tuple(self.values[t].shape) for t in call.inputs if t in self.values]
            message = str(error).strip().split("\n")[0]
            raise FxwidthError(f"{self._place(call)} does not run on operands of shapes {shapes}: {message}") from error
        for output, result in zip(call.outputs, results, strict=True):
            self.values[output] = result

    def _recalled(self, call: OpCall) -> list[Tensor]:
        """Return what an op that depends on values has found on record, so that both runs go the same way."""
        if call.func is aten.index.Tensor:
            found = {**call.arguments, "indices": call.recorded}
            return self.execute(replace(call, arguments=found))
        results = map(self._real, tensors_in(call.recorded))
        return [self.parameter(*pair) for pair in zip(results, call.output_axes, strict=True)]

    def _place(self, call: OpCall) -> str:
        return f"{call.func} at node {call.node or '?'} (op {call.index} of the tape)"

    def _real(self, tensor: Tensor) -> Tensor:
        # A copy, since the tape may write to it.
        return self._widened(tensor.detach().clone())

    def _widened(self, tensor: Tensor) -> Tensor:
        wanted = self._literal(tensor.dtype)
        return tensor if tensor.dtype == wanted else tensor.to(wanted)

    def _literal(self, value: Any) -> Any:
        if self._dtype is None or not isinstance(value, torch.dtype):
            return value
        if value.is_complex:
            return self._dtype.to_complex()
        return self._dtype if value.is_floating_point else value


class ZeroedReplay(_Replay):
    """The old sizes and literals, with zeros wherever channels are removed."""

    def parameter(self, tensor: Tensor, axes: Axes) -> Tensor:
        """Return a parameter with zeros for its removed entries."""
        self.places.erase(tensor, axes)
        return tensor

    def execute(self, call: OpCall) -> list[Tensor]:
        """Run one op at its old sizes, and write zeros to what is removed of its results."""
        if self._mixes_resized_dims(call) or self._needs_kept_alone(call):
            # What a norm or softmax makes of the kept channels depends on how many there are.
            found = self.call_op(*self._on_kept(call), lambda leaf: self._compact(call, leaf))
            renumbered = (self._renumbered(call, result) for result in found)
            scattered = (self.places.scatter(*pair) for pair in zip(renumbered, call.output_axes, strict=True))
            return self.rewrite(call, scattered)
        with _seeded(call):
            results = self.call_op(call.func, call.arguments, lambda leaf: self.laid_out(call, leaf))
        return [self._erased(call, *pair) for pair in zip(results, call.output_axes, strict=True)]

    def answer(self, output: Tensor) -> Tensor:
        """Return the value of an output without its removed entries."""
        return self.places.gather(self.value(output), self.analysis.axes_of(output))

    def _mixes_resized_dims(self, call: OpCall) -> bool:
        return any(
            reduction.kind != "sum" and self.maps.changes(call.axes[reduction.tensor][reduction.dim])
            for reduction in call.reductions
        )

    def _needs_kept_alone(self, call: OpCall) -> bool:
        """Tell whether zeros in the place of what is removed would change what becomes of the rest.

        An op takes one entry after the other, as many as a mask has places; of matrices of zeros there is no inverse.
        """
        in_order = call.func.overloadpacket in (torch.ops.aten.masked_scatter, torch.ops.aten.masked_scatter_)
        taken = in_order or as_family(call.func, Matrices) is not None
        return taken and any(map(self.maps.changes, call.output_axes[0]))

    def _on_kept(self, call: OpCall) -> ResizedCall:
        """Return the call on the kept channels alone; sizes are those of its operands, no literal_rule is believed."""
        norm = as_family(call.func, Norm)
        if channel_norm(call.func) is not None:
            count = len(call.arguments["normalized_shape"])
            kept = self._compact(call, call.arguments["input"]).shape
            return revised(call, normalized_shape=list(kept[len(kept) - count :]))
        if norm is not None and norm.kind is NormKind.GROUP:
            signal, old = call.arguments["input"], call.arguments
            samples, channels, *positions = self._compact(call, signal).shape
            places, _ = self.places.of(call.axes[signal][1], signal.device)
            group = len((places // (old["C"] // old["group"])).unique())
            return revised(call, N=samples, C=channels, HxW=prod(positions), group=group)
        return resized_call(call, self.maps)

    def _renumbered(self, call: OpCall, result: Tensor) -> Tensor:
        """Return positions among the kept channels as what they were among all; other results as they are."""
        if result.dtype != torch.int64 or not call.reductions or not call.reductions[0].tensor.is_floating_point():
            return result
        tensor, dims = call.reductions[0].tensor, [reduction.dim for reduction in call.reductions]
        axes = call.axes[tensor]
        kept = [self.places.of(axes[dim], result.device)[0] for dim in dims]
        # A position in several dims counts through all of them.
        places = torch.unravel_index(result, [len(own) for own in kept])
        old: Tensor = torch.zeros_like(result)
        for dim, own, place in zip(dims, kept, places, strict=True):
            old = old * axis_size(axes[dim]) + own[place]
        return old

    def _compact(self, call: OpCall, tensor: Tensor) -> Tensor:
        return self.places.gather(self.value(tensor), call.axes[tensor])

    def _erased(self, call: OpCall, tensor: Tensor, axes: Axes) -> Tensor:
        if not self.places.changed(axes):
            return tensor
        if _is_view(call, tensor, map(self.value, call.inputs)):
            if not is_move(call.func, Move.EXPANSION):
                return tensor  # what it shows was erased before
            # The copies of one element share its memory, but only some of them are removed.
            tensor = tensor.clone()
        self.places.erase(tensor, axes)
        return tensor


class ResizedReplay(_Replay):
    """Sliced parameters and prescribed literals."""

    def parameter(self, tensor: Tensor, axes: Axes) -> Tensor:
        """Return a parameter without its removed entries."""
        return self.places.gather(tensor, axes)

    def execute(self, call: OpCall) -> list[Tensor]:
        """Run one op as prescribed, and check the sizes of what it makes."""
        if torch.Tag.nondeterministic_seeded in call.func.tags:
            # The kept numbers must be those that the other run draws.
            with _seeded(call):
                full = self.call_op(
                    call.func, call.arguments, lambda leaf: self.places.scatter(self.value(leaf), call.axes[leaf])
                )
            results = self.rewrite(
                call, (self.places.gather(*pair) for pair in zip(full, call.output_axes, strict=True))
            )
        else:
            results = self.call_op(*resized_call(call, self.maps), lambda leaf: self.laid_out(call, leaf))
        for result, axes in zip(results, call.output_axes, strict=True):
            wanted = tuple(self.maps.size(axis) for axis in axes)
            if tuple(result.shape) != wanted:
                raise FxwidthError(f"the result has shape {tuple(result.shape)} where {wanted} is prescribed.")
        return results


@contextmanager
def _seeded(call: OpCall) -> Iterator[None]:
    if torch.Tag.nondeterministic_seeded not in call.func.tags:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(call.index)
        yield


def _is_view(call: OpCall, result: Tensor, sources: Iterable[Tensor]) -> bool:
    if call.func._schema.is_mutable:
        return False
    place = storage_of(result)
    return any(storage_of(source) == place for source in sources)


def _shapes(tensors: Iterable[Tensor]) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)


def _last_uses(analysis: Analysis) -> dict[int, list[Tensor]]:
    """Return, per call, the tensors that no later call needs."""
    last = {tensor: call.index for call in analysis.calls for tensor in [*call.inputs, *call.outputs]}
    for output in analysis.outputs:
        last.pop(output, None)
    doomed: dict[int, list[Tensor]] = {}
    for key, index in last.items():
        doomed.setdefault(index, []).append(key)
    return doomed
