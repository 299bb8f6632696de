"""Width curves: what is predicted to be lost at every width of a group, all in one pass."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxwidth.selection.grams import Grams

Errors = npt.NDArray[np.float64]

# The ridge, in units of a channel's variance and the precision of the numbers, that keeps the decomposition stable.
_RIDGE = 30.0
_ENTRIES = 2**26
# How many columns of a wide matrix are worked on at a time.
_COLUMNS = 512
_LEAST_SHARE = 1e-12
_TRIFLE = 1e-8
# What more channels would bring is told by the last one in so many.
_LAST = 8
# Channels that bring nothing are guessed to bring this share of an average one's, so that a budget is spent.
_AT_LEAST = 1e-3
# How much a gain that is guessed counts beside a loss that is measured: trained channels are not given up for less.
_TRUST = 0.25


def lost_share(grams: Grams, order: Tensor) -> Errors:
    """Return the share of their outputs that readers miss of the first k channels of an order, for every k, [n + 1].

    It is tr(D E_k) summed over grams, and so over readers, each of which weighs one if it reads this group alone. With
    S in that order L L^T, what remains of S after k channels is the sum of l_j l_j^T for the columns j >= k of L: one
    decomposition gives the errors of all widths. Few rows make that too small: k coefficients fitted to m rows miss
    (m + k) / (m - k) times as much of others. Beyond k = m / 2 every channel is taken to bring the same.

    Args:
        grams: what readers see and want of the channels.
        order: all channels, those that are kept first in front.

    Source: the factor is that of D. M. Allen, Mean Square Error of Prediction as a Criterion for Selecting Variables
        (1971), for the fit's own rows against new ones.
    """
    width = grams.width
    total = torch.zeros(width + 1, dtype=torch.float64, device=grams.activation.device)
    step = max(1, _ENTRIES // width**2)
    for first in range(0, len(grams.activation), step):
        own = slice(first, first + step)
        L = _factor(grams.activation[own], order, grams.precision)
        parts = _energies(grams.weight[own], order, L).clamp_min(0).double()
        errors = torch.cat([parts, parts.new_zeros(len(parts), 1)], 1).flip(1).cumsum(1).flip(1)
        rows = None if grams.rows is None else grams.rows[own].double()
        total += (errors if rows is None else _of_other_rows(errors, rows)).sum(0)
    return np.asarray(total.cpu().numpy(), dtype=np.float64)


def _of_other_rows(errors: Tensor, rows: Tensor) -> Tensor:
    """Return what errors [pairs, n + 1] on so many rows [pairs] lead to expect of other rows."""
    kept = torch.arange(errors.shape[1], dtype=errors.dtype, device=errors.device)[None].expand_as(errors)
    rows = rows[:, None]
    last = (rows / 2).clamp(1, errors.shape[1] - 1).floor().expand(-1, 1)
    inside = torch.minimum(kept, last)
    factor = torch.where(rows.isinf(), 1.0, (rows + inside) / (rows - inside).clamp_min(1e-300))
    expected = errors.gather(1, inside.long()) * factor
    rest = (errors.shape[1] - 1 - kept) / (errors.shape[1] - 1 - last).clamp_min(1)
    expected = torch.where(kept > last, expected * rest, expected)
    return torch.minimum(expected, errors[:, :1]).cummin(1).values


def logarithmic(lost: Errors) -> Errors:
    """Return -log of the share that is kept, times what there is to lose; zero where nothing is read.

    Shares multiply from layer to layer, and so their logarithms add up; and to lose all of something has no price.
    Where few rows cannot tell widths apart, as behind a plateau, the wider one is a trifle better.

    Args:
        lost: what is lost at every width from none to all, [n + 1].
    """
    total = float(lost[0])
    if total <= 0:
        return np.zeros_like(lost)
    errors = 0.0 - np.log(np.clip(1.0 - lost / total, _LEAST_SHARE, 1.0)) * total
    return np.asarray(errors * np.linspace(1.0 + _TRIFLE, 1.0, len(lost)), dtype=np.float64)


def extended(errors: Errors, width: int) -> Errors:
    """Return the errors of widths up to one beyond the present, by what the last channels bring, [width + 1].

    More of what is scarce brings less each time: with m what each of the last eighth of W channels brings, w of them
    are guessed to lower the error by m W (1 - W / w), of which a quarter counts. All errors are raised by the same, so
    that none is below zero.

    Args:
        errors: those of all widths from none to W, [W + 1].
        width: the largest one; at most W for none beyond.
    """
    present = len(errors) - 1
    if width <= present:
        return errors
    last = max(1, present // _LAST)
    # Where the last channels bring nothing, any more of them bring next to nothing; groups share what is left evenly.
    brought = max(float(errors[-1 - last] - errors[-1]) / last, _AT_LEAST * float(errors[0]) / present)
    wider = np.arange(present + 1, width + 1, dtype=np.float64)
    gains = _TRUST * brought * present * (1 - present / wider)
    return np.concatenate([errors + gains[-1], errors[-1] + gains[-1] - gains])


def share_of(errors: Errors) -> Errors:
    """Return the share that is lost at every width, from what `logarithmic` has made of it."""
    total = float(errors[0]) / -np.log(_LEAST_SHARE)
    return np.asarray(-np.expm1(-errors / total), dtype=np.float64) if total > 0 else np.zeros_like(errors)


def _factor(S: Tensor, order: Tensor, precision: float) -> Tensor:
    """Return the lower triangular L of S = L L^T in an order, [pairs, n, n], with a ridge where rounding asks."""
    variance = S.diagonal(dim1=1, dim2=2)
    # Channels are brought to one scale, so that the ridge is as small for the quiet ones.
    scale = variance.clamp_min(torch.finfo(S.dtype).tiny).sqrt()[:, order]
    ridge = _RIDGE * max(precision, torch.finfo(S.dtype).eps)
    failed = torch.zeros(len(S), dtype=torch.int32, device=S.device)
    while True:
        # In place all through, since these matrices may be as large as a layer. The transpose of a symmetric matrix is
        # laid out as the decomposition wants it.
        L = S[:, order[:, None], order].div_(scale[:, :, None]).div_(scale[:, None]).mT
        L.diagonal(dim1=1, dim2=2).add_(ridge)
        torch.linalg.cholesky_ex(L, out=(L, failed))
        if not bool(failed.any()):
            return L.mul_(scale[:, :, None])
        ridge *= 10


def _energies(D: Tensor, order: Tensor, L: Tensor) -> Tensor:
    """Return l_j^T D l_j for the columns of L, whose rows are in an order, [pairs, n]."""
    parts = []
    for columns in L.split(_COLUMNS, dim=2):
        placed = torch.empty_like(columns)
        placed[:, order] = columns
        parts.append((torch.bmm(D, placed) * placed).sum(1))
    return torch.cat(parts, 1)
