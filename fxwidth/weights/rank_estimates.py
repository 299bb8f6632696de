"""How many dimensions a spectrum has: by its shape, and by what noise alone would look like."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

_POINTS = 20_001
_BISECTIONS = 60


def effective_rank(values: Values) -> float:
    """Return exp of the entropy of singular values taken as shares of their sum: n for n equal ones; 0 for none.

    Source: O. Roy and M. Vetterli, The Effective Rank: A Measure of Effective Dimensionality (2007).
    """
    total = float(values.sum())
    if total <= 0:
        return 0.0
    shares = values[values > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def stable_rank(values: Values) -> float:
    """Return the sum of the squared singular values over the largest of them; 0 for a matrix of zeros.

    Source: M. Rudelson and R. Vershynin, Sampling from Large Matrices: An Approach through Geometric Functional
        Analysis (2007).
    """
    largest = float(values.max(initial=0.0))
    return float(np.square(values / largest).sum()) if largest > 0 else 0.0


def gavish_donoho_rank(values: Values, rows: int, columns: int) -> int:
    """Return how many singular values of a matrix are worth keeping if the others are white noise of unknown level.

    Kept is what exceeds omega(beta) times the median, which loses least of a low-rank signal in mean square.

    Args:
        values: min(rows, columns) singular values; zeros beyond these are not looked at.
        rows: of the matrix.
        columns: of the matrix.

    Source: M. Gavish and D. L. Donoho, The Optimal Hard Threshold for Singular Values is 4 / sqrt(3) (2014).
    """
    values = np.sort(values)[::-1][: min(rows, columns)]
    beta = min(rows, columns) / max(rows, columns)
    root = math.sqrt(beta**2 + 14 * beta + 1)
    threshold = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + root)) / math.sqrt(marchenko_pastur_median(beta))
    return int(np.count_nonzero(values > threshold * np.median(values)))


def marchenko_pastur_rank(values: Values, rows: int, columns: int) -> int:
    """Return how many singular values lie above all that white noise of the same median could have.

    Source: V. A. Marchenko and L. A. Pastur, Distribution of Eigenvalues for Some Sets of Random Matrices (1967): the
        edge of the bulk is sigma (sqrt(rows) + sqrt(columns)).
    """
    values = np.sort(values)[::-1][: min(rows, columns)]
    beta = min(rows, columns) / max(rows, columns)
    edge = (1 + math.sqrt(beta)) / math.sqrt(marchenko_pastur_median(beta))
    return int(np.count_nonzero(values > edge * np.median(values)))


def marchenko_pastur_median(beta: float) -> float:
    """Return the median of the Marchenko-Pastur distribution with unit variance and shape beta in (0, 1].

    It is that of the squared singular values of an n x m matrix of unit white noise, over m, for n / m = beta.
    """
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    # With x = middle - half * cos(t) the density has no singularity but the integrable one at zero.
    t = np.linspace(0.0, np.pi, _POINTS)
    middle, half = (high + low) / 2, (high - low) / 2
    x = middle - half * np.cos(t)
    density = np.where(x > 0, (half * np.sin(t)) ** 2 / np.where(x > 0, x, 1.0), 2 * half * (beta >= 1.0))
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(np.interp(mass[-1] / 2, mass, x))
