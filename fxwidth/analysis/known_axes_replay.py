"""Analysing a graph that has groups of width one: its axes are those on record, and its ops are held to that record.

No rule is asked, for a rule cannot tell a channel from a dim that is broadcast once both have size one. What is asked
is whether the graph is the one that the axes were written down for: the same ops in the same order, on operands with
the axes that they had then, wherever these came from, and with results of the sizes that follow from these axes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx

from fxwidth.analysis.axis_propagation import apply_rule, faked_inputs, run_on_tape
from fxwidth.analysis.known_axes import KnownAxes, KnownAxis, KnownCall, decoded, kind_of
from fxwidth.analysis.op_signatures import is_copy, is_silent, observed_signature, structure
from fxwidth.analysis.result import Analysis, LostGroup, ParameterAxes
from fxwidth.axes.factors import Axis, Factor, axis_size, bare_factor, constant
from fxwidth.axes.pins import HELD, LOST, Pin
from fxwidth.recording.data_dependent import ValueRecord
from fxwidth.recording.tape import Axes, Contraction, OpCall, Reduction
from fxwidth.runtime.fake_tensors import fake_like, fake_mode
from fxwidth.runtime.gc_pause import without_collections
from fxwidth.runtime.pytrees import deep_tensors
from fxwidth.runtime.tensor_slots import Slots, tensor_slots


class OtherGraphError(Exception):
    """The graph is not the one that the axes on record are of; the text says where they part."""


@without_collections()
def follow_axes(
    known: KnownAxes, module: fx.GraphModule, examples: Sequence[Any], record: ValueRecord | None = None
) -> Analysis:
    """Run a graph on fake tensors and return the axes of everything in it, as they are on record.

    Args:
        known: what is on record.
        module: the graph, as for `analyze_axes`.
        examples: likewise.
        record: likewise.

    Raises:
        OtherGraphError: the graph is another, or its inputs are of other shapes.
        FxwidthError: the graph does not run on these inputs.
    """
    mode = fake_mode()
    space, factors = known.restored()
    inputs = faked_inputs(examples, mode)
    axes_of_inputs = _axes_of_inputs(known, factors, inputs)
    slots = tensor_slots(module)
    axes = _axes_of_parameters(known, factors, slots)
    parameters = {
        name: ParameterAxes(name, tensor, fake_like(mode, tensor), tuple(map(bare_factor, axes[name])), axes[name])
        for name, (tensor, _) in slots.items()
    }
    batch = None if known.batch is None else factors[known.batch]
    analysis = Analysis(module, space, mode, parameters, inputs, batch, record, is_single=known.is_single)
    analysis.lost = known.lost
    for tensor, own in zip(deep_tensors(inputs), axes_of_inputs, strict=True):
        analysis.set_axes(tensor, own)
    same_batch = known.batch is None or factors[known.batch].size == known.factors[known.batch].size
    follower = _Follower(analysis, factors, iter(known.calls), same_batch)
    run_on_tape(analysis, slots, follower.see)
    if (problem := follower.problem or follower.missing) is not None:
        raise OtherGraphError(problem)
    return analysis


def lost_groups(known: KnownAxes, why: OtherGraphError) -> tuple[LostGroup, ...]:
    """Return the groups that only a record knew of which is of another graph."""
    own = (LostGroup(name, dims, f"{LOST}: {why}") for name, dims in known.narrow.items())
    return (*known.lost, *own)


def _axes_of_inputs(known: KnownAxes, factors: Sequence[Factor], inputs: Sequence[Any]) -> list[Axes]:
    tensors = deep_tensors(inputs)
    if len(tensors) != len(known.inputs):
        raise OtherGraphError(f"there are {len(tensors)} tensors among its inputs, and were {len(known.inputs)}")
    axes = [tuple(decoded(axis, factors) for axis in own) for own in known.inputs]
    if known.batch is not None:
        # The batch may be another.
        batch = factors[known.batch]
        sizes = [t.shape[0] for t, own in zip(tensors, axes, strict=True) if own and bare_factor(own[0]) is batch]
        batch.size = sizes[0] if sizes else batch.size
    for tensor, own in zip(tensors, axes, strict=True):
        if (sizes_then := _sizes(own)) != tuple(tensor.shape):
            raise OtherGraphError(f"an input of shape {list(tensor.shape)} was of shape {list(sizes_then)}")
    return axes


def _axes_of_parameters(known: KnownAxes, factors: Sequence[Factor], slots: Slots) -> dict[str, Axes]:
    result = {}
    for name, (tensor, _) in slots.items():
        if name in known.parameters:
            result[name] = tuple(decoded(axis, factors) for axis in known.parameters[name])
        else:
            # What a resize has put beside the graph was a constant inside of a node before.
            result[name] = tuple(constant(size, Pin(HELD)) for size in tensor.shape)
        if (sizes_then := _sizes(result[name])) != tuple(tensor.shape):
            raise OtherGraphError(f"{name} of shape {list(tensor.shape)} was of shape {list(sizes_then)}")
    return result


def _sizes(axes: Axes) -> tuple[int, ...]:
    return tuple(map(axis_size, axes))


class _Follower:
    """Gives each op of a run the axes that are on record for it.

    Attributes:
        problem: the first op that is not as it was, in words, or None.
    """

    def __init__(
        self, analysis: Analysis, factors: Sequence[Factor], calls: Iterator[KnownCall], same_batch: bool
    ) -> None:
        self._analysis = analysis
        self._factors = factors
        self._calls = calls
        self._same_batch = same_batch
        self._axes: dict[KnownAxis, Axis] = {}
        self.problem: str | None = None

    @property
    def missing(self) -> str | None:
        """The first op on record that the run has not come to, in words, or None."""
        known = next(self._calls, None)
        return None if known is None else f"there is no {known.kind} where one was"

    def see(self, call: OpCall) -> None:
        """Take note of an op that has just run."""
        if is_copy(call.func):
            apply_rule(self._analysis, call)
        elif self.problem is None:
            self.problem = self._follow(call, next(self._calls, None))

    def _follow(self, call: OpCall, known: KnownCall | None) -> str | None:
        analysis, inputs = self._analysis, call.inputs
        if known is None or known.kind != kind_of(call):
            return f"there is {call.place} where {'nothing' if known is None else known.kind} was"
        if (len(inputs), len(call.outputs)) != (len(known.inputs), len(known.outputs)):
            return f"{call.place} has another number of operands or results"
        # Of another batch are the sizes that it is in.
        if self._same_batch and not is_silent(call.func) and structure(observed_signature(call)) != known.literals:
            return f"{call.place} is called with other numbers"
        operands, results = list(map(self._decoded, known.inputs)), list(map(self._decoded, known.outputs))
        for tensor, axes in zip(inputs, operands, strict=True):
            if tuple(map(analysis.space.normalise, analysis.axes_of(tensor))) != axes:
                return f"{call.place} works with something else"
        if list(map(_sizes, results)) != [tuple(output.shape) for output in call.outputs]:
            return f"{call.place} has results of other shapes"
        call.axes = dict(zip(inputs, operands, strict=True))
        call.output_axes = tuple(results)
        call.contractions = [
            Contraction(inputs[a], dims, inputs[b], others) for a, dims, b, others in known.contractions
        ]
        call.reductions = [Reduction(inputs[place], dim, kind) for place, dim, kind in known.reductions]
        for output, axes in zip(call.outputs, results, strict=True):
            analysis.set_axes(output, axes)
        return None

    def _decoded(self, axes: tuple[KnownAxis, ...]) -> Axes:
        result = []
        for axis in axes:
            if axis not in self._axes:
                self._axes[axis] = self._analysis.space.normalise(decoded(axis, self._factors))
            result.append(self._axes[axis])
        return tuple(result)
