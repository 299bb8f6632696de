"""Groups whose channels are only moved, mixed over positions and added on their way: any basis is as good as theirs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from fxwidth.analysis import Analysis
from fxwidth.factors import Factor, axis_size, element_size
from fxwidth.groups import ChannelGroup, WidthGraph
from fxwidth.index_maps import Indices
from fxwidth.normed_weights import normed_weights
from fxwidth.occurrences import channel_positions
from fxwidth.origins import Origins, origins
from fxwidth.reader_sets import reader_sets
from fxwidth.readers import Reader, argument_name
from fxwidth.roles import Role
from fxwidth.tape import Contraction, OpCall

# Ops that move channels about without changing them, or all by one number.
_MOVES = frozenset(
    {
        "view", "_unsafe_view", "reshape", "transpose", "permute", "t", "unsqueeze", "squeeze", "clone", "contiguous",
        "alias", "detach", "expand", "select", "unbind", "split", "split_with_sizes", "slice",
    }
)  # fmt: skip
_SCALINGS = frozenset({"mul", "div"})
_PRODUCTS = frozenset({"mm", "addmm", "bmm", "convolution", "attention"})


@dataclass(frozen=True)
class Place:
    """Where a parameter holds the channels of a basis.

    Attributes:
        parameter: its name.
        dim: its dim.
        positions: the position of each channel of each head along the dim, [channels, heads].
        inverse: whether it goes with the inverse of what the others go with: it is multiplied with them.
    """

    parameter: str
    dim: int
    positions: Indices
    inverse: bool


@dataclass(frozen=True)
class Side:
    """One operand of a product: an activation of dims [*lead, tokens, channels], once the contracted one is last.

    Attributes:
        argument: under which name the op takes it.
        dim: the contracted dim.
        sizes: the parts that each leading dim is made of, major first; -1 for what grows with the batch.
        heads: which of all these parts tell heads apart.
        centred: whether what is common to the tokens of one sample makes no difference.
    """

    argument: str
    dim: int
    sizes: tuple[tuple[int, ...], ...]
    heads: tuple[int, ...]
    centred: bool

    def rows(self, tensor: Tensor) -> Tensor:
        """Return the vectors of channels of a tensor, [heads, rows, channels]."""
        moved = tensor.movedim(self.dim, -1)
        if self.centred:
            moved = moved - moved.mean(-2, keepdim=True)
        for dim, sizes in reversed([*enumerate(self.sizes)]):
            moved = moved.unflatten(dim, sizes)
        moved = moved.movedim(self.heads, tuple(range(len(self.heads))))
        return moved.reshape(prod(moved.shape[: len(self.heads)]), -1, moved.shape[-1])


@dataclass(frozen=True)
class Product:
    """A sum of products of two activations over the channels of each head, such as queries with keys."""

    call: OpCall
    left: Side
    right: Side


@dataclass(frozen=True)
class Basis:
    """Channels that have one end, and all places that go with a change of their basis.

    Attributes:
        places: the parameters; heads have bases of their own.
        end: the one that reads the channels, or the product that they are summed up in.
        seen: the position of each channel of each head in what a reader contracts, [channels, heads].
    """

    places: tuple[Place, ...]
    end: Reader | Product
    seen: Indices


@dataclass(frozen=True)
class LinearGroup:
    """A group whose channels go from parameters to their ends by ops that commute with any change of basis.

    Attributes:
        bases: one for each end: a width stands for as many channels of each, where one layer makes queries, keys and
            values.
    """

    bases: tuple[Basis, ...]


def linear_group(width_graph: WidthGraph, group: ChannelGroup) -> LinearGroup | None:
    """Return where the channels of a group are, if any basis is as good as the one they have; else None."""
    known = _GROUPS.setdefault(width_graph, {})
    if group.name not in known:
        known[group.name] = _find(width_graph, group)
    return known[group.name]


_GROUPS: WeakKeyDictionary[WidthGraph, dict[str, LinearGroup | None]] = WeakKeyDictionary()


def linear_products(width_graph: WidthGraph) -> Iterator[Product]:
    """Yield the products over the channels of linear groups."""
    for group in width_graph.free:
        found = linear_group(width_graph, group)
        yield from (basis.end for basis in (found.bases if found else ()) if isinstance(basis.end, Product))


def _find(width_graph: WidthGraph, group: ChannelGroup) -> LinearGroup | None:
    analysis, factor = width_graph.analysis, group.factor
    if group.pinned is not None or group.mixed is not None:
        return None
    names = {site.parameter for site in group.sites}
    if names & set(normed_weights(width_graph)) or any(site.role == Role.PER_CHANNEL for site in group.sites):
        return None
    if any(analysis.parameters[name].tensor.dtype not in (torch.float32, torch.float64) for name in names):
        return None
    sets = [one for one in reader_sets(width_graph) if factor in analysis.space.factors(one.first.axis)]
    if any(len(one.readers) != 1 or not one.foldable for one in sets):
        return None
    if not all(_is_linear(width_graph, call, factor) for call in analysis.calls):
        return None
    paths = []
    for site in group.sites:
        found = origins(analysis, factor, site.parameter, site.dim)
        if found is None:
            return None
        paths.append(found)
    bases = [_reader_basis(analysis, factor, one.first, paths) for one in sets]
    bases += [
        _product_basis(analysis, call, contraction, paths) for call, contraction in _products(width_graph, factor)
    ]
    whole = [basis for basis in bases if basis is not None]
    if not bases or len(whole) < len(bases) or not _cover(analysis, group, whole):
        return None
    return LinearGroup(tuple(whole))


def _is_linear(width_graph: WidthGraph, call: OpCall, factor: Factor) -> bool:
    """Tell whether an op commutes with every change of basis of a factor, or sums over it."""
    space = width_graph.analysis.space
    dims = {id(tensor): _dims(width_graph.analysis, call, tensor, factor) for tensor in call.inputs}
    owners = [tensor for tensor in call.inputs if dims[id(tensor)]]
    if not owners:
        return not any(factor in space.factors(axis) for axes in call.output_axes for axis in axes)
    if any(len(dims[id(tensor)]) != 1 for tensor in owners):
        return False
    if call.name in _MOVES:
        return True
    if call.name in _SCALINGS:
        return call.arguments["self"] is owners[0] and isinstance(call.arguments["other"], (int, float))
    if call.name == "add":
        return len(owners) == 2 and call.arguments.get("alpha", 1) == 1
    if call.name not in _PRODUCTS or not call.contractions:
        return False
    contraction = call.contractions[0]
    left, right = (dims.get(id(tensor), []) for tensor in (contraction.left, contraction.right))
    if not left and not right:
        return True
    if left and right:
        # Only the sum over the factor itself goes with a change of basis, and only the other side can undo it.
        return left[0] in contraction.left_dims and right[0] in contraction.right_dims
    # Of queries and keys softmax is taken; values are only mixed over positions.
    return call.name != "attention"


def _dims(analysis: Analysis, call: OpCall, tensor: Tensor, factor: Factor) -> list[int]:
    axes = call.axes.get(id(tensor), ())
    return [dim for dim, axis in enumerate(axes) for own in analysis.space.factors(axis) if own is factor]


def _products(width_graph: WidthGraph, factor: Factor) -> Iterator[tuple[OpCall, Contraction]]:
    """Yield where two activations are contracted over a factor."""
    analysis, roles = width_graph.analysis, width_graph.roles
    for call in analysis.calls:
        for contraction in call.contractions:
            if roles.is_parameter(contraction.left) or roles.is_parameter(contraction.right):
                continue
            if any(dim in contraction.left_dims for dim in _dims(analysis, call, contraction.left, factor)):
                yield call, contraction


def _reader_basis(analysis: Analysis, factor: Factor, reader: Reader, paths: list[Origins]) -> Basis | None:
    if reader.groups != 1 or reader.minor != 1:
        return None
    occurrences = channel_positions(analysis.space, reader.axis, factor)
    channels = torch.from_numpy(np.concatenate(occurrences, 1))
    source, weight = reader.call.arguments[reader.source], reader.call.arguments[reader.weight]
    places = []
    for path in paths:
        for tensor, dim, inverse in ((source, reader.source_dim, False), (weight, reader.weight_dim, True)):
            if id(tensor) not in path.of:
                continue
            rows = path.of[id(tensor)].movedim(dim, -1).reshape(-1, tensor.shape[dim])
            if (rows != rows[:1]).any():
                return None
            places.append(Place(path.parameter, path.dim, rows[0][channels].numpy(), inverse))
    return Basis(tuple(places), reader, channels.numpy())


def _product_basis(analysis: Analysis, call: OpCall, contraction: Contraction, paths: list[Origins]) -> Basis | None:
    """Return the heads of a product: every part of a leading dim along which other entries of the parameters come."""
    rows: list[tuple[Origins, bool, Tensor]] = []
    operands = ((contraction.left, contraction.left_dims[0]), (contraction.right, contraction.right_dims[0]))
    sizes = [_leading_sizes(analysis, call, tensor, dim) for tensor, dim in operands]
    for (tensor, dim), parts, inverse in zip(operands, sizes, (False, True), strict=True):
        for path in paths:
            if id(tensor) not in path.of:
                continue
            own = _of_one_token(path.of[id(tensor)].movedim(dim, -1))
            if own is None or parts is None:
                return None
            for place, part in reversed([*enumerate(parts)]):
                own = own.unflatten(place, part)
            rows.append((path, inverse, own))
    if len({own.shape for _, _, own in rows}) != 1:
        return None
    lead = range(rows[0][2].dim() - 1)
    heads = tuple(dim for dim in lead if any((own != own.narrow(dim, 0, 1)).any() for _, _, own in rows))
    if any([size for part in parts or () for size in part][dim] < 0 for dim in heads for parts in sizes):
        return None
    places = []
    for path, inverse, own in rows:
        first = own[tuple(slice(None) if dim in heads else 0 for dim in lead)]
        positions = first.reshape(-1, first.shape[-1]).T.numpy()
        places.append(Place(path.parameter, path.dim, positions, inverse))
    # Softmax over keys does not notice what is added to all scores of a query.
    left, right = (
        Side(argument_name(call, tensor), dim, tuple(parts or ()), heads, call.name == "attention" and inverse)
        for (tensor, dim), parts, inverse in zip(operands, sizes, (False, True), strict=True)
    )
    return Basis(tuple(places), Product(call, left, right), places[0].positions)


def _leading_sizes(analysis: Analysis, call: OpCall, tensor: Tensor, dim: int) -> list[tuple[int, ...]] | None:
    """Return the parts of the leading dims of an operand, -1 for the batch; None where it is not the major part."""
    axes = [*call.axes[id(tensor)]]
    axes.pop(dim)
    result = []
    for axis in axes[:-1]:
        term, *others = analysis.space.normalise(axis)
        major = isinstance(term[0], Factor) and term[0].is_batch if term and not others else False
        rest = (term[1:],) if major else axis
        if any(factor.is_batch for factor in analysis.space.factors(rest)):
            return None
        sizes = [axis_size(axis)] if others else [element_size(element) for element in term]
        result.append((-1, *sizes[1:]) if major else tuple(sizes))
    return result


def _of_one_token(own: Tensor) -> Tensor | None:
    """Return the origins of the first token, [*lead, channels]; None if others have others."""
    if own.dim() < 2 or (own != own.narrow(-2, 0, 1)).any():
        return None
    return own.select(-2, 0)


def _cover(analysis: Analysis, group: ChannelGroup, bases: list[Basis]) -> bool:
    """Tell whether all entries of a group's parameters are in a basis, each in one head of one of them."""
    found: dict[tuple[str, int], list[Indices]] = {}
    for basis in bases:
        for place in basis.places:
            found.setdefault((place.parameter, place.dim), []).append(place.positions.reshape(-1))
    for site in group.sites:
        axis = analysis.parameters[site.parameter].axes[site.dim]
        wanted = np.concatenate([own.reshape(-1) for own in channel_positions(analysis.space, axis, group.factor)])
        own = np.concatenate(found.get((site.parameter, site.dim), [np.zeros(0, dtype=np.int64)]))
        if not np.array_equal(np.sort(own), np.sort(wanted)):
            return False
    return True
