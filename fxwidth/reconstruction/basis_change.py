"""Linear groups in the basis of their spectrum: where nothing nonlinear stands between writers and reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxwidth.bases.channel_provenance import Place
from fxwidth.bases.foldable_norms import InnerNorm
from fxwidth.bases.linear_groups import Basis, linear_group
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.reconstruction.basis_consumers import BasisChange, BasisConsumer, consumers_of, in_place
from fxwidth.reconstruction.norm_absorption import can_absorb, normalise, spread, take_scales
from fxwidth.rewriting.transaction import Transaction
from fxwidth.selection.error_curves import lost_share
from fxwidth.selection.grams import Grams
from fxwidth.statistics.moments import Moments
from fxwidth.weights.readers import Wiring, wiring_of

# Directions of less energy than this share of the largest are not scaled up: it would cost precision.
_FLOOR = 1e-6


@dataclass(frozen=True)
class Rotation:
    """A change of basis for the channels of a linear group.

    Attributes:
        changes: one for each of its bases.
        consumers: what the channels of each of these consumer in.
        lost: what the consumers miss of the first k new channels, for every k, [width + 1].
        norms: batch norms behind writers.
        is_best: whether no other k channels, of this basis or the old one, could lose less.
    """

    changes: tuple[BasisChange, ...]
    consumers: tuple[list[BasisConsumer], ...]
    lost: Tensor
    norms: tuple[InnerNorm, ...] = ()
    is_best: bool = True


def rotation(width_graph: WidthGraph, group: ChannelGroup, moments: Moments) -> Rotation | None:
    """Return the basis of a linear group in which its first channels matter most; None for other groups."""
    linear, wiring = linear_group(width_graph, group), wiring_of(width_graph)
    if linear is None or not all(can_absorb(wiring, norm) for norm in linear.norms):
        return None
    if any(wiring.analysis.parameters[site.parameter].tensor.is_complex() for site in group.sites):
        # Of these no more is known than products of one part with the same of another.
        return None
    changes, consumers = [], []
    lost = torch.zeros(group.width + 1, dtype=torch.float64, device="cpu")
    for basis in linear.bases:
        consumers.append(consumers_of(wiring, group.factor, basis))
        grams = [consumer.grams(moments) for consumer in consumers[-1]]
        found = change(basis, [one for one in grams if one is not None])
        if found is None or any(one is None for one in grams):
            return None
        changes.append(found[0])
        lost += found[1].to(lost)
    is_best = all(len(basis.views) <= 1 for basis in linear.bases)
    return Rotation(tuple(changes), tuple(consumers), lost, linear.norms, is_best)


def change(basis: Basis, grams: Sequence[Grams]) -> tuple[BasisChange, Tensor] | None:
    """Return the basis in which the channels are uncorrelated and each alone does what it can for their consumers.

    With S = Cov h and D = W^T W, the eigenvectors V of S^1/2 D S^1/2 give T = V^T S^-1/2: the covariance of T h is the
    identity, that of the reader's outputs falls into parts, and of all k-dimensional ones the first k lose least. Of a
    product q^T k, S = E q q^T and D = E k k^T are the same for queries and keys that know nothing of each other. Of
    several readers it is the sum of S and that of D.

    Args:
        basis: where the channels are.
        grams: what each of its consumers sees and wants, one pair per head.

    Returns:
        The change, and what is lost of the first k channels, for every k.

    Source: reduced-rank regression, A. J. Izenman, Reduced-Rank Regression for the Multivariate Linear Model (1975).
    """
    heads = basis.places[0].positions.shape[1]
    if not grams or any(len(one.activation) != heads for one in grams):
        return None
    S, D = _together(grams)
    # What no consumer makes anything of goes last as it is: in a sum with others it would cost them digits.
    read = (D.diagonal(dim1=1, dim2=2) > 0).any(0)
    order = torch.cat([torch.nonzero(one)[:, 0] for one in (read, ~read)])
    count = int(read.sum())
    found = _change(S[:, order[:count]][:, :, order[:count]], D[:, order[:count]][:, :, order[:count]])
    if found is None:
        return None
    forward, backward = (torch.eye(len(order), dtype=S.dtype, device=S.device).repeat(heads, 1, 1) for _ in range(2))
    energies = S.new_zeros(heads, len(order) + 1)
    forward[:, :count, :count], backward[:, :count, :count], energies[:, :count] = found
    back = torch.argsort(order)
    turned = BasisChange(basis, forward[:, :, back], backward[:, back])
    if len(grams) > 1:
        return turned, _lost(turned, grams)
    return turned, energies.flip(1).cumsum(1).flip(1).sum(0)


def _change(S: Tensor, D: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return T and its inverse for each head, and the energies of the new channels, [heads, width]; see `change`."""
    if S.shape[-1] == 0:
        return None
    values, vectors = torch.linalg.eigh(S)
    if not bool((values[:, -1] > 0).all()):
        return None
    # Directions in which nothing is ever seen stay out: scaled to the floor's variance they would mix with others.
    seen = values.where(values > values.shape[-1] * torch.finfo(S.dtype).eps * values[:, -1:], 0)
    half = vectors * seen.sqrt()[:, None]
    energies, turned = torch.linalg.eigh(half.mT @ D @ half)
    root = seen.maximum(_FLOOR * values[:, -1:]).sqrt()
    energies, turned = energies.flip(1).clamp_min(0), turned.flip(2)
    # Keep the mean variance of the channels.
    scale = root.square().mean(1).sqrt()[:, None, None]
    forward = scale * turned.mT @ (vectors / root[:, None]).mT
    return forward, (vectors * root[:, None]) @ turned / scale, energies


