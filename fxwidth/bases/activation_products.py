"""Products of two activations over the channels of a group: their sides, and which parts of them are heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from fxwidth.analysis.result import Analysis
from fxwidth.axes.factors import Factor, axis_size, element_size
from fxwidth.bases.channel_provenance import Origins, Place
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.recording.tape import Contraction, OpCall
from fxwidth.rules.family_table import family_of
from fxwidth.rules.op_families import Attention
from fxwidth.weights.readers import argument_name


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
class _Operand:
    """A side of a product, whose contracted dim is the given one, before it is known which parts are heads.

    Attributes:
        sizes: the parts of its leading dims.
        paths: the parameters that it comes from, and which of their positions, [*parts of leading dims, channels].
    """

    tensor: Tensor
    dim: int
    sizes: tuple[tuple[int, ...], ...]
    paths: tuple[tuple[Origins, Tensor], ...]


def products_over(
    width_graph: WidthGraph, factor: Factor, calls: Sequence[OpCall]
) -> Iterator[tuple[OpCall, Contraction]]:
    """Yield where two activations are contracted over a factor."""
    roles, space = width_graph.roles, width_graph.analysis.space
    for call in calls:
        for contraction in roles.activation_products(call):
            if any(factor in space.factors(call.axes[contraction.left][dim]) for dim in contraction.left_dims):
                yield call, contraction


def product_places(
    analysis: Analysis, call: OpCall, contraction: Contraction, paths: Sequence[Origins]
) -> tuple[tuple[Place, ...], Product] | None:
    """Return the places of the channels that are summed over in a product, and the product with its heads told apart.

    A head is every part of a leading dim along which other entries of the parameters come. None where that is not so
    for both sides alike, or where tokens have origins of their own.
    """
    left = _operand(analysis, call, contraction.left, contraction.left_dims[0], paths)
    right = _operand(analysis, call, contraction.right, contraction.right_dims[0], paths)
    if left is None or right is None:
        return None
    own = [positions for operand in (left, right) for _, positions in operand.paths]
    if len({positions.shape for positions in own}) != 1:
        return None
    lead = range(own[0].dim() - 1)
    heads = tuple(dim for dim in lead if any((one != one.narrow(dim, 0, 1)).any() for one in own))
    if any([size for part in operand.sizes for size in part][dim] < 0 for dim in heads for operand in (left, right)):
        return None
    places = []
    for operand in (left, right):
        for path, positions in operand.paths:
            first = positions[tuple(slice(None) if dim in heads else 0 for dim in lead)]
            channels = first.reshape(-1, first.shape[-1]).T.numpy()
            places.append(Place(path.parameter, path.dim, channels, operand is right))
    # Softmax over keys does not notice what is added to all scores of a query.
    centred = right if isinstance(family_of(call.func), Attention) else None
    sides = (Side(argument_name(call, one.tensor), one.dim, one.sizes, heads, one is centred) for one in (left, right))
    return tuple(places), Product(call, *sides)


def _operand(analysis: Analysis, call: OpCall, tensor: Tensor, dim: int, paths: Sequence[Origins]) -> _Operand | None:
    known = [path for path in paths if tensor in path.of]
    sizes = _leading_sizes(analysis, call, tensor, dim)
    if known and sizes is None:
        return None
    found = []
    for path in known:
        own = _of_one_token(path.of[tensor].movedim(dim, -1))
        if own is None:
            return None
        for place, part in reversed([*enumerate(sizes or ())]):
            own = own.unflatten(place, part)
        found.append((path, own))
    return _Operand(tensor, dim, tuple(sizes or ()), tuple(found))


def _leading_sizes(analysis: Analysis, call: OpCall, tensor: Tensor, dim: int) -> list[tuple[int, ...]] | None:
    """Return the parts of the leading dims of an operand, -1 for the batch; None where it is not the major part."""
    axes = [*call.axes[tensor]]
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
