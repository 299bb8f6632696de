"""What one run of a graph has found out about values, for ops whose results fake tensors cannot tell.

How many boxes survive, which positions are not zero, what a number read from a tensor is: such ops are run once on real
tensors, and what they found is written down by node. Every later run on fake tensors takes it from there, in order. It
holds at other widths too: what is kept of a look-up under a mask are the positions found, not what was found there.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils import _pytree as pytree

from fxwidth.recording import composite_ops  # noqa: F401 - it defines ops
from fxwidth.runtime.trace_guards import unheeded

aten = torch.ops.aten

VALUE_ERRORS = (DataDependentOutputException, DynamicOutputShapeException)

# By node, the ops of it that depend on values, and what they found: results, numbers, or positions under masks.
ValueRecord = Mapping[str, Sequence[tuple[str, Any]]]

_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_MASKS = (torch.bool, torch.uint8)


@dataclass(frozen=True)
class Check:
    """A flag on record of which the other value ends the run, by a statement that raises an error.

    Attributes:
        flag: what was found.
    """

    flag: bool


class Values(Protocol):
    """Who stands between a tape and the ops that depend on values."""

    def begin(self, node: str) -> None:
        """Say which node is at work from now on."""

    def run(self, func: OpOverload, arguments: Mapping[str, Any], op: Callable[[], Any]) -> tuple[Any, Any]:
        """Return an op's result, and what is on record for it, None where it does not depend on values."""


class ValueWriter:
    """Runs every op and writes down what depends on values.

    Args:
        never_empty: whether something is found wherever nothing is. Code often ends early for empty tensors, and ops
            take short cuts, so that nothing can be learned from them of what is done to others.
    """

    def __init__(self, never_empty: bool) -> None:
        self.record: dict[str, list[tuple[str, Any]]] = {}
        self._never_empty = never_empty
        self._node = ""

    def begin(self, node: str) -> None:
        """Say which node is at work from now on."""
        self._node = node

    def run(self, func: OpOverload, arguments: Mapping[str, Any], op: Callable[[], Any]) -> tuple[Any, Any]:
        """Run an op and write down what it found if it depends on values."""
        if not depends_on_values(func, arguments):
            return op(), None
        if func is aten.index.Tensor:
            known: Any = _positions(arguments["indices"], self._never_empty)
            result = func(arguments["self"], known)
        elif func in _PACKING:
            result = op()
            known = list(result[0].shape[: _PACKING[func].made]), result[1].clone()
        else:
            result = op()
            nothing = func is aten.nonzero.default and result.numel() == 0 and arguments["self"].numel() > 0
            if nothing and self._never_empty:
                result = result.new_zeros(1, arguments["self"].dim())
            # A copy: the model may go on to write to its own.
            known = pytree.tree_map_only(Tensor, lambda leaf: leaf.detach().clone(), result)
        self.record.setdefault(self._node, []).append((func.name(), known))
        return result, None


class OtherWayError(Exception):
    """With another flag the model goes on, with other ops."""


class OtherWay(ValueWriter):
    """Runs every op, but gives the opposite of one flag; another op after that ends the run.

    What an error says of tensors may be written out: the ops for that do not count.

    Args:
        never_empty: as for all.
        node: which node reads the flag.
        place: after how many others on its record.
    """

    def __init__(self, never_empty: bool, node: str, place: int) -> None:
        super().__init__(never_empty)
        self._flag = node, place
        self._is_past = False

    def run(self, func: OpOverload, arguments: Mapping[str, Any], op: Callable[[], Any]) -> tuple[Any, Any]:
        """Run an op.

        Raises:
            OtherWayError: it is one on the other way.
        """
        if self._is_past:
            if not _is_written_out():
                raise OtherWayError(f"it goes on with {func}")
            return op(), None
        node, place = self._flag
        before = len(self.record.get(node, ()))
        result, known = super().run(func, arguments, op)
        if self._node == node and before == place < len(self.record.get(node, ())):
            self._is_past = True
            result = not result
        return result, known


