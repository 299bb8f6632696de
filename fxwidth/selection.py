"""Choosing which channels of a group to keep: those that say most of what the readers want to hear."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxwidth.factors import Factor, FactorSpace
from fxwidth.groups import ChannelGroup, WidthGraph
from fxwidth.index_maps import Indices
from fxwidth.moments import Moments
from fxwidth.occurrences import channel_positions
from fxwidth.probes import Key
from fxwidth.reader_sets import reader_sets
from fxwidth.readers import Reader, wiring_of
from fxwidth.spectrum import writer_norms
from fxwidth.tape import OpCall

# More numbers than this in all pairs of a group, or as many products in all steps, and pairs are merged.
_ENTRIES, _PRODUCTS = 2**27, 4e9
# From this width on time matters more than the last digits.
_WIDE = 128
# A channel whose variance is explained up to this share of it, times the precision of the numbers, holds nothing new.
_EXPLAINED = 1e3
# A channel whose deviation is this many rounding units of the loudest channel's is taken to be constant.
_ROUNDING = 100.0


def select(width_graph: WidthGraph, group: ChannelGroup, width: int, moments: Moments | None) -> Indices:
    """Return the channels of a group to keep, sorted.

    Args:
        width_graph: the graph.
        group: one of its groups.
        width: how many channels to keep.
        moments: what the readers see; without, or where nothing reads the group, the writers' largest rows are kept.
    """
    if width >= group.width:
        return np.arange(group.width, dtype=np.int64)
    pairs = _pairs(width_graph, group, width, moments) if moments is not None else None
    if pairs is None:
        return select_by_magnitude(width_graph, group, width)
    # Dropping what nobody reads costs nothing at all, whatever it may tell about the others.
    read = pairs.read_channels()
    if len(read) <= width:
        unread = np.setdiff1d(np.arange(group.width), read.cpu().numpy())
        return np.sort(np.concatenate([read.cpu().numpy(), unread[: width - len(read)]])).astype(np.int64)
    return _sorted(read[greedy_order(pairs.among(read), width)])


def select_by_magnitude(width_graph: WidthGraph, group: ChannelGroup, width: int) -> Indices:
    """Return the channels with the largest rows in their writers, batch norm scales folded in, sorted.

    Without values (meta device, nothing that writes the group but biases) they are the first ones.
    """
    norms = writer_norms(width_graph, group)
    if norms is None:
        return np.arange(min(width, group.width), dtype=np.int64)
    return _sorted(torch.argsort(norms, descending=True, stable=True)[:width])


def _sorted(channels: Tensor) -> Indices:
    return np.sort(channels.cpu().numpy().astype(np.int64))


@dataclass(frozen=True)
class Pairs:
    """What readers see of a group's channels, and what they make of it.

    Attributes:
        seen: S, [pairs, width, width]: the channels' covariance, or E h h^T where no constant can be added.
        wanted: D = a W^T W, [pairs, width, width], with a one over the energy of what the whole reader makes.
        precision: the rounding unit of the numbers S comes from.
    """

    seen: Tensor
    wanted: Tensor
    precision: float

    def read_channels(self) -> Tensor:
        """Return the channels of which some reader makes anything."""
        return torch.nonzero((self.wanted.diagonal(dim1=1, dim2=2) > 0).any(0))[:, 0]

    def among(self, channels: Tensor) -> Pairs:
        """Return the evidence on some channels alone."""
        return Pairs(self.seen[:, channels][:, :, channels], self.wanted[:, channels][:, :, channels], self.precision)


def greedy_order(pairs: Pairs, count: int) -> Tensor:
    """Return channels in the order in which they explain most of what is still unexplained, [count].

    With E = S, the next channel j has the largest sum over pairs of E_j^T D E_j / E_jj, and E loses E_j E_j^T / E_jj:
    E is what the best linear prediction from the chosen channels leaves of S, and tr(D E) what the readers miss.

    Source: forward selection by orthogonal least squares, Chen, Billings and Luo (1989), weighted by the readers.
    """
    S, D = pairs.seen, pairs.wanted
    variance = S.diagonal(dim1=1, dim2=2).clone()
    # What rounding leaves in a channel that is constant says nothing, however well it fits.
    rounding = variance.amax(1, keepdim=True) * (_ROUNDING * pairs.precision) ** 2
    negligible = (variance * min(0.5, _EXPLAINED * pairs.precision)).maximum(rounding)
    gain = (torch.bmm(D, S) * S).sum(1)
    # With fewer samples than channels everything is explained early; what is loudest for the readers then comes first.
    loudness = (D.diagonal(dim1=1, dim2=2) * variance).sum(0)
    tie_break = loudness / loudness.sum().clamp_min(torch.finfo(S.dtype).tiny) * _EXPLAINED * pairs.precision
    chosen: list[Tensor] = []
    taken = torch.zeros(S.shape[2], dtype=torch.bool, device=S.device)
    explained = S.new_zeros(S.shape[0], S.shape[2], count)
    for step in range(count):
        open_ = variance > negligible
        score = torch.where(open_, gain.clamp_min(0) / variance.where(open_, torch.ones_like(variance)), 0.0).sum(0)
        j = (score + tie_break).masked_fill(taken, -1.0).argmax()
        chosen.append(j)
        taken[j] = True
        past = explained[:, :, :step]
        own = S[:, :, j] - _times(past, past[:, j])
        # Where the channel is explained already it has nothing to take away.
        scale = torch.where(open_[:, j], variance[:, j], torch.inf)[:, None]
        wish = _times(D, own)
        echo = _times(S, wish) - _times(past, _times(past.transpose(1, 2), wish))
        pull = (own * wish).sum(1, keepdim=True)
        gain = gain - 2 * own / scale * echo + (own / scale).square() * pull
        variance = variance - own.square() / scale
        explained[:, :, step] = own / scale.sqrt()
    return torch.stack(chosen)


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Return the product of each matrix [pairs, n, m] with its vector [pairs, m]."""
    if matrices.shape[1] < _WIDE:
        return torch.bmm(matrices, vectors[:, :, None])[:, :, 0]
    # One by one, large products are several times as fast as in a batch.
    return torch.stack([matrix @ vector for matrix, vector in zip(matrices, vectors, strict=True)])


