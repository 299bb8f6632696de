"""What the channels of a basis end in: what it sees of them and wants, and how that is told in another basis."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from fxwidth.axes.factors import Factor
from fxwidth.axes.index_maps import Indices
from fxwidth.bases.activation_products import Product, Side
from fxwidth.bases.channel_provenance import Place
from fxwidth.bases.linear_groups import Basis, Sight
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.selection.grams import Pairs, reader_pairs
from fxwidth.statistics.moments import Moments


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

    def at(self, place: Place) -> Tensor:
        """Return what the entries at a place are multiplied with from the left, [heads, width, width]."""
        return self.backward.mT if place.inverse else self.forward


class End(Protocol):
    """A reader of channels, or a product that sums over them."""

    def pairs(self, moments: Moments) -> Pairs | None:
        """Return what the end sees of the channels of each head, and what it makes of them; None if that is unknown."""

    def turned(self, moments: Moments, turn: Turn) -> Moments:
        """Return moments in which the end sees the new channels."""


@dataclass(frozen=True)
class ReaderEnd:
    """Parameters that read the channels of a factor."""

    width_graph: WidthGraph
    factor: Factor
    sight: Sight

    def pairs(self, moments: Moments) -> Pairs | None:
        """Return what the readers see of the channels of each head, and what they make of them."""
        return reader_pairs(self.width_graph, self.sight.readers, self.factor, moments)

    def turned(self, moments: Moments, turn: Turn) -> Moments:
        """Return moments in which the readers see the new channels."""
        key = self.sight.readers.first.key
        moment = moments.contracted[key]
        whole = in_place(turn.forward, self.sight.positions, len(moment.mean)).to(moment.covariance)
        seen = replace(moment, mean=whole @ moment.mean, covariance=whole @ moment.covariance @ whole.T)
        # Whoever else shares the moment sees another group of the same activation, or is an end of its own.
        return replace(moments, contracted={**moments.contracted, key: seen})


@dataclass(frozen=True)
class ProductEnd:
    """A product of two activations that sums over the channels."""

    product: Product

    def pairs(self, moments: Moments) -> Pairs | None:
        """Return what each side is multiplied with, as if it were read by the other."""
        left, right = (moments.products.get((self.product.call.index, side.argument)) for side in self._sides)
        if left is None or right is None:
            return None
        energy = float((left * right.mT).sum())
        return Pairs(left, right / energy, torch.finfo(left.dtype).eps) if energy > 0 else None

    def turned(self, moments: Moments, turn: Turn) -> Moments:
        """Return moments in which both sides have the new channels."""
        products = dict(moments.products)
        for side, matrix in zip(self._sides, (turn.forward, turn.backward.mT), strict=True):
            key = self.product.call.index, side.argument
            products[key] = matrix.to(products[key]) @ products[key] @ matrix.mT.to(products[key])
        return replace(moments, products=products)

    @property
    def _sides(self) -> tuple[Side, Side]:
        return self.product.left, self.product.right


def ends_of(width_graph: WidthGraph, factor: Factor, basis: Basis) -> list[End]:
    """Return all that the channels of a basis of a factor end in."""
    ends: list[End] = [ReaderEnd(width_graph, factor, sight) for sight in basis.sights]
    return ends if basis.product is None else [*ends, ProductEnd(basis.product)]


def in_place(matrices: Tensor, positions: Indices, size: int) -> Tensor:
    """Return the matrix, [size, size], that turns the positions of each head, [channels, heads], by its own matrix."""
    whole = torch.eye(size, dtype=matrices.dtype, device=matrices.device)
    for matrix, channels in zip(matrices, positions.T, strict=True):
        place = torch.from_numpy(channels).to(whole.device)
        whole[place[:, None], place] = matrix
    return whole
