"""The best weights of low rank for the inputs that a layer sees, and what each rank loses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxwidth.selection.error_curves import Errors
from fxwidth.statistics.moment import Moment


@dataclass(frozen=True)
class Spectrum:
    """A weight W [out, in] by the directions of its outputs, the one that varies most first.

    Attributes:
        directions: orthonormal, [out, ranks].
        lost: the share of the outputs' second moment (of their variance, where a bias takes their mean) that is lost by
            the first k directions alone, [ranks + 1].
        mean: that of the inputs, [in], where a bias can take over what it gives; else None.
    """

    directions: Tensor
    lost: Errors
    mean: Tensor | None


def spectrum_of(weight: Tensor, moment: Moment | None, *, has_bias: bool) -> Spectrum:
    """Return the spectrum of a weight for inputs of some moment: the singular vectors of W S^1/2, S = Cov x or E x x^T.

    Of all W' of rank k, U_k U_k^T W has the smallest E |(W - W') x|^2; with a bias, (W - W') E x goes to that.

    Args:
        weight: [out, in].
        moment: of the inputs; None for white ones.
        has_bias: whether the layer has one.

    Source: C. Eckart, G. Young, The Approximation of One Matrix by Another of Lower Rank (1936).
    """
    wide = weight.detach().double()
    mean: Tensor | None = None
    seen = wide
    if moment is not None:
        second = (moment.covariance if has_bias else moment.second).double().to(wide.device)
        values, vectors = torch.linalg.eigh(second)
        seen = wide @ (vectors * values.clamp_min(0).sqrt())
        mean = moment.mean.double().to(wide.device) if has_bias else None
    directions, singular, _ = torch.linalg.svd(seen, full_matrices=False)
    # What is nothing but rounding counts as nothing.
    least = max(seen.shape) * torch.finfo(weight.dtype).eps * singular[:1]
    energies = singular.where(singular > least, 0).square().cpu().numpy()
    total = energies.sum()
    tails = np.concatenate([np.cumsum(energies[::-1])[::-1], [0.0]])
    lost = tails / total if total > 0 else np.zeros_like(tails)
    return Spectrum(directions, np.asarray(lost, dtype=np.float64), mean)


def factors(weight: Tensor, spectrum: Spectrum, rank: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the weights [rank, in] and [out, rank] of two layers, and what is to be added to the bias of the second.

    Rows of the first are as long as columns of the second, so that both learn at one rate.
    """
    wide = weight.detach().double()
    kept = spectrum.directions[:, :rank]
    first = kept.T @ wide
    lengths = first.norm(dim=1, keepdim=True)
    scale = lengths.where(lengths > 0, 1).sqrt()
    first, second = first / scale, kept * scale.T
    shift = None if spectrum.mean is None else (wide - second @ first) @ spectrum.mean
    return first, second, shift
