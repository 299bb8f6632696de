"""What a node does, as a list of ATen calls that can be compared: prescribed from the tape, or observed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from fxwidth.analysis.result import Analysis
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.recording.tape import OpCall, TapeRecorder, functional_name
from fxwidth.rules.family_table import is_move
from fxwidth.rules.op_families import Move
from fxwidth.rules.op_names import op_name, rule_name
from fxwidth.rules.registry import keeps, resized_call

aten = torch.ops.aten

Signature = tuple[Any, ...]

_SIZED_BY_RESULT = frozenset(
    map(op_name, (aten.expand, aten.full, aten.zeros, aten.ones, aten.empty, aten.rand, aten.randn))
) | frozenset(map(op_name, (aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty, aten.affine_grid_generator)))
_IRRELEVANT = frozenset(
    {"device", "layout", "pin_memory", "memory_format", "non_blocking", "generator", "implicit", "N", "HxW"}
)


def is_copy(func: OpOverload) -> bool:
    """Tell whether an op is without arithmetic meaning: whether it occurs depends on strides alone."""
    return is_move(func, Move.COPY, Move.STRIDES) or func.overloadpacket is aten._assert_tensor_metadata


def is_view(func: OpOverload) -> bool:
    """Tell whether an op shows entries in the same order under another shape."""
    return is_move(func, Move.RESHAPE, Move.RESHAPE_BY_STRIDES)


def is_silent(func: OpOverload) -> bool:
    """Tell whether an op is in no signature: a view is determined by the shapes before and after it."""
    return is_copy(func) or is_view(func)


def _is_cut(func: OpOverload) -> bool:
    """Tell whether positions among an op's arguments may be counted from the end of a dim."""
    return func.overloadpacket in (aten.slice, aten.select)


def prescribed_signatures(calls: Iterable[OpCall], maps: IndexMaps) -> list[Signature]:
    """Return what a node must do after a resize, from what it did on the tape."""
    result = []
    for call in calls:
        if is_silent(call.func):
            continue
        func, arguments = resized_call(call, maps)
        shapes = [[maps.size(axis) for axis in axes] for axes in call.output_axes]
        cut = _is_cut(call.func)
        sliced = maps.size(call.axes[call.arguments["self"]][call.arguments["dim"]]) if cut else 0
        result.append(_signature(func, arguments, shapes, sliced))
    return result


def observed_signature(call: OpCall) -> Signature:
    """Return what an op has done that has just been run."""
    shapes = [list(output.shape) for output in call.outputs]
    sliced = call.arguments["self"].shape[call.arguments["dim"]] if _is_cut(call.func) else 0
    return _signature(call.func, call.arguments, shapes, sliced)


def _signature(func: OpOverload, arguments: dict[str, Any], shapes: Sequence[Sequence[int]], sliced: int) -> Signature:
    name = functional_name(func)
    results = tuple(map(tuple, shapes))
    if is_move(func, Move.SPLIT):
        return ("split", results)
    if func.overloadpacket is aten.slice:
        start = arguments["start"] or 0
        return ("slice", results, arguments["dim"], start + sliced if start < 0 else start, arguments["step"])
    if func.overloadpacket is aten.select:
        return ("select", results, arguments["dim"], arguments["index"] % sliced)
    literals = []
    for key, value in arguments.items():
        leaves = pytree.tree_leaves(value)
        size_of_result = key == "size" and rule_name(func) in _SIZED_BY_RESULT
        if key in _IRRELEVANT or size_of_result or any(isinstance(leaf, Tensor) for leaf in leaves):
            continue
        literals.append((key, tuple(_comparable(leaf) for leaf in leaves)))
    return (name, results, tuple(literals))


def structure(signature: Signature) -> Signature:
    """Return what of a signature tells along which dims an op works: its whole numbers but for the sizes of results."""
    name, _, *rest = signature
    return (name, *(_whole(value) for value in rest))


def _whole(value: Any) -> Any:
    return tuple(map(_whole, value)) if isinstance(value, tuple) else value if isinstance(value, int) else None


def _comparable(value: Any) -> Any:
    if isinstance(value, float):
        # Literals pass through float32 kernels and user arithmetic; a wrong scale differs by far more.
        return float(f"{value:.10g}")
    return value if isinstance(value, (int, str, bool, type(None))) else str(value)


def observing(analysis: Analysis, node: str) -> tuple[TapeRecorder, list[Signature]]:
    """Return a recorder for a run of one node, and the list that takes what the node does."""
    observed: list[Signature] = []

    def see(call: OpCall) -> None:
        # At once: a later op may give its results other dims in place.
        if not is_silent(call.func):
            observed.append(observed_signature(call))

    recorder = TapeRecorder(keeps, see, values=analysis.known_values())
    recorder.begin(node)
    return recorder, observed


def differ(observed: Sequence[Signature], wanted: Sequence[Signature]) -> str | None:
    """Return None when two lists agree, or the first difference in words."""
    for own, other in zip(observed, wanted, strict=False):
        if own != other:
            return f"{own} where {other} is needed"
    return None if len(observed) == len(wanted) else f"{len(observed)} ops where {len(wanted)} are needed"
