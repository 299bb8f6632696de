"""Predicting dropped channels from kept ones, with as much caution as the evidence asks for."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from fxwidth.observation import Moment

_SMALLEST_RIDGE = 1e-13
_ITERATIONS = 12


def regression(moment: Moment, kept: Tensor, dropped: Tensor, readings: Tensor, *, centred: bool) -> Tensor:
    """Return R [dropped, kept] with which the kept channels best predict the dropped ones, as their reader weighs them.

    Args:
        moment: the channels' moments.
        kept: the kept channels.
        dropped: the dropped channels.
        readings: the reader's columns for the dropped channels, [rows, dropped].
        centred: whether a constant may be added to the prediction.

    Source: the ridge is that of Hoerl, Kennard and Baldwin, Ridge Regression: Some Simulations (1975), found by
        iteration: it is in proportion to what stays unexplained, and so vanishes for dependent channels.
    """
    S = moment.covariance if centred else moment.second
    to_kept, to_dropped = S[kept][:, kept], S[kept][:, dropped]
    # A channel that never varies has a covariance of rounding errors, from which nothing can be predicted.
    rounding = (16 * moment.precision) ** 2 * moment.second.diagonal()[kept]
    variance = to_kept.diagonal()
    scale = torch.where(variance > rounding, variance.clamp_min(torch.finfo(S.dtype).tiny).rsqrt(), 0.0)
    correlation = to_kept * scale[:, None] * scale[None, :]
    target = to_dropped * scale[:, None]
    energy = S.diagonal()[dropped]
    weights = readings.square().sum(0)
    smallest = max(_SMALLEST_RIDGE, 10 * moment.precision)
    share = len(kept) / effective_rows(moment)
    ridge, previous = share, 0.0
    for _ in range(_ITERATIONS):
        solution = _solve(correlation, target, max(ridge, smallest))
        if ridge <= smallest or 0.8 < ridge / (previous or 1.0) < 1.25:
            break
        explained = 2 * (solution * target).sum(0) - (solution * (correlation @ solution)).sum(0)
        unexplained = float((weights * (energy - explained).clamp_min(0)).sum())
        size = float((weights * solution.square().sum(0)).sum())
        freedom = max(1e-3, 1 - share)
        previous, ridge = ridge, min(1.0, share * unexplained / freedom / size) if size > 0 else 0.0
    if ridge <= smallest:
        # One step of refinement takes off what even this ridge keeps from channels that depend exactly.
        solution = solution + _solve(correlation, target - correlation @ solution, smallest)
    return (solution * scale[:, None]).T


def effective_rows(moment: Moment) -> float:
    """Return how many independent rows a moment is worth: neighbouring pixels or tokens tell much the same."""
    return sqrt(moment.samples * moment.rows)


def _solve(correlation: Tensor, target: Tensor, ridge: float) -> Tensor:
    """Solve (correlation + ridge) X = target; where that is singular to rounding, with the smallest X."""
    identity = torch.eye(len(correlation), dtype=correlation.dtype, device=correlation.device)
    factor, failed = torch.linalg.cholesky_ex(correlation + ridge * identity)
    if not bool(failed):
        return torch.cholesky_solve(target, factor)
    values, vectors = torch.linalg.eigh(correlation)
    large = values > max(ridge, len(values) * torch.finfo(values.dtype).eps) * values[-1]
    inverse = torch.where(large, 1 / values.where(large, torch.ones_like(values)), 0.0)
    solution: Tensor = vectors @ (inverse[:, None] * (vectors.T @ target))
    return solution
