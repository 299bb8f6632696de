"""What consumes the channels of a basis: what it sees of them and wants, and how that is told in another basis."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from fxwidth.axes.factors import Factor
from fxwidth.axes.index_maps import Indices
from fxwidth.bases.activation_products import Product, Side
from fxwidth.bases.channel_provenance import Place
from fxwidth.bases.linear_groups import Basis, ReadingView
from fxwidth.selection.grams import Grams, reader_grams
from fxwidth.statistics.moments import Moments
from fxwidth.weights.readers import Wiring


@dataclass(frozen=True)
class BasisChange:
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


class BasisConsumer(Protocol):
    """A reader of channels, or a product that sums over them."""

    def grams(self, moments: Moments) -> Grams | None:
        """Return what it sees of the channels of each head, and what it makes of them; None if that is unknown."""

    def turned(self, moments: Moments, change: BasisChange) -> Moments:
        """Return moments in which the consumer sees the new channels."""


@dataclass(frozen=True)
class ReaderConsumer:
    """Parameters that read the channels of a factor."""

    wiring: Wiring
    factor: Factor
    view: ReadingView

    def grams(self, moments: Moments) -> Grams | None:
        """Return what the readers see of the channels of each head, and what they make of them."""
        return reader_grams(self.wiring, self.view.readers, self.factor, moments)

    def turned(self, moments: Moments, change: BasisChange) -> Moments:
        """Return moments in which the readers see the new channels."""
        key = self.view.readers.first.key
        moment = moments.contracted[key]
        whole = in_place(change.forward, self.view.positions, len(moment.mean)).to(moment.covariance)
        seen = replace(moment, mean=whole @ moment.mean, covariance=whole @ moment.covariance @ whole.T)
        # Whoever else shares the moment sees another group of the same activation, or is a consumer of its own.
        return replace(moments, contracted={**moments.contracted, key: seen})


@dataclass(frozen=True)
class ProductConsumer:
    """A product of two activations that sums over the channels."""

    product: Product

    def grams(self, moments: Moments) -> Grams | None:
        """Return what each side is multiplied with, as if it were read by the other."""
        left, right = (moments.products.get((self.product.call.index, side.argument)) for side in self._sides)
        if left is None or right is None:
            return None
        energy = float((left * right.mT).sum())
        return Grams(left, right / energy, torch.finfo(left.dtype).eps) if energy > 0 else None

    def turned(self, moments: Moments, change: BasisChange) -> Moments:
        """Return moments in which both sides have the new channels."""
        products = dict(moments.products)
        for side, matrix in zip(self._sides, (change.forward, change.backward.mT), strict=True):
            key = self.product.call.index, side.argument
            products[key] = matrix.to(products[key]) @ products[key] @ matrix.mT.to(products[key])
        return replace(moments, products=products)

    @property
    def _sides(self) -> tuple[Side, Side]:
        return self.product.left, self.product.right


def consumers_of(wiring: Wiring, factor: Factor, basis: Basis) -> list[BasisConsumer]:
    """Return all that consumes the channels of a basis of a factor."""
    consumers: list[BasisConsumer] = [ReaderConsumer(wiring, factor, view) for view in basis.views]
    return consumers if basis.product is None else [*consumers, ProductConsumer(basis.product)]


def in_place(matrices: Tensor, positions: Indices, size: int) -> Tensor:
    """Return the matrix, [size, size], that changes the positions of each head, [channels, heads], by its own."""
    whole = torch.eye(size, dtype=matrices.dtype, device=matrices.device)
    for matrix, channels in zip(matrices, positions.T, strict=True):
        place = torch.from_numpy(channels).to(whole.device)
        whole[place[:, None], place] = matrix
    return whole
