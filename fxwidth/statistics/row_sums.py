"""Sums over the rows of activations, taken batch by batch, and over the data of several ranks."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxwidth.runtime.finiteness import accumulation_dtype
from fxwidth.runtime.process_groups import Ranks
from fxwidth.runtime.tensor_slots import real_rows
from fxwidth.statistics.moment import Moment

# How many channels are multiplied with all at a time.
_CHANNELS = 512

# Between these, sums of squares are far from the ends of single precision.
_LEAST, _MOST = 1e-14, 1e15


@dataclass(frozen=True)
class _Told:
    """What a rank tells of a sum, by which others can make an empty one."""

    kind: type[RowSum | Average]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    counts: tuple[int, ...]
    precision: float = 0.0

    def empty(self) -> RowSum | Average:
        """Return a sum of nothing."""
        zeros = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return self.kind.of_nothing(zeros, self.precision)


class RowSum:
    """Mean and covariance of rows, accumulated batch by batch about the first batch's mean, for precision."""

    def __init__(self) -> None:
        self.rows = 0
        self.samples = 0
        self._origin: Tensor | None = None

    def _begin(self, origin: Tensor, precision: float) -> None:
        self._precision, self._origin = precision, origin
        self._first = torch.zeros_like(origin)
        self._second = self._first.new_zeros(len(origin), len(origin))

    def add(self, rows: Tensor, samples: int) -> None:
        """Take in rows, [rows, channels], of so many samples; real and imaginary parts are seen one by one."""
        rows = real_rows(rows)
        wide = accumulation_dtype(rows)
        work = rows if rows.dtype == torch.float64 else rows.float()
        if self._origin is None:
            self._begin(work.to(wide).mean(0), torch.finfo(work.dtype).eps)
            assert self._origin is not None
        if work.dtype != wide and not _has_squares(work):
            work = work.to(wide)
        shifted = work - self._origin.to(work.dtype)
        self._first += shifted.to(wide).sum(0)
        # Part by part: where the sum is as large as the model, another of its size is too much.
        for part, channels in zip(self._second.split(_CHANNELS), shifted.T.split(_CHANNELS), strict=True):
            part += channels @ shifted
        self.rows += len(rows)
        self.samples += samples

    def moment(self) -> Moment:
        """Return the moments of all rows; the sum is used up by it."""
        assert self._origin is not None
        shift = self._first / self.rows
        covariance = self._second.div_(self.rows).addr_(shift, shift, alpha=-1)
        del self._second
        return Moment(self._origin + shift, covariance, self.rows, self.samples, self._precision)

    @classmethod
    def of_nothing(cls, zeros: Tensor, precision: float) -> RowSum:
        """Return the sum of no rows, to which those of other ranks can be added."""
        result = cls()
        result._begin(zeros, precision)
        return result

    def told(self) -> _Told:
        """Return what others must know of it."""
        assert self._origin is not None
        shape, dtype, device = tuple(self._origin.shape), self._origin.dtype, self._origin.device.type
        return _Told(RowSum, shape, dtype, device, (self.rows, self.samples), self._precision)

    def pool(self, ranks: Ranks, known: Sequence[_Told]) -> None:
        """Add the rows of other ranks.

        Source: the update of T. F. Chan, G. H. Golub and R. J. LeVeque, Updating formulae and a pairwise algorithm for
        computing sample variances (1979).
        """
        assert self._origin is not None
        (total,) = ranks.sums("the means", [self._origin * self.rows + self._first])
        rows, samples = (sum(counts) for counts in zip(*(one.counts for one in known), strict=True))
        mean = total / rows
        shift = mean - self._origin
        moved = self._first - self.rows * shift
        # About the mean of all rows, in the place of the first batch's.
        own = self._second.addr_(self._first, shift, alpha=-1).addr_(shift, moved, alpha=-1)
        (self._second,) = ranks.sums("the second moments", [own])
        self._origin, self._first = mean, torch.zeros_like(mean)
        self.rows, self.samples, self._precision = rows, samples, max(one.precision for one in known)


def _has_squares(rows: Tensor) -> bool:
    """Tell whether the squares of the largest entries are within the range of single precision."""
    low, high = rows.aminmax()
    largest = max(-float(low), float(high))
    return largest == 0 or _LEAST < largest < _MOST


class Average:
    """The mean of arrays, weighted by what they are themselves averages of."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.weight = 0

    def add(self, values: Tensor, weight: int) -> None:
        """Take in one array that is the sum of so many."""
        self.total = values if self.total is None else self.total + values
        self.weight += weight

    def value(self) -> Tensor:
        """Return the mean so far."""
        assert self.total is not None
        return self.total / self.weight

    @classmethod
    def of_nothing(cls, zeros: Tensor, _precision: float) -> Average:
        """Return the mean of nothing, to which those of other ranks can be added."""
        result = cls()
        result.total = zeros
        return result

    def told(self) -> _Told:
        """Return what others must know of it."""
        assert self.total is not None
        return _Told(Average, tuple(self.total.shape), self.total.dtype, self.total.device.type, (self.weight,))

    def pool(self, ranks: Ranks, known: Sequence[_Told]) -> None:
        """Add those of other ranks."""
        assert self.total is not None
        (self.total,) = ranks.sums("the squares", [self.total])
        self.weight = sum(one.counts[0] for one in known)


def pool(ranks: Ranks, sums: dict[Hashable, RowSum | Average], keys: Sequence[Hashable]) -> None:
    """Make sums those over the data of all ranks; a rank may have seen nothing of some.

    Args:
        ranks: all of them come here.
        sums: by what they are of, of which there may be fewer than keys.
        keys: in the same order on all ranks.

    Raises:
        FxwidthError: one has failed, or could not be reached.
    """
    told = ranks.gather("the moments", [sums[key].told() if key in sums else None for key in keys])
    if not ranks.is_data_parallel:
        # All have seen the same.
        told = told[:1]
        if ranks.rank:
            sums.clear()
    for place, key in enumerate(keys):
        known = [one for own in told if (one := own[place]) is not None]
        if known:
            sums.setdefault(key, known[0].empty()).pool(ranks, known)
