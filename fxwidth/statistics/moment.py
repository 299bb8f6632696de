"""The first two moments of the channels of an activation."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moment:
    """The first two moments of one activation's channels.

    Attributes:
        mean: E h, [channels].
        covariance: Cov h, [channels, channels].
        rows: how many vectors h they were taken from; pixels and tokens are vectors of their own.
        samples: how many inputs these came from.
        precision: the rounding unit of the numbers they were computed from.
    """

    mean: Tensor
    covariance: Tensor
    rows: int
    samples: int
    precision: float

    @property
    def second(self) -> Tensor:
        """E h h^T, [channels, channels]."""
        return torch.addr(self.covariance, self.mean, self.mean)

    def squares(self) -> Tensor:
        """E h_j^2, [channels]."""
        return self.covariance.diagonal() + self.mean.square()

    def entries(self, rows: Tensor, columns: Tensor, *, centred: bool) -> Tensor:
        """Return a copy of some entries of the covariance, or of E h h^T, [rows, columns]."""
        entries = self.covariance[rows[:, None], columns]
        return entries if centred else entries.addr_(self.mean[rows], self.mean[columns])


def effective_rows(moment: Moment) -> float:
    """Return how many independent rows a moment is worth: neighbouring pixels or tokens tell much the same."""
    return sqrt(moment.samples * moment.rows)