def _pairs(width_graph: WidthGraph, group: ChannelGroup, width: int, moments: Moments) -> Pairs | None:
    """Return the evidence on a group from all that reads it, for keeping so many channels; None where nothing does."""
    seen: list[Tensor] = []
    wanted: list[Tensor] = []
    precision = torch.finfo(torch.float64).eps
    space = width_graph.analysis.space
    for readers in reader_sets(width_graph):
        # Readers of one weight see what is measured in all their places together.
        reader = readers.first
        moment = moments.of(reader)
        values = _weight_values(width_graph, reader)
        if moment is None or values is None:
            continue
        S = moment.covariance if readers.absorber is not None else moment.second
        for one, other in _reader_pairs(space, reader, group.factor, S, values.to(S.dtype), moment.precision):
            seen.append(one)
            wanted.append(other)
            precision = max(precision, moment.precision)
    for squares in _product_squares(width_graph, group.factor, moments):
        total = squares.sum()
        if float(total) > 0:
            seen.append(torch.diag(squares)[None])
            wanted.append(torch.eye(group.width, dtype=squares.dtype, device=squares.device)[None] / total)
    if not seen:
        return None
    S, D = _merged(seen, wanted, width)
    if group.width >= _WIDE and precision > torch.finfo(torch.float32).eps / 2:
        S, D = S.float(), D.float()
    return Pairs(S, D, precision)


def _weight_values(width_graph: WidthGraph, reader: Reader) -> Tensor | None:
    return wiring_of(width_graph).values(reader.call.arguments[reader.weight])


def _reader_pairs(
    space: FactorSpace, reader: Reader, factor: Factor, S: Tensor, weight: Tensor, precision: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (S, D) [positions each, width, width] for each occurrence of a factor in what a reader contracts."""
    occurrences = channel_positions(space, reader.axis, factor)
    if not occurrences:
        return
    blocks = reader.blocks(weight)
    size = blocks.shape[2]
    D = torch.bmm(blocks.transpose(1, 2), blocks)
    inside = S.reshape(len(D), size, len(D), size).diagonal(dim1=0, dim2=2)
    energy = float((D.permute(1, 2, 0) * inside).sum())
    # A reader that hears rounding errors alone has no say.
    most = float(D.diagonal(dim1=1, dim2=2).sum() * S.diagonal().amax())
    if energy <= most * (_ROUNDING * precision) ** 2:
        return
    for positions in occurrences:
        owners = positions // size
        # A factor that tells the groups of a convolution apart goes through it and is not read by it.
        if (owners != owners[:1]).any():
            continue
        place = torch.from_numpy(positions % size).to(S.device).T
        owner = torch.from_numpy(owners[0]).to(S.device)
        rows, columns = place[:, :, None], place[:, None, :]
        yield inside[rows, columns, owner[:, None, None]], D[owner[:, None, None], rows, columns] / energy


def _product_squares(width_graph: WidthGraph, factor: Factor, moments: Moments) -> Iterator[Tensor]:
    """Yield E q_j^2 E k_j^2 per channel for each product of two activations over a factor, [width]."""
    by_call: dict[OpCall, list[Key]] = {}
    for key in moments.squares:
        by_call.setdefault(width_graph.analysis.calls[key[0]], []).append(key)
    for call, keys in by_call.items():
        contraction = call.contractions[0]
        axis = call.axes[id(contraction.left)][contraction.left_dims[0]]
        product = moments.squares[keys[0]] * moments.squares[keys[-1]]
        for positions in channel_positions(width_graph.analysis.space, axis, factor):
            yield product[torch.from_numpy(positions).to(product.device)].sum(1)


def _merged(seen: Sequence[Tensor], wanted: Sequence[Tensor], kept: int) -> tuple[Tensor, Tensor]:
    """Put pairs side by side, or add neighbouring ones together where that would take too much memory or time."""
    count, width = sum(len(one) for one in seen), seen[0].shape[1]
    runs = min(count, max(1, int(min(_ENTRIES, _PRODUCTS // kept)) // width**2))
    if runs == count:
        return torch.cat(list(seen)), torch.cat(list(wanted))
    S, D = (seen[0].new_zeros(runs, width, width) for _ in range(2))
    number = 0
    for several, others in zip(seen, wanted, strict=True):
        for one, other in zip(several, others, strict=True):
            # Brought to one scale first, so that a loud reader does not drown the others.
            scale = one.diagonal().mean().clamp_min(torch.finfo(one.dtype).tiny)
            S[number * runs // count] += one / scale
            D[number * runs // count] += other * scale
            number += 1
    return S, D
