"""Which tensors of a run are worth measuring, and how one of them is turned into numbers per channel."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from fxwidth.analysis.result import Analysis
from fxwidth.axes.factors import Axis
from fxwidth.bases.activation_products import Side
from fxwidth.bases.linear_groups import linear_products
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.memo import per_graph
from fxwidth.recording.tape import OpCall, storage_of
from fxwidth.rules.copies import channel_copies
from fxwidth.runtime.finiteness import accumulation_dtype
from fxwidth.weights.readers import argument_name, wiring_of
from fxwidth.weights.shared_readers import reader_sets

NORMS = {"layer norm": True, "RMS norm": False}

Key = tuple[int, str]


class Measure(StrEnum):
    """What is measured: both moments of a contracted dim, its squares, products in heads, or what a norm divides by."""

    MOMENT = "moment"
    SQUARES = "squares"
    PRODUCTS = "products"
    DEVIATIONS = "deviations"


@dataclass(frozen=True)
class Probe:
    """One tensor argument of one op, to be measured.

    Attributes:
        call: the op on the analysis tape.
        argument: the name of its argument.
        measure: what is measured.
        dims: the dims kept apart, counted from the front; all others are samples.
        minor: how many neighbouring positions of the dim belong to one channel and count as samples.
        centred: whether the mean over the dims is taken off first (layer norm).
        keys: every (op index, argument) that the numbers are for.
        places: in how many places they are measured, to be taken together.
        side: how the heads of one side of a product are told apart, for products.
        period: after how many positions of the dim its channels begin again, in groups that are samples too; 0 for
            never. A convolution by weights of each sample's own has as many groups as samples.
    """

    call: OpCall
    argument: str
    measure: Measure
    dims: tuple[int, ...]
    minor: int
    centred: bool
    keys: tuple[Key, ...]
    places: int = 1
    side: Side | None = None
    period: int = 0

    def rows(self, tensor: Tensor, limit: int) -> Tensor:
        """Return the vectors of channels in a tensor, [rows, channels]; evenly spread ones where there are too many."""
        moved = tensor.movedim(self.dims[0], -1)
        if self.minor > 1:
            moved = moved.unflatten(-1, (-1, self.minor)).transpose(-1, -2)
        count = moved.numel() // max(1, moved.shape[-1])
        if count <= limit:
            return moved.reshape(count, moved.shape[-1])
        # One row at a random place of each stretch: an even stride may fall on the same image column every time.
        generator = torch.Generator().manual_seed(count)
        within = torch.rand(limit, generator=generator, dtype=torch.float64, device="cpu")
        places = (torch.arange(limit, device="cpu") + within) * (count / limit)
        flat = places.long().clamp_max(count - 1).to(tensor.device)
        return moved[torch.unravel_index(flat, moved.shape[:-1])]

    def squares(self, tensor: Tensor) -> tuple[Tensor, int]:
        """Return the sum of squares along the dims, or of products in each head, and of how many terms each is one."""
        tensor = tensor.abs() if tensor.is_complex() else tensor
        if self.side is not None:
            heads = self.side.rows(tensor.to(accumulation_dtype(tensor)))
            return heads.mT @ heads, heads.shape[1]
        wide = tensor.to(accumulation_dtype(tensor))
        if self.period:
            wide = wide.movedim(self.dims[0], -1).reshape(-1, self.period)
            return wide.square().sum(0), len(wide)
        others = [dim for dim in range(tensor.dim()) if dim not in self.dims]
        if self.centred:
            wide = wide - wide.mean(self.dims, keepdim=True)
        count = tensor.numel()
        for dim in self.dims:
            count //= tensor.shape[dim]
        return wide.square().sum(others) if others else wide.square(), count


@per_graph
def find_probes(width_graph: WidthGraph) -> list[Probe]:
    """Return what must be measured to shrink any group of a width graph."""
    return [*_moments(width_graph), *_squares(width_graph), *_products(width_graph), *_deviations(width_graph)]


def resizable(analysis: Analysis, axes: Sequence[Axis]) -> bool:
    """Tell whether any of the axes can change; the batch can not."""
    return any(not factor.is_batch for axis in axes for factor in analysis.space.factors(axis))


def _holds_batch(analysis: Analysis, axis: Axis) -> bool:
    return any(factor.is_batch for factor in analysis.space.factors(axis))


def _moments(width_graph: WidthGraph) -> Iterator[Probe]:
    """Yield the places where readers see their channels; those of one weight, as in the steps of an LSTM, together."""
    analysis = width_graph.analysis
    writes = _writes(analysis)
    first: dict[object, Probe] = {}
    keys_of: dict[tuple[object, ...], list[Key]] = {}
    for readers in reader_sets(wiring_of(width_graph)):
        if not resizable(analysis, [readers.first.axis]) or _holds_batch(analysis, readers.first.axis):
            continue  # with as many groups as samples, each sees its own sample: no batch is like another
        places: dict[object, None] = {}
        for reader in readers.readers:
            source = reader.call.arguments[reader.source]
            place = _place(reader.call, source, reader.source_dim, reader.minor, writes)
            places[place] = None
            dims = (reader.source_dim,)
            first.setdefault(place, Probe(reader.call, reader.source, Measure.MOMENT, dims, reader.minor, False, ()))
        keys_of.setdefault(tuple(places), []).extend(reader.key for reader in readers.readers)
    for call in channel_copies(analysis.calls):
        # Which of the kept channels is nearest to one that goes is a question of the same moments.
        source = call.arguments["self"]
        dim = call.arguments["dim"] % source.dim()
        if width_graph.roles.is_parameter(source) or not resizable(analysis, [call.axes[source][dim]]):
            continue
        place = _place(call, source, dim, 1, writes)
        first.setdefault(place, Probe(call, "self", Measure.MOMENT, (dim,), 1, False, ()))
        keys_of.setdefault((place,), []).append((call.index, "self"))
    for together, keys in keys_of.items():
        for place in together:
            yield replace(first[place], keys=tuple(dict.fromkeys(keys)), places=len(together))


def _place(call: OpCall, tensor: Tensor, dim: int, minor: int, writes: dict[int, list[int]]) -> object:
    """Return what tells the values that a call sees from others: query, key and value may read one activation."""
    storage = storage_of(tensor)
    # The same memory, not written to in between.
    version = bisect_left(writes.get(storage, []), call.index)
    layout = tensor.storage_offset(), tensor.shape, tensor.stride(), dim, minor
    return storage, version, layout


def _writes(analysis: Analysis) -> dict[int, list[int]]:
    """Return, by memory, the indices of the ops that write to it in place."""
    result: dict[int, list[int]] = {}
    for call in analysis.calls:
        if not call.func._schema.is_mutable:
            continue
        for parameter in call.func._schema.arguments:
            value = call.arguments[parameter.name]
            if parameter.alias_info is not None and parameter.alias_info.is_write and isinstance(value, Tensor):
                result.setdefault(storage_of(value), []).append(call.index)
    return result


def _squares(width_graph: WidthGraph) -> Iterator[Probe]:
    analysis, roles = width_graph.analysis, width_graph.roles
    for call in analysis.calls:
        for contraction in roles.activation_products(call):
            sides = ((contraction.left, contraction.left_dims), (contraction.right, contraction.right_dims))
            groups = call.arguments.get("groups", 1)
            period = contraction.left.shape[1] // groups if groups > 1 else 0
            for tensor, dims in sides:
                axis = call.axes[tensor][dims[0]]
                if len(dims) == 1 and resizable(analysis, [axis]) and (period or not _holds_batch(analysis, axis)):
                    name = argument_name(call, tensor)
                    yield Probe(call, name, Measure.SQUARES, dims, 1, False, ((call.index, name),), period=period)


def _products(width_graph: WidthGraph) -> Iterator[Probe]:
    for product in linear_products(width_graph):
        for side in (product.left, product.right):
            keys = ((product.call.index, side.argument),)
            yield Probe(product.call, side.argument, Measure.PRODUCTS, (side.dim,), 1, False, keys, side=side)


def _deviations(width_graph: WidthGraph) -> Iterator[Probe]:
    analysis = width_graph.analysis
    for call in analysis.calls:
        reductions = [reduction for reduction in call.reductions if reduction.kind in NORMS]
        if not reductions:
            continue
        tensor, dims = reductions[0].tensor, tuple(reduction.dim for reduction in reductions)
        if resizable(analysis, [call.axes[tensor][dim] for dim in dims]):
            name, centred = argument_name(call, tensor), NORMS[reductions[0].kind]
            yield Probe(call, name, Measure.DEVIATIONS, dims, 1, centred, ((call.index, name),))
