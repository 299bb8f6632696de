"""Moments from few inputs, shrunk toward those that noise gives: data and weights together know more than either."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from fxwidth.statistics.moment import Moment
from fxwidth.statistics.moments import Moments
from fxwidth.statistics.observation_points import Measure, Probe

# Noise counts as much as this many rows per channel, and is left out where it would count for less than one part in:
_WEIGHT, _NEGLIGIBLE = 1.0, 32
# What is put together stands for the truth: no ridge for want of samples is added to it.
_PLENTY = 10**9
# Directions of less variance than this, in rounding units of the largest, do not exist.
_ROUNDING = 1e3


def shrunk(measured: Moments, noise: Callable[[], Moments | None], probes: Iterable[Probe] = ()) -> Moments:
    """Return moments in which what readers see of few inputs is drawn toward what they would see of noise.

    What the data have not shown at all, where a model goes another way for them than for its example, is that of noise.

    S = (m S_data + m0 S_noise) / (m + m0) for m rows (pixels and tokens are rows of their own) and m0 channels, S_noise
    brought to the energy of S_data. Dependencies between channels that the data show, with rows enough to tell, are
    kept.

    Args:
        measured: the moments of the data; their covariances are worked on in place, and are those of the result.
        noise: gives those of noise; called only if they count.
        probes: what is asked for.

    Source: the form is that of O. Ledoit and M. Wolf, A Well-Conditioned Estimator for Large-Dimensional Covariance
        Matrices (2004), with the covariance of noise in the place of the identity, and weights found by measurement.
    """
    few = any(_weight(moment) <= 1 - 1 / _NEGLIGIBLE for moment in measured.contracted.values())
    if not few and all(_is_known(probe, measured) for probe in probes):
        return measured
    free = noise()
    if free is None:
        return measured
    done: dict[int, Moment] = {}
    for key, moment in measured.contracted.items():
        other = free.contracted.get(key)
        if id(moment) not in done:
            done[id(moment)] = moment if other is None else _together(moment, other, _weight(moment))
    contracted = {key: done[id(moment)] for key, moment in measured.contracted.items()}
    return replace(
        measured,
        source=f"{measured.source} and noise",
        contracted={**free.contracted, **contracted},
        squares={**free.squares, **measured.squares},
        deviations={**free.deviations, **measured.deviations},
        products={**free.products, **measured.products},
        missed={node: reason for node, reason in measured.missed.items() if node in free.missed},
    )


def _is_known(probe: Probe, moments: Moments) -> bool:
    if probe.measure == Measure.DEVIATIONS:
        return probe.call.index in moments.deviations
    known = {Measure.MOMENT: moments.contracted, Measure.SQUARES: moments.squares, Measure.PRODUCTS: moments.products}
    return probe.keys[0] in known[probe.measure]


def _weight(moment: Moment) -> float:
    return moment.rows / (moment.rows + _WEIGHT * len(moment.mean))


def _together(moment: Moment, other: Moment, weight: float) -> Moment:
    energy = float(other.covariance.diagonal().sum())
    if energy <= 0:
        return moment
    share = (1 - weight) * float(moment.covariance.diagonal().sum()) / energy
    projection = _onto(moment) if moment.rows > 2 * len(moment.mean) else None
    free = other.covariance.to(moment.covariance)
    if projection is None:
        covariance = moment.covariance.mul_(weight).add_(free, alpha=share)
    else:
        half = projection @ free
        covariance = moment.covariance.addmm_(half, projection.T, beta=weight, alpha=share)
    return Moment(moment.mean, covariance, _PLENTY, _PLENTY, max(moment.precision, other.precision))


def _onto(moment: Moment) -> Tensor | None:
    """Return the projection onto the directions in which data vary, and channels that never do; None if all do."""
    S = moment.covariance
    variance = S.diagonal()
    live = torch.nonzero(variance > (16 * moment.precision) ** 2 * moment.squares().amax())[:, 0]
    if not len(live):
        return None
    root = variance[live].sqrt()
    least = _ROUNDING * max(moment.precision, torch.finfo(S.dtype).eps)
    # In place where it can be: these matrices may be as large as the model.
    if _is_regular(_correlation(S, live, root), least):
        return None
    values, vectors = torch.linalg.eigh(_correlation(S, live, root))
    basis = vectors[:, values > least]
    projection = torch.eye(len(S), dtype=S.dtype, device=S.device)
    projection[live[:, None], live] = (basis @ basis.T).mul_(root[:, None]).div_(root)
    return projection


def _correlation(S: Tensor, live: Tensor, root: Tensor) -> Tensor:
    return S[live[:, None], live].div_(root[:, None]).div_(root)


def _is_regular(correlation: Tensor, least: float) -> bool:
    """Tell whether all eigenvalues are above the least; the matrix is used up."""
    # The transpose of a symmetric matrix is laid out as the decomposition wants it.
    factor = correlation.mT
    factor.diagonal().sub_(least)
    failed = torch.zeros((), dtype=torch.int32, device=factor.device)
    torch.linalg.cholesky_ex(factor, out=(factor, failed))
    return not bool(failed)
