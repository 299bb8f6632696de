"""Linear groups in the basis of their spectrum: where nothing nonlinear stands between writers and reader."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fxwidth.factors import Axis, Factor, FactorSpace
from fxwidth.groups import ChannelGroup, WidthGraph
from fxwidth.moments import Moments
from fxwidth.normed_weights import normed_weights
from fxwidth.occurrences import channel_positions
from fxwidth.pairs import Pairs
from fxwidth.reader_sets import reader_sets
from fxwidth.readers import Reader
from fxwidth.roles import Role
from fxwidth.tape import OpCall

# Ops that move channels about without changing them.
_MOVES = frozenset(
    {
        "view", "_unsafe_view", "reshape", "transpose", "permute", "t", "unsqueeze", "squeeze", "clone", "contiguous",
        "alias", "detach", "expand",
    }
)  # fmt: skip
_PRODUCTS = frozenset({"mm", "addmm", "bmm", "convolution", "attention"})
# Directions of less energy than this share of the loudest are not made louder: it would cost precision.
_FLOOR = 1e-6


@dataclass(frozen=True)
class LinearGroup:
    """A group whose channels go from writers to one reader and are only moved, mixed over positions, and added.

    Attributes:
        places: parameter, dim, whether it writes, and positions [channels, heads]: heads have bases of their own.
        reader: the one that reads it.
    """

    places: tuple[tuple[str, int, bool, np.ndarray[tuple[int, ...], np.dtype[np.int64]]], ...]
    reader: Reader


@dataclass(frozen=True)
class Rotation:
    """A change of basis for the channels of a linear group.

    Attributes:
        group: where the channels are.
        forward: T, [heads, width, width]: the new channels from the old ones; writers become T W.
        backward: its inverse; the reader becomes W T^-1.
        lost: what the reader misses of the first k new channels, for every k, [width + 1].
    """

    group: LinearGroup
    forward: Tensor
    backward: Tensor
    lost: Tensor


def linear_group(width_graph: WidthGraph, group: ChannelGroup) -> LinearGroup | None:
    """Return where the channels of a group are, if any basis is as good as the one they have; else None."""
    analysis, factor = width_graph.analysis, group.factor
    space = analysis.space
    sets = [one for one in reader_sets(width_graph) if factor in space.factors(one.first.axis)]
    if group.mixed is not None or len(sets) != 1 or len(sets[0].readers) != 1 or not sets[0].foldable:
        return None
    names = {site.parameter for site in group.sites}
    if names & set(normed_weights(width_graph)) or any(site.role == Role.PER_CHANNEL for site in group.sites):
        return None
    axes = {space.normalise(analysis.parameters[site.parameter].axes[site.dim]) for site in group.sites}
    if len({_outer(axis, factor) for axis in axes}) != 1 or None in {_outer(axis, factor) for axis in axes}:
        return None
    if not all(_is_linear(width_graph, call, factor) for call in analysis.calls):
        return None
    places = []
    for site in group.sites:
        entry = analysis.parameters[site.parameter]
        if entry.tensor.dtype not in (torch.float32, torch.float64):
            return None
        (positions,) = channel_positions(space, entry.axes[site.dim], factor)
        places.append((site.parameter, site.dim, site.role == Role.WRITER, positions))
    return LinearGroup(tuple(places), sets[0].first)


def _outer(axis: Axis, factor: Factor) -> tuple[object, ...] | None:
    """Return what stands before a factor in an axis of one term that ends with it."""
    if len(axis) != 1 or not axis[0] or axis[0][-1] is not factor or factor in axis[0][:-1]:
        return None
    return axis[0][:-1]


def _is_linear(width_graph: WidthGraph, call: OpCall, factor: Factor) -> bool:
    """Tell whether an op commutes with every change of basis of a factor, or contracts it with the reader's weight."""
    space = width_graph.analysis.space
    dims = {id(tensor): _dims(space, call, tensor, factor) for tensor in call.inputs}
    owners = [tensor for tensor in call.inputs if dims[id(tensor)]]
    if not owners:
        return not any(factor in space.factors(axis) for axes in call.output_axes for axis in axes)
    if any(len(dims[id(tensor)]) != 1 for tensor in owners):
        return False
    if call.name in _MOVES:
        return True
    if call.name == "add":
        return len(owners) == 2 and call.arguments.get("alpha", 1) == 1
    if call.name not in _PRODUCTS or not call.contractions:
        return False
    contraction = call.contractions[0]
    left, right = (dims.get(id(tensor), []) for tensor in (contraction.left, contraction.right))
    if call.name == "attention":
        # Of queries and keys softmax is taken; values are only mixed over positions.
        return not left and not right
    if left and right:
        # Only the sum over the factor itself goes with a change of basis, and only the reader's weight can undo it.
        contracted = left[0] in contraction.left_dims and right[0] in contraction.right_dims
        return contracted and len(owners) == 2 and width_graph.roles.is_parameter(contraction.right)
    return True


