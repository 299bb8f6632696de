"""Groups whose channels are only moved, mixed over positions and added on their way: any basis is as good as theirs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload

from fxwidth.analysis.result import Analysis
from fxwidth.analysis.roles import Role
from fxwidth.axes.factors import Factor
from fxwidth.axes.index_maps import Indices
from fxwidth.axes.positions import channel_positions
from fxwidth.bases.activation_products import Product, product_places, products_over
from fxwidth.bases.channel_provenance import Origins, Place, origins
from fxwidth.bases.foldable_norms import InnerNorm, inner_norms
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.memo import per_graph
from fxwidth.recording.tape import OpCall, storage_of
from fxwidth.rules import op_families
from fxwidth.rules.family_table import family_of, is_arithmetic, is_move, running_norm
from fxwidth.rules.op_families import Arithmetic, Attention, Convolution, Move
from fxwidth.weights.readers import wiring_of
from fxwidth.weights.reparametrised import normed_weights
from fxwidth.weights.shared_readers import ReaderSet, reader_sets

# Movements of channels without changing them.
_MOVES = (Move.COPY, Move.RESHAPE, Move.PERMUTATION, Move.UNIT_DIMS, Move.EXPANSION, Move.PART, Move.SPLIT)


@dataclass(frozen=True, eq=False)
class ReadingView:
    """One that reads the channels of a basis, and where it has each channel of each head, [channels, heads]."""

    readers: ReaderSet
    positions: Indices


@dataclass(frozen=True, eq=False)
class Basis:
    """Channels that go the same way, and all places that go with a change of their basis.

    Attributes:
        places: the parameters; heads have bases of their own.
        views: all that read the channels.
        product: or what they are summed up in.
    """

    places: tuple[Place, ...]
    views: tuple[ReadingView, ...] = ()
    product: Product | None = None


@dataclass(frozen=True)
class LinearGroup:
    """A group whose channels go from parameters to their consumers by ops that commute with any change of basis.

    Attributes:
        bases: several where a width stands for as many channels of each, as where one layer makes queries, keys and
            values.
        norms: batch norms right behind writers, which must take on the new channels' scales.
    """

    bases: tuple[Basis, ...]
    norms: tuple[InnerNorm, ...]


@per_graph
def linear_group(width_graph: WidthGraph, group: ChannelGroup) -> LinearGroup | None:
    """Return where the channels of a group are, if any basis is as good as the one they have; else None."""
    analysis, factor, wiring = width_graph.analysis, group.factor, wiring_of(width_graph)
    calls = _calls_by_factor(analysis).get(factor, [])
    # Whoever reads an output can leave channels out, and knows nothing of a change of basis.
    if group.name in width_graph.followed:
        return None
    if not _is_plain(analysis, group) or not all(_is_linear(analysis, call, factor) for call in calls):
        return None
    if any(_is_seen_elsewhere(call, calls) for call in calls if call.func._schema.is_mutable):
        return None
    sets = [one for one in reader_sets(wiring) if factor in analysis.space.factors(one.first.axis)]
    if any(len(one.readers) != 1 or not one.foldable for one in sets):
        return None
    scales = _scales(analysis, calls)
    sites = [site for site in group.sites if site.parameter not in scales]
    found = [origins(analysis, factor, site.parameter, site.dim) for site in sites]
    paths = [path for path in found if path is not None]
    norms = inner_norms(wiring, calls, {path.parameter: path for path in paths})
    if norms is None or len(paths) < len(found):
        return None
    vectors = {name for norm in norms for name in norm.vectors}
    if any(site.role == Role.PER_CHANNEL and site.parameter not in vectors for site in group.sites):
        return None
    bases = [_seen_basis(analysis, factor, one, paths) for one in sets]
    for call, contraction in products_over(width_graph, factor, calls):
        summed = product_places(analysis, call, contraction, paths)
        bases.append(None if summed is None else Basis(summed[0], product=summed[1]))
    whole = [basis for basis in bases if basis is not None]
    if not bases or len(whole) < len(bases):
        return None
    merged = _merged(whole)
    return LinearGroup(tuple(merged), tuple(norms)) if _cover(analysis, group, merged, norms) else None


def linear_products(width_graph: WidthGraph) -> Iterator[Product]:
    """Yield the products over the channels of linear groups."""
    for group in width_graph.free:
        found = linear_group(width_graph, group)
        yield from (basis.product for basis in (found.bases if found else ()) if basis.product is not None)


def linear_norms(width_graph: WidthGraph) -> Iterator[InnerNorm]:
    """Yield the batch norms that are part of the way of a linear group."""
    for group in width_graph.free:
        found = linear_group(width_graph, group)
        yield from found.norms if found else ()


def _is_plain(analysis: Analysis, group: ChannelGroup) -> bool:
    """Tell whether nothing but the ops on its way can keep a group from another basis."""
    if group.pinned is not None or group.mixed is not None:
        return False
    names = {site.parameter for site in group.sites}
    dtypes = {analysis.parameters[name].tensor.dtype for name in names}
    return not names & set(normed_weights(analysis)) and dtypes <= {torch.float32, torch.float64}


@per_graph
def _calls_by_factor(analysis: Analysis) -> dict[Factor, list[OpCall]]:
    """Return the ops that take or make each factor, in order."""
    result: dict[Factor, list[OpCall]] = {}
    for call in analysis.calls:
        axes = [axis for own in (*call.axes.values(), *call.output_axes) for axis in own]
        for factor in dict.fromkeys(factor for axis in axes for factor in analysis.space.factors(axis)):
            result.setdefault(factor, []).append(call)
    return result


def _scales(analysis: Analysis, calls: Sequence[OpCall]) -> set[str]:
    """Return the parameters by which batch norms scale channels, whose way is not followed."""
    norms = [(call, norm) for call in calls if (norm := running_norm(call.func)) is not None]
    tensors = {call.arguments.get(name) for call, norm in norms for name in ("weight", norm.variance)}
    return {name for name, entry in analysis.parameters.items() if entry.fake in tensors}


def _is_linear(analysis: Analysis, call: OpCall, factor: Factor) -> bool:
    """Tell whether an op commutes with every change of basis of a factor, or sums over it; or is a batch norm."""
    dims = {tensor: _dims(analysis, call, tensor, factor) for tensor in call.inputs}
    owners = [tensor for tensor in call.inputs if dims[tensor]]
    if not owners or any(len(dims[tensor]) != 1 for tensor in owners):
        return False
    if is_move(call.func, *_MOVES):
        return True
    if running_norm(call.func) is not None:
        return dims[call.arguments["input"]] == [1]
    if is_arithmetic(call.func, Arithmetic.PRODUCT, Arithmetic.QUOTIENT):
        return call.arguments["self"] is owners[0] and isinstance(call.arguments["other"], (int, float))
    if is_arithmetic(call.func, Arithmetic.SUM):
        return len(owners) == 2 and call.arguments.get("alpha", 1) == 1
    if not _is_linear_product(call.func) or not call.contractions:
        return False
    contraction = call.contractions[0]
    left, right = (dims.get(tensor, []) for tensor in (contraction.left, contraction.right))
    if not left and not right:
        return True
    if left and right:
        # Only the sum over the factor itself goes with a change of basis, and only the other side can undo it.
        return left[0] in contraction.left_dims and right[0] in contraction.right_dims
    # Of queries and keys softmax is taken; values are only mixed over positions.
    return not isinstance(family_of(call.func), Attention)


def _is_linear_product(func: OpOverload) -> bool:
    match family_of(func):
        case op_families.Product() as product:
            return product.is_of_matrices
        case Convolution() | Attention():
            # Kernels of attention give statistics of the softmax too.
            return len(func._schema.returns) == 1
        case _:
            return False


def _is_seen_elsewhere(write: OpCall, calls: Sequence[OpCall]) -> bool:
    """Tell whether what an op writes to is read later by another name that it had before."""
    memory = {storage_of(output) for output in write.outputs}
    results = set(write.outputs)
    before = [tensor for call in calls if call.index < write.index for tensor in (*call.inputs, *call.outputs)]
    names = {tensor for tensor in before if storage_of(tensor) in memory} - results
    return any(tensor in names for call in calls if call.index > write.index for tensor in call.inputs)


def _dims(analysis: Analysis, call: OpCall, tensor: Tensor, factor: Factor) -> list[int]:
    axes = call.axes.get(tensor, ())
    return [dim for dim, axis in enumerate(axes) for own in analysis.space.factors(axis) if own is factor]


def _seen_basis(analysis: Analysis, factor: Factor, readers: ReaderSet, paths: Sequence[Origins]) -> Basis | None:
    reader = readers.first
    if reader.groups != 1 or reader.minor != 1:
        return None
    channels = np.concatenate(channel_positions(analysis.space, reader.axis, factor), 1)
    source, weight = reader.call.arguments[reader.source], reader.call.arguments[reader.weight]
    places = []
    for path in paths:
        for tensor, dim, inverse in ((source, reader.source_dim, False), (weight, reader.weight_dim, True)):
            if tensor not in path.of:
                continue
            along = path.along(tensor, dim)
            if along is None:
                return None
            places.append(Place(path.parameter, path.dim, along.numpy()[channels], inverse))
    return Basis(tuple(places), (ReadingView(readers, channels),))


def _merged(bases: Sequence[Basis]) -> list[Basis]:
    """Put together what reads channels of the same writers: it has one basis for all."""
    result: list[Basis] = []
    for basis in bases:
        own = {place.identity for place in basis.places}
        same = [one for one in result if basis.views and one.views and own & {place.identity for place in one.places}]
        together = [*same, basis]
        places = {place.identity: place for one in together for place in one.places}
        views = tuple(view for one in together for view in one.views)
        result = [one for one in result if one not in same]
        result.append(Basis(tuple(places.values()), views, basis.product))
    return result


def _cover(analysis: Analysis, group: ChannelGroup, bases: Sequence[Basis], norms: Sequence[InnerNorm]) -> bool:
    """Tell whether all entries of a group's parameters are in a basis, each in one head of one of them."""
    found: dict[tuple[str, int], list[Indices]] = {}
    for basis in bases:
        for place in basis.places:
            found.setdefault((place.parameter, place.dim), []).append(place.positions.reshape(-1))
    for norm in norms:
        # What scales a channel is where its mean is.
        found |= {(name, 0): found.get((norm.mean, 0), []) for name in norm.scales}
    for site in group.sites:
        axis = analysis.parameters[site.parameter].axes[site.dim]
        wanted = np.concatenate([own.reshape(-1) for own in channel_positions(analysis.space, axis, group.factor)])
        own = np.concatenate([np.zeros(0, dtype=np.int64), *found.get((site.parameter, site.dim), [])])
        if not np.array_equal(np.sort(own), np.sort(wanted)):
            return False
    return True
