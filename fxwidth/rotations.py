"""Linear groups in the basis of their spectrum: where nothing nonlinear stands between writers and reader."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxwidth.groups import ChannelGroup, WidthGraph
from fxwidth.linear_groups import Basis, Product, linear_group
from fxwidth.moments import Moments
from fxwidth.pairs import Pairs, reader_pairs

# Directions of less energy than this share of the loudest are not made louder: it would cost precision.
_FLOOR = 1e-6


@dataclass(frozen=True)
class Turn:
    """A change of one basis.

    Attributes:
        basis: where the channels are.
        forward: T, [heads, width, width]: the new channels from the old ones; writers become T W.
        backward: its inverse; readers become W T^-1.
    """

    basis: Basis
    forward: Tensor
    backward: Tensor


@dataclass(frozen=True)
class Rotation:
    """A change of basis for the channels of a linear group.

    Attributes:
        turns: one for each of its bases.
        lost: what the ends miss of the first k new channels, for every k, [width + 1].
    """

    turns: tuple[Turn, ...]
    lost: Tensor


def rotation(width_graph: WidthGraph, group: ChannelGroup, moments: Moments) -> Rotation | None:
    """Return the basis of a linear group in which its first channels matter most; None for other groups."""
    linear = linear_group(width_graph, group)
    if linear is None:
        return None
    turns = []
    lost = torch.zeros(group.width + 1, dtype=torch.float64)
    for basis in linear.bases:
        pairs = _pairs(width_graph, group, moments, basis)
        found = None if pairs is None else turn(basis, pairs)
        if found is None:
            return None
        turns.append(found[0])
        lost += found[1].to(lost)
    return Rotation(tuple(turns), lost)


def _pairs(width_graph: WidthGraph, group: ChannelGroup, moments: Moments, basis: Basis) -> Pairs | None:
    """Return what each head of an end sees of its channels, and what it makes of them."""
    end = basis.end
    if not isinstance(end, Product):
        return reader_pairs(width_graph, group.factor, moments, end)
    left, right = (moments.products.get((end.call.index, side.argument)) for side in (end.left, end.right))
    if left is None or right is None:
        return None
    energy = float((left * right.mT).sum())
    precision = torch.finfo(left.dtype).eps
    return Pairs(left, right / energy, precision) if energy > 0 else None


def turn(basis: Basis, pairs: Pairs) -> tuple[Turn, Tensor] | None:
    """Return the basis in which the channels are uncorrelated and each alone does what it can for their end.

    With S = Cov h and D = W^T W, the eigenvectors V of S^1/2 D S^1/2 give T = V^T S^-1/2: the covariance of T h is the
    identity, that of the reader's outputs falls into parts, and of all k-dimensional ones the first k lose least. Of a
    product q^T k, S = E q q^T and D = E k k^T are the same for queries and keys that know nothing of each other.

    Args:
        basis: where the channels are.
        pairs: what its end sees and wants, one pair per head.

    Returns:
        The turn, and what is lost of the first k channels, for every k.

    Source: reduced-rank regression, A. J. Izenman, Reduced-Rank Regression for the Multivariate Linear Model (1975).
    """
    if len(pairs.seen) != basis.places[0].positions.shape[1]:
        return None
    S, D = pairs.seen.double(), pairs.wanted.double()
    values, vectors = torch.linalg.eigh(S)
    if not bool((values[:, -1] > 0).all()):
        return None
    root = values.clamp_min(0).maximum(_FLOOR * values[:, -1:]).sqrt()
    half = vectors * root[:, None]
    energies, turned = torch.linalg.eigh(half.mT @ D @ half)
    energies, turned = energies.flip(1).clamp_min(0), turned.flip(2)
    # As loud on the whole as the channels were.
    scale = root.square().mean(1).sqrt()[:, None, None]
    forward = scale * turned.mT @ (vectors / root[:, None]).mT
    backward = half @ turned / scale
    tails = torch.cat([energies, energies.new_zeros(len(energies), 1)], 1).flip(1).cumsum(1).flip(1).sum(0)
    return Turn(basis, forward, backward), tails


def rotated(width_graph: WidthGraph, rotation: Rotation, moments: Moments, undo: ExitStack) -> Moments:
    """Bring a group's parameters to another basis, in place, and return the moments in that basis.

    The function of the network stays as it is.

    Args:
        width_graph: the graph.
        rotation: the change of basis.
        moments: the evidence in the old basis.
        undo: takes what brings the old parameters back.
    """
    for one in rotation.turns:
        for place in one.basis.places:
            tensor = width_graph.analysis.parameters[place.parameter].tensor
            undo.callback(_overwrite, tensor, tensor.detach().clone())
            moved = tensor.detach().double().movedim(place.dim, 0).contiguous()
            for head, channels in enumerate(place.positions.T):
                own = torch.from_numpy(channels).to(moved.device)
                matrix = one.backward[head].mT if place.inverse else one.forward[head]
                moved[own] = torch.tensordot(matrix.to(moved.device), moved[own], 1)
            _overwrite(tensor, moved.movedim(0, place.dim))
        moments = _turned_product(moments, one) if isinstance(one.basis.end, Product) else _turned(moments, one)
    return moments


def _turned(moments: Moments, one: Turn) -> Moments:
    """Return moments in which a reader sees the new channels."""
    end = one.basis.end
    assert not isinstance(end, Product)
    moment = moments.contracted[end.key]
    whole = torch.eye(len(moment.mean), dtype=moment.covariance.dtype, device=moment.covariance.device)
    for head, channels in enumerate(one.basis.seen.T):
        place = torch.from_numpy(channels).to(whole.device)
        whole[place[:, None], place] = one.forward[head].to(whole)
    seen = replace(moment, mean=whole @ moment.mean, covariance=whole @ moment.covariance @ whole.T)
    # Whoever else shares the moment sees the same activation, and reads another group of it or none.
    return replace(moments, contracted={**moments.contracted, end.key: seen})


def _turned_product(moments: Moments, one: Turn) -> Moments:
    """Return moments in which both sides of a product have the new channels."""
    end = one.basis.end
    assert isinstance(end, Product)
    products = dict(moments.products)
    for side, matrix in ((end.left, one.forward), (end.right, one.backward.mT)):
        key = end.call.index, side.argument
        old = products[key]
        products[key] = matrix.to(old) @ old @ matrix.mT.to(old)
    return replace(moments, products=products)


def _overwrite(tensor: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(values)