def _dims(space: FactorSpace, call: OpCall, tensor: Tensor, factor: Factor) -> list[int]:
    return [dim for dim, axis in enumerate(call.axes.get(id(tensor), ())) for f in space.factors(axis) if f is factor]


def rotation(group: LinearGroup, pairs: Pairs) -> Rotation | None:
    """Return the basis in which the channels are uncorrelated and each alone does what it can for the reader.

    With S = Cov h and D = W^T W, the eigenvectors V of S^1/2 D S^1/2 give T = V^T S^-1/2: the covariance of T h is the
    identity, that of the reader's outputs falls into parts, and of all k-dimensional ones the first k lose least.

    Args:
        group: where the channels are.
        pairs: what the reader sees and wants, one pair per head.

    Source: reduced-rank regression, A. J. Izenman, Reduced-Rank Regression for the Multivariate Linear Model (1975).
    """
    if len(pairs.seen) != group.places[0][3].shape[1]:
        return None
    S, D = pairs.seen.double(), pairs.wanted.double()
    values, basis = torch.linalg.eigh(S)
    if not bool((values[:, -1] > 0).all()):
        return None
    root = values.clamp_min(0).maximum(_FLOOR * values[:, -1:]).sqrt()
    half = basis * root[:, None]
    energies, vectors = torch.linalg.eigh(half.mT @ D @ half)
    energies, vectors = energies.flip(1).clamp_min(0), vectors.flip(2)
    # As loud on the whole as the channels were.
    scale = root.square().mean(1).sqrt()[:, None, None]
    forward = scale * vectors.mT @ (basis / root[:, None]).mT
    backward = half @ vectors / scale
    tails = torch.cat([energies, energies.new_zeros(len(energies), 1)], 1).flip(1).cumsum(1).flip(1).sum(0)
    return Rotation(group, forward, backward, tails)


def rotated(width_graph: WidthGraph, turned: Rotation, moments: Moments, undo: ExitStack) -> Moments:
    """Bring a group's parameters to another basis, in place, and return the moments in that basis.

    The function of the network stays as it is.

    Args:
        width_graph: the graph.
        turned: the change of basis.
        moments: the evidence in the old basis.
        undo: takes what brings the old parameters back.
    """
    for name, dim, writes, positions in turned.group.places:
        tensor = width_graph.analysis.parameters[name].tensor
        undo.callback(_overwrite, tensor, tensor.detach().clone())
        moved = tensor.detach().double().movedim(dim, 0).contiguous()
        for head, channels in enumerate(positions.T):
            place = torch.from_numpy(channels).to(moved.device)
            matrix = turned.forward[head] if writes else turned.backward[head].mT
            moved[place] = torch.tensordot(matrix.to(moved.device), moved[place], 1)
        _overwrite(tensor, moved.movedim(0, dim))
    key = turned.group.reader.key
    moment = moments.contracted[key]
    whole = torch.zeros_like(moment.covariance)
    (positions,) = {id(p): p for _, _, writes, p in turned.group.places if not writes}.values()
    for head, channels in enumerate(positions.T):
        place = torch.from_numpy(channels).to(whole.device)
        whole[place[:, None], place] = turned.forward[head].to(whole)
    seen = replace(moment, mean=whole @ moment.mean, covariance=whole @ moment.covariance @ whole.T)
    # Whoever else shares the moment sees the same activation, and reads another group of it or none.
    return replace(moments, contracted={**moments.contracted, key: seen})


def _overwrite(tensor: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(values)
