"""What readers see of a group's channels, and what they make of it: the evidence by which channels are chosen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxwidth.analysis.result import Analysis
from fxwidth.axes.factor_space import FactorSpace
from fxwidth.axes.factors import Factor
from fxwidth.axes.positions import channel_positions
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.recording.tape import OpCall
from fxwidth.rules.copies import channel_copies
from fxwidth.runtime.tensor_slots import real_rows
from fxwidth.statistics.moment import Moment, effective_rows
from fxwidth.statistics.moments import Moments
from fxwidth.statistics.observation_points import Key
from fxwidth.weights.readers import Reader, Wiring
from fxwidth.weights.shared_readers import ReaderSet, reader_sets

# More numbers than this in all pairs of a group, or as many products in all steps, and pairs are merged.
_MOST_ENTRIES, _MOST_PRODUCTS = 2**27, 1e11
# From this width on time matters more than the last digits.
WIDE = 128
# How many rows of wide matrices are multiplied at a time.
_ROWS = 512
# The rounding unit of evidence in double precision.
_EXACT = torch.finfo(torch.float64).eps
# A channel whose deviation is this many rounding units of the largest channel's is taken to be constant.
ROUNDING = 100.0


@dataclass(frozen=True)
class Grams:
    """What readers see of a group's channels, and what they make of it.

    Attributes:
        activation: S, [pairs, width, width]: the channels' covariance, or E h h^T where no constant can be added.
        weight: D = a W^T W, [pairs, width, width], with a one over the energy of what the whole reader makes.
        precision: the rounding unit of the numbers S comes from.
        rows: how many independent rows each S is worth, [pairs]; none are infinitely many.
        is_sum: whether some are sums over several readers: good to choose channels by, but no measure of what is lost.
    """

    activation: Tensor
    weight: Tensor
    precision: float
    rows: Tensor | None = None
    is_sum: bool = False

    @property
    def width(self) -> int:
        """The number of channels."""
        return self.activation.shape[2]

    def read_channels(self) -> Tensor:
        """Return the channels of which some reader makes anything."""
        return torch.nonzero((self.weight.diagonal(dim1=1, dim2=2) > 0).any(0))[:, 0]

    def among(self, channels: Tensor) -> Grams:
        """Return the evidence on some channels alone."""
        if len(channels) == self.width:
            return self
        activation, weight = (matrix[:, channels][:, :, channels] for matrix in (self.activation, self.weight))
        return Grams(activation, weight, self.precision, self.rows, self.is_sum)

    def merged(self) -> Grams:
        """Return fewer pairs where all of them would take too much time: neighbours are added together."""
        count, width = len(self.activation), self.width
        runs = min(count, max(1, int(_MOST_PRODUCTS / (8 * width**3))))
        if runs == count:
            return self
        scale = self._mean_variance()
        places = torch.arange(count, device=self.activation.device) * runs // count
        S, D = (self.activation.new_zeros(runs, width, width) for _ in range(2))
        S.index_add_(0, places, self.activation / scale)
        D.index_add_(0, places, self.weight * scale)
        return Grams(S, D, self.precision, is_sum=True)

    def on_one_scale(self) -> Grams:
        """Return the same evidence with channels of variance one on average, so that small ones count in sums."""
        scale = self._mean_variance()
        return Grams(self.activation / scale, self.weight * scale, self.precision, self.rows, self.is_sum)

    def _mean_variance(self) -> Tensor:
        tiny = torch.finfo(self.activation.dtype).tiny
        return self.activation.diagonal(dim1=1, dim2=2).mean(1).clamp_min(tiny)[:, None, None]


class _Held:
    """Grams as they come, neighbours added together once they take too much memory."""

    def __init__(self) -> None:
        self._parts: list[Grams] = []
        # How many pairs each part is the sum of, and how many the last one lacks of that.
        self._summands = 1
        self._missing = 0

    def add(self, pairs: Grams) -> None:
        """Take more pairs."""
        if self._summands == 1:
            self._parts.append(pairs)
        else:
            for one in _one_by_one(pairs.on_one_scale()):
                self._add(one)
        while sum(len(part.activation) for part in self._parts) > max(1, _MOST_ENTRIES // pairs.width**2):
            self._halve()

    def _add(self, one: Grams) -> None:
        if self._missing == 0:
            self._parts.append(one)
            self._missing = self._summands - 1
        else:
            self._parts[-1] = _sum([self._parts[-1], one])
            self._missing -= 1

    def _halve(self) -> None:
        if self._summands == 1:
            self._parts = [one for part in self._parts for one in _one_by_one(part.on_one_scale())]
        count = len(self._parts)
        self._parts = [_sum(self._parts[first : first + 2]) for first in range(0, count, 2)]
        self._missing += self._summands * (count % 2)
        self._summands *= 2

    def together(self) -> Grams | None:
        """Return all that was taken; None if there was nothing."""
        if not self._parts:
            return None
        dtype, precision = self._parts[0].activation.dtype, max(part.precision for part in self._parts)
        S, D = (_together([getattr(part, name).to(dtype) for part in self._parts]) for name in ("activation", "weight"))
        if self._summands > 1:
            return Grams(S, D, precision, is_sum=True)
        rows = [part.rows for part in self._parts if part.rows is not None]
        return Grams(S, D, precision, torch.cat(rows).to(dtype))


def _one_by_one(pairs: Grams) -> Iterator[Grams]:
    for S, D in zip(pairs.activation, pairs.weight, strict=True):
        yield Grams(S[None], D[None], pairs.precision)


def _sum(parts: Sequence[Grams]) -> Grams:
    """Return what one or two neighbours come to together, in the memory of the first."""
    first, *others = parts
    for other in others:
        first.activation.add_(other.activation)
        first.weight.add_(other.weight)
    return Grams(first.activation, first.weight, max(part.precision for part in parts))


def grams_of(wiring: Wiring, group: ChannelGroup, moments: Moments) -> Grams | None:
    """Return the evidence on a group from all that reads it, None where nothing does.

    Where it would take too much memory, neighbouring readers are added together.
    """
    held = _Held()
    for pairs in each_grams(wiring, group, moments):
        held.add(pairs)
    return held.together()


def each_grams(wiring: Wiring, group: ChannelGroup, moments: Moments) -> Iterator[Grams]:
    """Yield the evidence on a group from one after the other of all that read it."""
    for readers in reader_sets(wiring):
        own = reader_grams(wiring, readers, group.factor, moments)
        if own is not None:
            yield own
    for call in channel_copies(wiring.analysis.calls):
        own = _copy_grams(wiring.analysis.space, call, group.factor, moments.contracted.get((call.index, "self")))
        if own is not None:
            yield own
    for squares in _product_squares(wiring.analysis, group.factor, moments):
        total = squares.sum()
        if float(total) > 0:
            weight = torch.eye(group.width, dtype=squares.dtype, device=squares.device)[None] / total
            yield Grams(torch.diag(squares)[None], weight, _EXACT, squares.new_full((1,), math.inf))


def reader_grams(wiring: Wiring, readers: ReaderSet, factor: Factor, moments: Moments) -> Grams | None:
    """Return the evidence from readers of one weight, a pair for each position of a factor in it; None without any."""
    # Readers of one weight see what is measured in all their places together.
    reader, space = readers.first, wiring.analysis.space
    moment = moments.of(reader)
    values = wiring.values(reader.call.arguments[reader.weight])
    if moment is None or values is None or factor not in space.factors(reader.axis):
        return None
    # Values from single precision are worked on in single precision where that is much faster.
    narrow = factor.size >= WIDE and moment.precision > torch.finfo(torch.float32).eps / 2 and _fits_single(moment)
    S = moment.covariance.float() if narrow else moment.covariance
    if readers.absorber is None:
        mean = moment.mean.to(S.dtype)
        S = S.addr_(mean, mean) if S is not moment.covariance else torch.addr(S, mean, mean)
    found = list(_reader_grams(space, reader, factor, S, values, moment.precision))
    if not found:
        return None
    activation, weight = (_together(parts) for parts in zip(*found, strict=True))
    rows = torch.full((len(activation),), effective_rows(moment), dtype=activation.dtype, device=activation.device)
    return Grams(activation, weight, moment.precision, rows)


def _copy_grams(space: FactorSpace, call: OpCall, factor: Factor, moment: Moment | None) -> Grams | None:
    """Return the evidence from a call that copies channels: it makes of each the channel itself, once for each copy."""
    axis = call.axes[call.arguments["self"]][call.arguments["dim"]]
    if moment is None or not (occurrences := channel_positions(space, axis, factor)):
        return None
    S = moment.second
    read = torch.tensor([source for source in call.arguments["table"] if source >= 0], dtype=torch.int64)
    copies = torch.bincount(read, minlength=len(S)).to(S)
    energy = float((copies * S.diagonal()).sum())
    if energy <= 0:
        return None
    D = torch.diag(copies / energy)
    places = [place for positions in occurrences for place in torch.from_numpy(positions).to(S.device).T]
    activation, weight = (torch.stack([one[place[:, None], place] for place in places]) for one in (S, D))
    rows = torch.full((len(places),), effective_rows(moment), dtype=S.dtype, device=S.device)
    return Grams(activation, weight, moment.precision, rows)


def _fits_single(moment: Moment) -> bool:
    """Tell whether products of second moments with weights are within the range of single precision."""
    largest = float(moment.squares().amax()) if len(moment.mean) else 0.0
    return largest == 0 or 1e-20 < largest < 1e20


def _together(parts: Sequence[Tensor]) -> Tensor:
    """Return matrices one behind another; one alone is not copied, as it may be as large as a layer."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _reader_grams(
    space: FactorSpace, reader: Reader, factor: Factor, S: Tensor, weight: Tensor, precision: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (S, D) [positions each, width, width] for each occurrence of a factor in what a reader contracts."""
    occurrences = channel_positions(space, reader.axis, factor)
    if not occurrences:
        return
    blocks = real_rows(reader.blocks(weight)).to(S.dtype)
    size = blocks.shape[2]
    D = torch.bmm(blocks.transpose(1, 2), blocks)
    inside = S.reshape(len(D), size, len(D), size).diagonal(dim1=0, dim2=2)
    products = zip(D.permute(1, 2, 0).split(_ROWS), inside.split(_ROWS), strict=True)
    energy = sum(float((one * other).sum()) for one, other in products)
    # A reader that reads rounding errors alone is skipped.
    most = float(D.diagonal(dim1=1, dim2=2).sum() * S.diagonal().amax())
    if energy <= most * (ROUNDING * precision) ** 2:
        return
    D /= energy
    for positions in occurrences:
        owners = positions // size
        # A factor that tells the groups of a convolution apart goes through it and is not read by it.
        if (owners != owners[:1]).any():
            continue
        if positions.shape == (size, 1) and (positions[:, 0] % size == np.arange(size)).all():
            yield inside[None, :, :, owners[0, 0]], D[owners[0, 0]][None]
            continue
        place = torch.from_numpy(positions % size).to(S.device).T
        owner = torch.from_numpy(owners[0]).to(S.device)
        rows, columns = place[:, :, None], place[:, None, :]
        yield inside[rows, columns, owner[:, None, None]], D[owner[:, None, None], rows, columns]


def _product_squares(analysis: Analysis, factor: Factor, moments: Moments) -> Iterator[Tensor]:
    """Yield E q_j^2 E k_j^2 per channel for each product of two activations over a factor, [width]."""
    by_call: dict[OpCall, list[Key]] = {}
    for key in moments.squares:
        by_call.setdefault(analysis.calls[key[0]], []).append(key)
    for call, keys in by_call.items():
        contraction = call.contractions[0]
        axis = call.axes[contraction.left][contraction.left_dims[0]]
        product = moments.squares[keys[0]] * moments.squares[keys[-1]]
        for positions in channel_positions(analysis.space, axis, factor):
            # Where both are divided into groups, these are samples of one and the same channels.
            yield product[torch.from_numpy(positions % len(product)).to(product.device)].sum(1)
