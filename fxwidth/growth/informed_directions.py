"""Methods of growth that look at the task."""

from __future__ import annotations

import torch
from torch import Tensor

from fxwidth.growth.directions import TaskMoments, growth_direction, mean_norm, orthogonal_directions

# Added to the second moment of the inputs, in units of its mean variance: what hardly varies must not be divided by.
_RIDGE = 1e-2
# A singular value below this share of the largest is rounding.
_NEGLIGIBLE = 1e-9


@growth_direction("gradmax", needs=["cross"])
def gradmax_directions(rows: Tensor, count: int, generator: torch.Generator, seen: TaskMoments) -> Tensor:
    """Return the new rows for which the gradient by what reads them is largest: left singular vectors.

    In the source the new channels are silent because their writers are zero, where a ReLU passes no gradient on; here
    their readers are, and the roles of the two are exchanged.

    Args:
        rows: [channels, columns], in single or double precision.
        count: how many to make.
        generator: a source of random numbers on the CPU.
        seen: with `cross`.

    Source: Evci et al., GradMax: Growing Neural Networks using Gradient Information, 2022.
    """
    assert seen.cross is not None
    return _both_signs(_left_vectors(seen.cross), rows, count, generator)


@growth_direction("tiny", needs=["inputs_second", "residual"])
def tiny_directions(rows: Tensor, count: int, generator: torch.Generator, seen: TaskMoments) -> Tensor:
    """Return the new rows that best add what the present channels lack: whitened left singular vectors.

    Args:
        rows: [channels, columns], in single or double precision.
        count: how many to make.
        generator: a source of random numbers on the CPU.
        seen: with `inputs_second` and `residual`.

    Source: Verbockhaven et al., Growing Tiny Networks: Spotting Expressivity Bottlenecks and Fixing Them Optimally,
        2024; its S^(-1/2) U is L^(-T) U by the Cholesky factor L of S.
    """
    assert seen.inputs_second is not None
    assert seen.residual is not None
    sizes = [len(second) for second in seen.inputs_second]
    factors = [_factor(second) for second in seen.inputs_second]
    parts = zip(factors, seen.residual.split(sizes), strict=True)
    whitened = torch.cat([torch.linalg.solve_triangular(factor, part, upper=False) for factor, part in parts])
    parts = zip(factors, _left_vectors(whitened).mT.split(sizes), strict=True)
    made = torch.cat([torch.linalg.solve_triangular(factor.mT, part, upper=True) for factor, part in parts])
    return _both_signs(made.mT, rows, count, generator)


def _factor(second: Tensor) -> Tensor:
    """Return the Cholesky factor of a second moment, and of a little of its mean variance in all directions."""
    ridge = _RIDGE * second.diagonal().mean().clamp_min(torch.finfo(second.dtype).tiny)
    factor: Tensor = torch.linalg.cholesky(second + ridge * torch.eye(len(second)).to(second))
    return factor


def _left_vectors(matrix: Tensor) -> Tensor:
    """Return the left singular vectors of a matrix with singular values above rounding, one a row."""
    vectors, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    kept = (values > _NEGLIGIBLE * values[:1]) & (values > 0)
    left: Tensor = vectors[:, kept].mT
    # The sign is arbitrary; that of the sum of the entries is the same on every machine.
    signs = torch.where(left.sum(1, keepdim=True) < 0, -1.0, 1.0)
    return left * signs.to(left)


def _both_signs(made: Tensor, rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return as many rows as are wanted: those made, their opposites, which a ReLU tells apart, and orthogonal ones."""
    made = torch.nn.functional.normalize(made, dim=1)
    made = torch.cat([made, -made])[:count].to(rows) * mean_norm(rows)
    missing = count - len(made)
    return torch.cat([made, orthogonal_directions(torch.cat([rows, made]), missing, generator)]) if missing else made
