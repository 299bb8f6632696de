"""Predicting dropped channels from kept ones, with as much caution as the evidence asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from fxwidth.statistics.moment import Moment, effective_rows

_SMALLEST_RIDGE = 1e-13
_ITERATIONS = 12
# The number of channels, as a share of the rows, beyond which these are few.
_FEW = 0.5


def regression(moment: Moment, kept: Tensor, dropped: Tensor, weights: Tensor, *, centred: bool) -> Tensor:
    """Return R [dropped, kept] with which the kept channels best predict the dropped ones, as their reader weighs them.

    Args:
        moment: the channels' moments.
        kept: the kept channels.
        dropped: the dropped channels.
        weights: the sum of squares of the reader's column for each dropped channel, [dropped].
        centred: whether a constant may be added to the prediction.

    Source: the ridge is that of Hoerl, Kennard and Baldwin, Ridge Regression: Some Simulations (1975), found by
        iteration from a large one: it is in proportion to what stays unexplained, and so vanishes for dependent
        channels. The iteration may end where the ridge itself keeps most from being explained; least squares, whose
        error on other rows is told by generalized cross-validation (Golub, Heath and Wahba, 1979), is then better,
        and the ridge becomes the one step from it that the first source takes.
    """
    # Matrices are worked on in place where they can be: they may be as large as a layer.
    correlation, target = (moment.entries(kept, columns, centred=centred) for columns in (kept, dropped))
    square = moment.squares()
    # A channel that never varies has a covariance of rounding errors, from which nothing can be predicted.
    nothing = (16 * moment.precision) ** 2 * square[kept]
    variance = correlation.diagonal().clone()
    scale = torch.where(variance > nothing, variance.clamp_min(torch.finfo(variance.dtype).tiny).rsqrt(), 0.0)
    correlation.mul_(scale[:, None]).mul_(scale)
    target.mul_(scale[:, None])
    energy = (moment.covariance.diagonal() if centred else square)[dropped]
    smallest = max(_SMALLEST_RIDGE, 10 * moment.precision)
    share = len(kept) / effective_rows(moment)

    def unexplained_by(solution: Tensor) -> float:
        explained = torch.addmm(target, correlation, solution, beta=2, alpha=-1).mul_(solution).sum(0)
        return float((weights * (energy - explained).clamp_min(0)).sum())

    def next_ridge(solution: Tensor, unexplained: float) -> float:
        size = float((weights * torch.linalg.vector_norm(solution, dim=0).square()).sum())
        freedom = max(1e-3, 1 - share)
        return min(1.0, share * unexplained / freedom / size) if size > 0 else 0.0

    ridge, previous = share, 0.0
    for _ in range(_ITERATIONS):
        solution = _solve(correlation, target, max(ridge, smallest))
        if ridge <= smallest or 0.8 < ridge / (previous or 1.0) < 1.25:
            break
        previous, ridge = ridge, next_ridge(solution, unexplained_by(solution))
    if smallest < ridge and share <= _FEW:
        least_squares = _solve(correlation, target, smallest)
        unexplained = unexplained_by(least_squares)
        # Dropped channels that depend on small differences of kept ones look like noise to any larger ridge. What it
        # leaves unexplained is counted as if it had cost no degree of freedom, so that only a clear gain counts.
        if unexplained / (1 - share) ** 2 < unexplained_by(solution):
            ridge = next_ridge(least_squares, unexplained)
            solution = least_squares if ridge <= smallest else _solve(correlation, target, ridge)
    if ridge <= smallest:
        # One step of refinement takes off what even this ridge keeps from channels that depend exactly.
        residual = torch.addmm(target, correlation, solution, alpha=-1)
        solution.add_(_solve(correlation, residual, smallest))
    return solution.mul_(scale[:, None]).T


def _solve(correlation: Tensor, target: Tensor, ridge: float) -> Tensor:
    """Solve (correlation + ridge) X = target; where that is singular to rounding, with the smallest X."""
    # The transpose of a symmetric matrix is laid out as the decomposition wants it, and then needs no other copy.
    factor = correlation.clone().mT
    factor.diagonal().add_(ridge)
    failed = torch.zeros((), dtype=torch.int32, device=factor.device)
    torch.linalg.cholesky_ex(factor, out=(factor, failed))
    if not bool(failed):
        return torch.cholesky_solve(target, factor)
    del factor
    values, vectors = torch.linalg.eigh(correlation)
    large = values > max(ridge, len(values) * torch.finfo(values.dtype).eps) * values[-1]
    inverse = torch.where(large, 1 / values.where(large, torch.ones_like(values)), 0.0)
    solution: Tensor = vectors @ (inverse[:, None] * (vectors.T @ target))
    return solution