def _together(grams: Sequence[Grams]) -> tuple[Tensor, Tensor]:
    """Return one S and one D per head for all consumers, each brought to one mean variance, so that none dominates."""
    if len(grams) == 1:
        return grams[0].activation.double(), grams[0].weight.double()
    seen, wanted = (torch.stack([getattr(one, name).double() for one in grams]) for name in ("activation", "weight"))
    variance = seen.diagonal(dim1=2, dim2=3).mean(2)[:, :, None, None]
    scale = (variance / variance.mean(0)).clamp_min(torch.finfo(seen.dtype).tiny)
    return (seen / scale).mean(0), (wanted * scale).sum(0)


def _lost(one: BasisChange, grams: Sequence[Grams]) -> Tensor:
    """Return what consumers miss of the first k new channels, for every k, each by what it sees itself."""
    width = one.forward.shape[-1]
    seen, wanted, rows = [], [], []
    for own in grams:
        seen.append(one.forward @ own.activation.double() @ one.forward.mT)
        wanted.append(one.backward.mT @ own.weight.double() @ one.backward)
        rows.append(seen[-1].new_full((len(own.activation),), torch.inf) if own.rows is None else own.rows.double())
    precision = max(own.precision for own in grams)
    turned = Grams(torch.cat(seen), torch.cat(wanted), precision, torch.cat(rows))
    return torch.from_numpy(lost_share(turned, torch.arange(width, device=one.forward.device)))


def rotated(wiring: Wiring, rotation: Rotation, moments: Moments, transaction: Transaction) -> Moments:
    """Bring a group's parameters to another basis, in place, and return the moments in that basis.

    The function of the network stays as it is. Batch norms behind writers come to normalise the new channels.

    Args:
        wiring: that of the graph.
        rotation: the change of basis.
        moments: the evidence in the old basis.
        transaction: takes what brings the old parameters back.
    """

    def overwrite(name: str, values: Tensor) -> None:
        transaction.overwrite(wiring.analysis.parameters[name].tensor, values)

    bases = [one.basis for one in rotation.changes]
    before = [spread(wiring, norm, bases, moments) for norm in rotation.norms]
    spreads = [_turned_spread(rotation, norm, own) for norm, own in zip(rotation.norms, before, strict=True)]
    for norm, (channels, _) in zip(rotation.norms, spreads, strict=True):
        take_scales(wiring, norm, channels, overwrite)
    for one, consumers in zip(rotation.changes, rotation.consumers, strict=True):
        for place in one.basis.places:
            old = wiring.analysis.parameters[place.parameter].tensor.detach()
            overwrite(place.parameter, _turned_place(old, place, one))
        for consumer in consumers:
            moments = consumer.turned(moments, one)
    for norm, (channels, variance) in zip(rotation.norms, spreads, strict=True):
        normalise(wiring, norm, channels, variance, overwrite)
    return moments


def _turned_place(tensor: Tensor, place: Place, one: BasisChange) -> Tensor:
    """Return a parameter whose channels at a place are those of the new basis, in double precision."""
    moved = tensor.to(torch.float64, copy=True).movedim(place.dim, 0).contiguous()
    for head, channels in enumerate(place.positions.T):
        own = torch.from_numpy(channels).to(moved.device)
        moved[own] = torch.tensordot(one.at(place)[head].to(moved.device), moved[own], 1)
    return moved.movedim(0, place.dim)


def _turned_spread(rotation: Rotation, norm: InnerNorm, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return which channels of a batch norm are turned, and the variances of all of them after that."""
    turned = []
    for one in rotation.changes:
        for place in (place for place in one.basis.places if place.parameter == norm.mean):
            whole = in_place(one.at(place).to(covariance), place.positions, len(covariance))
            covariance = whole @ covariance @ whole.T
            turned.append(torch.from_numpy(place.positions.reshape(-1)).to(covariance.device))
    return torch.cat(turned), covariance.diagonal()
