"""What a network does with an integer input: what it looks up by it, compares it with, and reckons with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxwidth.analysis.result import Analysis
from fxwidth.recording.tape import OpCall, storage_of
from fxwidth.rules.family_table import as_family
from fxwidth.rules.op_families import LookUp

# Ops that look up entries beside those of the family of look-ups: those that write to them.
_WRITTEN = frozenset(
    {"scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill", "index_reduce"}
)
_WRITTEN_BY_LISTS = frozenset({"index_put", "_unsafe_index_put"})
_CLASSES = frozenset({"nll_loss_forward", "nll_loss2d_forward"})
_BAGS = frozenset({"_embedding_bag", "_embedding_bag_forward_only"})
_COMPARISONS = frozenset({"lt", "le", "gt", "ge"})
_EQUALITIES = frozenset({"eq", "ne"})
# Ops whose results are entries of their operands, or within bounds of their own: what looks up by them looks up by the
# input as far as its range is concerned.
_SAME_RANGE = frozenset(
    {
        "_to_copy",
        "_unsafe_view",
        "alias",
        "amax",
        "amin",
        "cat",
        "clamp",
        "clamp_max",
        "clamp_min",
        "clone",
        "constant_pad_nd",
        "contiguous",
        "copy",
        "cummax",
        "cummin",
        "detach",
        "expand",
        "fill",
        "flip",
        "fmod",
        "gather",
        "index",
        "index_select",
        "lift_fresh",
        "masked_fill",
        "max",
        "maximum",
        "min",
        "minimum",
        "remainder",
        "repeat",
        "reshape",
        "roll",
        "select_scatter",
        "slice_scatter",
        "sort",
        "split",
        "stack",
        "topk",
        "unbind",
        "view",
        "where",
    }
)
# Ops that tell where values are: as their only result, or behind these.
_POSITIONS = frozenset({"argmax", "argmin", "argsort"})
_WITH_POSITIONS = frozenset({"sort", "topk", "max", "min", "cummax", "cummin"})


@dataclass
class IntegerUses:
    """What is done with an integer input, or with what is made of it.

    Attributes:
        bounds: the least and the largest value that each look-up or comparison with a range allows.
        shifted: likewise, of sums of the input and numbers that are known: for all places, or for each.
        of_changed: whether anything is looked up by what else is reckoned from it, of whose range nothing is known.
        bags: of the bags whose first entries it tells: how many entries there are, and whether it tells their end too.
        numeric: whether it becomes a number that is reckoned with.
        compared: whether it is compared with a number, or taken for a truth value.
        unknown: whether an op takes it that may do anything with it.
    """

    bounds: list[tuple[int, int]] = field(default_factory=list)
    shifted: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    of_changed: bool = False
    bags: tuple[int, bool] | None = None
    numeric: bool = False
    compared: bool = False
    unknown: bool = False

    @property
    def is_lookup_alone(self) -> bool:
        """Tell whether entries are looked up by it, and nothing else is done with it."""
        others = self.shifted or self.of_changed or self.bags or self.numeric or self.compared or self.unknown
        return bool(self.bounds) and not others


def uses_of(analysis: Analysis, example: Tensor) -> IntegerUses:
    """Follow an integer input along the tape to all that uses it.

    Args:
        analysis: the graph.
        example: the tensor that stands for the input on the tape.
    """
    return _Follower(analysis, example).uses


class _Follower:
    """By memory: what holds values of the input, unchanged or not; and what holds ranges of whole numbers."""

    def __init__(self, analysis: Analysis, example: Tensor) -> None:
        self.uses = IntegerUses()
        self._unchanged = {storage_of(example): True}
        self._ranges: dict[int, tuple[int, int]] = {}
        self._example = example
        # What was added to values of the input, and the buffers of whole numbers that may be.
        self._added: dict[int, Tensor] = {}
        self._known: dict[Tensor, Tensor] = {}
        for entry in analysis.parameters.values():
            tensor = entry.tensor
            if _is_integer(tensor) and tensor.numel() and not tensor.is_meta:
                low, high = tensor.aminmax()
                self._ranges[storage_of(entry.fake)] = int(low), int(high)
                self._known[entry.fake] = tensor
        for call in analysis.calls:
            taken = [tensor for tensor in call.inputs if self._holds(tensor)]
            if taken:
                self._take(call, taken)
            else:
                self._pass_range_on(call)

    def _holds(self, tensor: Tensor) -> bool:
        return _is_integer(tensor) and storage_of(tensor) in self._unchanged

    def _pass_range_on(self, call: OpCall) -> None:
        if call.name == "arange" and _is_integer(call.outputs[0]) and call.arguments.get("step") in (None, 1):
            start = int(call.arguments.get("start") or 0)
            self._ranges[storage_of(call.outputs[0])] = start, start + call.outputs[0].numel() - 1
        elif call.name in _SAME_RANGE and len(call.inputs) == 1 and storage_of(call.inputs[0]) in self._ranges:
            known = self._ranges[storage_of(call.inputs[0])]
            self._ranges |= {storage_of(output): known for output in call.outputs if _is_integer(output)}

    def _take(self, call: OpCall, taken: list[Tensor]) -> None:
        """Note what an op does with values of the input, and follow what it makes of them."""
        unchanged = all(self._unchanged[storage_of(tensor)] for tensor in taken)
        sizes = _looked_up(call, set(taken))
        if sizes is not None:
            self._look_up(call, taken, sizes, unchanged)
            if call.name not in _SAME_RANGE:
                return
        if call.func.namespace not in ("aten", "prims"):
            self.uses.unknown = True
        elif call.name in _COMPARISONS | _EQUALITIES:
            self._compare(call, unchanged)
        elif any(output.dtype == torch.bool for output in call.outputs):
            self.uses.compared = True
        elif not call.outputs:
            self.uses.unknown = True
        if call.name not in _POSITIONS:
            self._pass_on(call, taken, unchanged, is_table=bool(sizes))

    def _look_up(self, call: OpCall, taken: list[Tensor], sizes: list[int], unchanged: bool) -> None:
        """Note a look-up by values of the input, or by what was made of them, in dims of some sizes."""
        added = self._added.get(storage_of(taken[0])) if len(taken) == 1 else None
        if unchanged:
            self.uses.bounds += [(0, size - 1) for size in sizes]
        elif added is not None:
            self.uses.shifted += [(-added, size - 1 - added) for size in sizes]
        else:
            self.uses.of_changed |= bool(sizes)
        if call.name in _BAGS and self._holds_offsets(call):
            self.uses.bags = call.arguments["indices"].numel(), bool(call.arguments["include_last_offset"])

    def _pass_on(self, call: OpCall, taken: list[Tensor], unchanged: bool, *, is_table: bool) -> None:
        """Follow what an op makes of values of the input, or looks up by them in a table."""
        for output in call.outputs[:1] if call.name in _WITH_POSITIONS else call.outputs:
            if _is_integer(output):
                is_view = any(storage_of(output) == storage_of(tensor) for tensor in taken)
                same = unchanged and (call.name in _SAME_RANGE or (is_view and not call.func._schema.is_mutable))
                self._unchanged[storage_of(output)] = same
                added = self._sum(call, taken) if unchanged else None
                if added is not None:
                    self._added[storage_of(output)] = added
            elif output.dtype != torch.bool and not is_table:
                self.uses.numeric = True

    def _sum(self, call: OpCall, taken: list[Tensor]) -> Tensor | None:
        """Return what an op adds to the input as it is, where that is known."""
        if (
            call.name not in ("add", "sub")
            or call.arguments.get("alpha", 1) != 1
            or len(taken) > 1
            or taken[0] is not self._example
        ):
            return None
        first, second = call.arguments["self"], call.arguments["other"]
        other = second if first is self._example else first
        known = torch.tensor(other, device="cpu") if isinstance(other, int) else self._known.get(other)
        shape = self._example.shape
        if known is None or call.outputs[0].shape != shape or (known.dim() == len(shape) and len(known) > 1):
            return None
        if call.name == "sub":
            return -known.cpu() if other is second else None
        return known.cpu()

    def _holds_offsets(self, call: OpCall) -> bool:
        offsets = call.arguments.get("offsets")
        return offsets is not None and self._holds(offsets)

    def _compare(self, call: OpCall, unchanged: bool) -> None:
        """Note a comparison: with one of a range, as where classes or lengths are told, each outcome is wanted."""
        known = [self._ranges[storage_of(other)] for other in call.inputs if storage_of(other) in self._ranges]
        if not (known and unchanged):
            self.uses.compared = True
        elif call.name in _EQUALITIES:
            self.uses.bounds.append(known[0])
        else:
            # Positions below a length: of one entry at least, of all at most.
            self.uses.bounds.append((known[0][0] + 1, known[0][1] + 1))


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _looked_up(call: OpCall, taken: set[Tensor]) -> list[int] | None:
    """Return the sizes of the dims that an op numbers by some tensors; None where it numbers none by them."""
    if call.name in _CLASSES:
        scores = call.arguments["self"]
        return [scores.shape[min(1, scores.dim() - 1)]] if call.arguments["target"] in taken else None
    names = _table_and_index(call)
    if names is None:
        return None
    table, numbers = (call.arguments[name] for name in names)
    if isinstance(numbers, Sequence):
        pairs = zip(table.shape, numbers, strict=False)
        return [size for size, index in pairs if index is not None and index in taken] or None
    if numbers in taken:
        return [table.shape[call.arguments.get("dim", 0)] if table.dim() else 1]
    return [] if call.name in _BAGS else None


def _table_and_index(call: OpCall) -> tuple[str, str] | None:
    """Return by which names an op takes what it looks up entries of, and their numbers; None if it looks up none."""
    family = as_family(call.func, LookUp)
    if family is not None:
        return family.table, family.index
    if call.name in _BAGS:
        return "weight", "indices"
    if call.name in _WRITTEN:
        return "self", "index"
    return ("self", "indices") if call.name in _WRITTEN_BY_LISTS else None