def _is_written_out() -> bool:
    """Tell whether a tensor is being made text of."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != "torch._tensor_str":
        frame = frame.f_back
    return frame is not None


class ValueReader:
    """Gives fake tensors of the shapes on record, and the numbers on record, where a fake run would end.

    Args:
        record: what one run has found.
        mode: the mode of the fake tensors.
        finds: how many places are found by all that looks for places, where not as many as on record.
    """

    def __init__(self, record: ValueRecord, mode: FakeTensorMode, finds: int | None = None) -> None:
        self._record = record
        self._mode = mode
        self._finds = finds
        self._left: Iterator[tuple[str, Any]] = iter(())

    def begin(self, node: str) -> None:
        """Say which node is at work from now on."""
        self._left = iter(self._record.get(node, ()))

    def run(self, func: OpOverload, arguments: Mapping[str, Any], op: Callable[[], Any]) -> tuple[Any, Any]:
        """Run an op, or take its result from the record."""
        if not depends_on_values(func, arguments):
            return op(), None
        if not func._schema.returns[0].type.isSubtypeOf(torch._C.TensorType.get()) and _is_constant(arguments):
            return op(), None  # a number computed from literals alone, whatever the inputs are
        # What a module has computed once and kept is on record, but not computed again.
        known = next((found for name, found in self._left if name == func.name()), None)
        if known is None:
            return op(), None  # which says what is wrong
        if isinstance(known, Check):
            return known.flag, known
        if self._finds is not None:
            known = _as_many(func, known, self._finds)
        with self._mode:
            if func in _PACKING:
                # Computed anew in a replay: the lengths tell, whatever else there is in a sequence.
                return _packing(func, arguments, *known), None
            return (func(arguments["self"], known) if func is aten.index.Tensor else _fakes(known)), known


def _positions(indices: Sequence[Tensor | None], never_empty: bool) -> list[Tensor | None]:
    """Return the indices of a look-up with the positions where masks are true in the place of the masks."""
    result: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype not in _MASKS:
            result.append(index if index is None else index.clone())
            continue
        found = index.nonzero()
        if never_empty and len(found) == 0 and index.numel() > 0:
            found = found.new_zeros(1, index.dim())
        result += found.unbind(1)
    return result


def _as_many(func: OpOverload, known: Any, count: int) -> Any:
    """Return what would be on record had another number of places been found."""
    if func is aten.index.Tensor:
        return [None if index is None else index.new_zeros(count) for index in known]
    if func in (aten.nonzero.default, aten.masked_select.default) or func.namespace == "torchvision":
        return known.new_zeros(count, *known.shape[1:])
    return known


@dataclass(frozen=True)
class _Packing:
    """How an op makes rows of sequences or sequences of rows: the operand, how many of its dims go, how many come."""

    operand: str
    gone: int
    made: int


_PACKING = {
    aten._pack_padded_sequence.default: _Packing("input", 2, 1),
    torch.ops.fxwidth.pad_packed_sequence.default: _Packing("data", 1, 2),
}


def _packing(func: OpOverload, arguments: Mapping[str, Any], sizes: Sequence[int], counts: Tensor) -> list[Tensor]:
    """Return fakes of what an op makes that packs or pads: the rows of an operand in another order, and counts."""
    rows = arguments[_PACKING[func].operand]
    return [rows.new_empty(*sizes, *rows.shape[_PACKING[func].gone :]), _fakes(counts)]


def depends_on_values(func: OpOverload, arguments: Mapping[str, Any]) -> bool:
    """Tell whether the shape of an op's result, or the number it returns, depends on the values of its operands."""
    if func.namespace not in ("aten", "prims", "fxwidth"):
        return _fails_on_fakes(func, arguments)
    if func in _PACKING:
        return True
    if not any(tag in func.tags for tag in _TAGS):
        return False
    if "indices" in arguments and isinstance(arguments["indices"], (list, tuple)):
        # Looking up by positions gives as many as there are positions; only a mask must be counted.
        return any(index is not None and index.dtype in _MASKS for index in arguments["indices"])
    return arguments.get("output_size") is None


_known: dict[OpOverload, bool] = {}


def _fails_on_fakes(func: OpOverload, arguments: Mapping[str, Any]) -> bool:
    """Tell whether an op of another library cannot be run on fake tensors for want of values."""
    if func not in _known:
        with unheeded(), warnings.catch_warnings(action="ignore"), _own_mode(arguments) as mode:
            operands = dict(arguments) if mode is None else _fakes(dict(arguments))
            try:
                func(**operands)
            except VALUE_ERRORS:
                _known[func] = True
            except Exception:
                return False  # it will fail for another reason
            else:
                _known[func] = False
    return _known[func]


def _own_mode(arguments: Mapping[str, Any]) -> AbstractContextManager[FakeTensorMode | None]:
    """Return a mode for operands that are real; fakes have theirs."""
    any_fake = any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves(dict(arguments)))
    return nullcontext() if any_fake else FakeTensorMode()


def _fakes(value: Any) -> Any:
    """Return a nested value with new fake tensors of the mode at work in the place of real ones."""
    return pytree.tree_map(
        lambda leaf: (
            torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
            if isinstance(leaf, Tensor)
            else leaf
        ),
        value,
    )


def _is_constant(arguments: Mapping[str, Any]) -> bool:
    return all(getattr(leaf, "constant", None) is not None for leaf in pytree.tree_leaves(dict(arguments)))
