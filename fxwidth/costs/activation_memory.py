"""What a training step keeps of its forward pass for the backward one: activation memory, in bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxwidth.analysis.axis_propagation import apply_rule
from fxwidth.analysis.result import Analysis
from fxwidth.axes.factor_space import FactorSpace
from fxwidth.axes.factors import Axis, Factor
from fxwidth.axes.pins import Pin
from fxwidth.axes.polynomials import Polynomial, entries_polynomial
from fxwidth.costs.registry import register
from fxwidth.errors import FxwidthError
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.memo import per_graph
from fxwidth.recording.tape import Axes, OpCall, TapeRecorder, storage_of
from fxwidth.rules.registry import keeps
from fxwidth.runtime.contexts import quiet, training
from fxwidth.runtime.module_state import restored
from fxwidth.runtime.tensor_slots import substituted


@register("activation_memory", unit="bytes")
def activation_polynomial(width_graph: WidthGraph) -> Polynomial:
    """Return the bytes that autograd keeps of one forward pass in training mode on the example inputs.

    Counted is every piece of memory that a tensor saved for the backward pass lies in, once, as a whole: activations,
    indices and masks, statistics of norms, the inputs themselves; parameters and buffers are not. It is what
    `torch.autograd.graph.saved_tensors_hooks` shows, and follows `requires_grad` of the parameters. The ops are taken
    to stay what they are: fused attention keeps less than its parts, which run where a resize makes the widths of keys
    and values differ, and a module that a resize lowers may copy an activation once more.

    Raises:
        FxwidthError: nothing would be kept, or the graph does not run in training mode.
    """
    entries = width_graph.analysis.parameters.items()
    return _kept_bytes(width_graph, frozenset(name for name, entry in entries if entry.tensor.requires_grad))


@per_graph
def _kept_bytes(width_graph: WidthGraph, trained: Set[str]) -> Polynomial:
    kept = list(_kept(width_graph.analysis)) if trained else []
    if not kept:
        raise FxwidthError(
            "training keeps no activations: no parameter of this graph requires a gradient. "
            "Call requires_grad_() on what is to be trained, or leave activation_memory out of the budget."
        )
    space = width_graph.analysis.space
    return Polynomial.sum((piece.itemsize, entries_polynomial(space, [piece.axes])) for piece in kept)


@dataclass(frozen=True)
class _Piece:
    """Memory that one op allocated, as the tensor that it made."""

    axes: Axes
    itemsize: int


def _kept(analysis: Analysis) -> Iterator[_Piece]:
    """Run a graph in training mode on fake tensors and yield the memory that autograd holds on to."""
    fakes = {name: _leaf(entry.fake, entry.tensor) for name, entry in analysis.parameters.items()}
    inputs = [value.detach() if isinstance(value, Tensor) else value for value in analysis.inputs]
    again = _TrainingAnalysis(analysis)
    pieces: dict[int, _Piece] = {}
    for name, entry in analysis.parameters.items():
        again.set_axes(fakes[name], entry.axes)
    for old, new in zip(analysis.inputs, inputs, strict=True):
        if isinstance(new, Tensor):
            again.set_axes(new, analysis.axes_of(old))
            pieces[storage_of(new)] = _Piece(again.axes_of(new), new.element_size())

    def see(call: OpCall) -> None:
        apply_rule(again, call)
        for output, axes in zip(call.outputs, call.output_axes, strict=True):
            pieces.setdefault(storage_of(output), _Piece(axes, output.element_size()))

    own = {storage_of(fake) for fake in fakes.values()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(storage_of(tensor), tensor)
        return tensor

    recorder = TapeRecorder(keeps, see)
    module = analysis.module
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    looked_at = substituted(module, fakes, restoring=restored)
    with training(module), looked_at, torch.enable_grad(), quiet(), analysis.mode, hooks, recorder:
        result = _result(module, inputs)
    del result
    for storage, tensor in saved.items():
        if storage not in own:
            fixed = _Piece(tuple(((size,),) for size in tensor.shape), tensor.element_size())
            yield pieces.get(storage, fixed)


def _result(module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    try:
        return fx.Interpreter(module).run(*inputs, enable_io_processing=False)
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FxwidthError(
            f"the graph does not run in training mode, so what training keeps is not known: {line}. "
            "Leave activation_memory out of the budget."
        ) from error


def _leaf(fake: Tensor, parameter: Tensor) -> Tensor:
    return fake.detach().requires_grad_(isinstance(parameter, nn.Parameter) and parameter.requires_grad)


class _TrainingAnalysis(Analysis):
    """The axes of a second run, in the factors of the first, which it must not change."""

    def __init__(self, first: Analysis) -> None:
        known = {f for entry in first.parameters.values() for axis in entry.axes for f in first.space.factors(axis)}
        super().__init__(first.module, _KnownSpace(known), first.mode, first.parameters, first.inputs, first.batch)
        self._places: dict[tuple[Any, ...], Axes] = {}

    def axes_of(self, tensor: Tensor) -> Axes:
        """Return the axes of a tensor, known by itself or, since autograd hands on other objects, by its place."""
        known = self.axes.get(tensor) or self._places.get(_place(tensor))
        if known is not None:
            return known
        return super().axes_of(tensor)

    def set_axes(self, tensor: Tensor, axes: Sequence[Axis]) -> None:
        """Say of what a tensor is made."""
        super().set_axes(tensor, axes)
        self._places[_place(tensor)] = tuple(axes)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return storage_of(tensor), tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride())


class _KnownSpace(FactorSpace):
    """A space that may decide on its own factors, but leaves those of another as they are."""

    def __init__(self, known: set[Factor]) -> None:
        super().__init__()
        self._known = known

    def merge(self, kept: Factor, absorbed: Factor) -> None:
        """Make two roots one, unless both are known."""
        if absorbed in self._known:
            kept, absorbed = absorbed, kept
        if absorbed not in self._known:
            absorbed.parent = kept
            self.changed(absorbed)

    def refine(self, factor: Factor, axis: Axis) -> None:
        """Say what a root of this space consists of."""
        if factor not in self._known:
            super().refine(factor, axis)

    def pin(self, axis: Axis, reason: str, cause: Pin | None = None) -> None:
        """Fix the size of this space's own factors."""
        for factor in self.factors(axis):
            if factor not in self._known:
                factor.pinned = Pin(reason, cause=cause)
                self.changed(factor)

    def mix(self, axis: Axis, reason: str) -> None:
        """Reduction is of no interest here."""
