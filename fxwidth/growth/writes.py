"""How new channels pass writes to places that index tensors or masks tell."""

from __future__ import annotations

import torch
from torch import Tensor

from fxwidth.growth.call_view import CallView
from fxwidth.growth.movement import check_index
from fxwidth.growth.states import ALL_ZERO, CONSTANT, State, of_number, passed
from fxwidth.growth.transfers import Result, transfer
from fxwidth.rules.indexing import MASKS

aten = torch.ops.aten

_SUMS = ("add", "sum", "mean")


@transfer(aten.index_add, aten.index_copy, aten.index_reduce)
def _index_add(c: CallView) -> Result:
    return [_written(c, c.states("source"), c.call.arguments.get("reduce", "add"))]


@transfer(aten.index_fill)
def _index_fill(c: CallView) -> Result:
    filled = CONSTANT if isinstance(c["value"], Tensor) else of_number(c["value"])
    return [_written(c, [filled] * len(c.axes("self")), "add")]


@transfer(aten.scatter, aten.scatter_add, aten.scatter_reduce)
def _scatter(c: CallView) -> Result:
    check_index(c, c["index"])
    places = c.states("index")
    source = c.states("src") if "src" in c else [of_number(c["value"])] * len(places)
    row = _written(c, source, c.call.arguments.get("reduce", "add"))
    return [[state if own & State.UNIFORM else state & State.ZERO for state, own in zip(row, places, strict=True)]]


def _written(c: CallView, source: list[State], reduce: str) -> list[State]:
    """Return what holds for what is there and for what is written, as far as their sum or their product has it."""
    kept = ALL_ZERO if reduce in _SUMS else State.ZERO
    return [passed(own & other, kept) for own, other in zip(c.states("self"), source, strict=True)]


@transfer(aten.segment_reduce)
def _segment_reduce(c: CallView) -> Result:
    if c["reduce"] != "sum":
        c.refuse("it may have no finite result for a segment without rows, and zero times that is not zero")
    rows, *states = c.states("data")
    begun = of_number(c["initial"] or 0)
    return [[rows, *(state & begun for state in states)]]


@transfer(aten.index_put, aten._unsafe_index_put)
def _index_put(c: CallView) -> Result:
    """Pair the dims in which no index tells places with those of the values, broadcast to a look-up of these."""
    own, values, told = c.states("self"), c.states("values"), _told(c)
    rest = [dim for dim in range(len(own)) if dim not in told]
    # Dims that stand together are replaced in place, others go to the front.
    dims = list(told)
    behind = sum(dim > dims[-1] for dim in rest) if dims == list(range(dims[0], dims[-1] + 1)) else len(rest)
    found = max(1 if index.dtype in MASKS else index.dim() for index in c["indices"] if index is not None)

    def written(dim: int) -> State:
        if dim in told:
            # The same for all places under a mask; where numbers tell places, the dim is pinned.
            return own[dim] & (CONSTANT if told[dim] & State.UNIFORM else State.ANY)
        from_end = len(rest) - rest.index(dim)
        from_end += found if from_end > behind else 0
        return own[dim] & (values[-from_end] if from_end <= len(values) else CONSTANT)

    return [[written(dim) for dim in range(len(own))]]


def _told(c: CallView) -> dict[int, State]:
    """Return the dims in which indices tell places, with the states of masks; numbers have no new ones."""
    told: dict[int, State] = {}
    dim = 0
    for index in c["indices"]:
        own = [CONSTANT] if index is None or index.dtype not in MASKS else c.states(index)
        if index is not None:
            told |= dict(enumerate(own, dim))
        dim += len(own)
    return told


@transfer(aten.masked_scatter)
def _masked_scatter(c: CallView) -> Result:
    """Pair rows of what is written with those of what is there, from the last dim on."""
    own, mask, source = c.states("self"), c.states("mask"), c.states("source")

    def written(from_end: int) -> State:
        place = mask[-from_end] if from_end <= len(mask) else CONSTANT
        other = source[-from_end] if from_end <= len(source) else CONSTANT
        return own[-from_end] & other & (ALL_ZERO if place & State.UNIFORM else State.ZERO)

    return [[written(len(own) - dim) for dim in range(len(own))]]
