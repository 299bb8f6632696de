"""Forward selection: each channel is the one that tells readers most beside those before it."""

from __future__ import annotations

import torch
from torch import Tensor

from fxwidth.selection.grams import ROUNDING, Grams
from fxwidth.selection.registry import selection_method

# From this width on channels are chosen by blocks, which is faster and does a little worse.
_BLOCKWISE = 384
# How many channels are chosen, from how many times as many candidates, before wide matrices are brought up to date.
_BLOCK = 32
_CANDIDATES = 2
# How many columns of wide matrices are multiplied at a time.
_COLUMNS = 512
# When so many of them are left, they are brought together in smaller matrices.
_LEFT = 0.75


@selection_method("greedy", nested=True)
def greedy_order(grams: Grams, count: int) -> Tensor:
    """Return channels in the order in which they explain most of what is still unexplained.

    With E = S, the next channel j has the largest sum over grams of E_j^T D E_j / E_jj, and E loses E_j E_j^T / E_jj:
    E is what the best linear prediction from the chosen channels leaves of S, and tr(D E) what the readers miss.
    Orders are nested: what is chosen first does not depend on the count.

    Source: forward selection by orthogonal least squares, Chen, Billings and Luo (1989), weighted by the readers.
    """
    del count
    return _by_blocks(grams) if grams.width >= _BLOCKWISE else _one_by_one(grams)


def _one_by_one(grams: Grams) -> Tensor:
    S, D = grams.activation, grams.weight
    variance = S.diagonal(dim1=1, dim2=2).clone()
    negligible = negligible_variance(grams, variance)
    gain = (torch.bmm(D, S) * S).sum(1)
    tie_break = tie_breaking(grams)
    chosen: list[Tensor] = []
    taken = torch.zeros(S.shape[2], dtype=torch.bool, device=S.device)
    explained = S.new_zeros(S.shape)
    for step in range(S.shape[2]):
        open_ = variance > negligible
        score = torch.where(open_, gain.clamp_min(0) / variance.where(open_, torch.ones_like(variance)), 0.0).sum(0)
        j = (score + tie_break).masked_fill(taken, -1.0).argmax()
        chosen.append(j)
        taken[j] = True
        past = explained[:, :, :step]
        own = S[:, :, j] - _times(past, past[:, j])
        # Where the channel is explained already it has nothing to take away.
        scale = torch.where(open_[:, j], variance[:, j], torch.inf)[:, None]
        DE = _times(D, own)
        EDU = _times(S, DE) - _times(past, _times(past.transpose(1, 2), DE))
        UDU = (own * DE).sum(1, keepdim=True)
        gain = gain - 2 * own / scale * EDU + (own / scale).square() * UDU
        variance = variance - own.square() / scale
        explained[:, :, step] = own / scale.sqrt()
    return torch.stack(chosen)


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Return the product of each matrix [pairs, n, m] with its vector [pairs, m]."""
    return torch.bmm(matrices, vectors[:, :, None])[:, :, 0]


def _by_blocks(grams: Grams) -> Tensor:
    """Choose several channels at a time from the best candidates, greedily among these: matrix products all through."""
    D, E = grams.weight, grams.activation.clone()
    width = grams.width
    negligible = negligible_variance(grams, E.diagonal(dim1=1, dim2=2))
    tie_break = tie_breaking(grams)
    gain = torch.cat([(torch.bmm(D, part) * part).sum(1) for part in E.split(_COLUMNS, dim=2)], 1)
    labels = torch.arange(width, device=E.device)
    taken = torch.zeros(width, dtype=torch.bool, device=E.device)
    chosen: list[Tensor] = []
    while (left := int((~taken).sum())) > 0:
        if left <= _LEFT * len(taken):
            # What is taken is explained: its rows of E are zero by now.
            rest = torch.nonzero(~taken)[:, 0]
            E = E[:, rest[:, None], rest]
            D = D[:, rest[:, None], rest]
            gain, negligible, tie_break = gain[:, rest], negligible[:, rest], tie_break[rest]
            labels, taken = labels[rest], taken[rest]
        score = _score(gain, E.diagonal(dim1=1, dim2=2), negligible) + tie_break
        candidates = score.masked_fill(taken, -1.0).topk(min(left, _CANDIDATES * _BLOCK)).indices
        columns = E[:, :, candidates]
        DE = torch.bmm(D, columns)
        inner = torch.bmm(columns.transpose(1, 2), DE)
        closed = negligible[:, candidates]
        best = _among(columns[:, candidates], inner, closed, tie_break[candidates], min(left, _BLOCK))
        picked = candidates[best]
        chosen.append(labels[picked])
        taken[picked] = True
        U, DU = _orthonormal(columns[:, :, best], DE[:, :, best], picked, closed[:, best])
        EDU = torch.bmm(E, DU)
        UDU = torch.bmm(U.transpose(1, 2), DU)
        gain = gain - 2 * (U * EDU).sum(2) + (torch.bmm(U, UDU) * U).sum(2)
        E.baddbmm_(U, U.transpose(1, 2), alpha=-1)
    return torch.cat(chosen)


def _score(gain: Tensor, variance: Tensor, negligible: Tensor) -> Tensor:
    open_ = variance > negligible
    return torch.where(open_, gain.clamp_min(0) / variance.where(open_, torch.ones_like(variance)), 0.0).sum(0)


def _among(E: Tensor, G: Tensor, negligible: Tensor, tie_break: Tensor, count: int) -> Tensor:
    """Return so many of a few candidates, greedily, from E among them and G = E^T D E over all channels."""
    E, G = E.clone(), G.clone()
    taken = torch.zeros(E.shape[1], dtype=torch.bool, device=E.device)
    chosen = []
    for _ in range(count):
        variance = E.diagonal(dim1=1, dim2=2)
        score = _score(G.diagonal(dim1=1, dim2=2), variance, negligible) + tie_break
        j = int(score.masked_fill(taken, -1.0).argmax())
        chosen.append(j)
        taken[j] = True
        scale = torch.where(variance[:, j] > negligible[:, j], variance[:, j], torch.inf)[:, None]
        own = E[:, j] / scale
        pulled = G[:, j].clone()
        # Every column loses its share of the chosen one, and G does so on both sides.
        G = G - pulled[:, :, None] * own[:, None] - own[:, :, None] * pulled[:, None]
        G = G + pulled[:, j, None, None] * own[:, :, None] * own[:, None]
        E = E - own[:, :, None] * E[:, j].clone()[:, None]
    return torch.tensor(chosen, device=E.device)


def _orthonormal(columns: Tensor, DE: Tensor, picked: Tensor, negligible: Tensor) -> tuple[Tensor, Tensor]:
    """Return U with U U^T = E_B E_BB^-1 E_B^T for the picked columns of E, and D U from D E_B.

    Channels that hold nothing new have nothing to take away.
    """
    inner = columns[:, picked]
    count = inner.shape[1]
    U, DU = torch.zeros_like(columns), torch.zeros_like(DE)
    rest = inner.clone()
    triangle = torch.zeros_like(inner)
    for k in range(count):
        pivot = rest[:, k, k]
        root = torch.where(pivot > negligible[:, k], pivot, torch.inf).sqrt()[:, None]
        triangle[:, :, k] = rest[:, :, k] / root
        rest = rest - triangle[:, :, k, None] * triangle[:, None, :, k]
    pivots = triangle.diagonal(dim1=1, dim2=2)
    live = pivots > 0
    solvable = torch.where(live[:, None, :], triangle.tril(), 0.0) + torch.diag_embed((~live).to(triangle.dtype))
    U = torch.linalg.solve_triangular(solvable, columns.transpose(1, 2), upper=False).transpose(1, 2)
    DU = torch.linalg.solve_triangular(solvable, DE.transpose(1, 2), upper=False).transpose(1, 2)
    return U * live[:, None, :], DU * live[:, None, :]


# A channel whose variance is explained up to this share of it, times the precision of the numbers, holds nothing new.
_EXPLAINED = 1e3


def negligible_variance(grams: Grams, variance: Tensor) -> Tensor:
    """Return the variance below which a channel holds nothing but rounding errors, [pairs, width]."""
    # What rounding leaves in a channel that is constant says nothing, however well it fits.
    rounding = variance.amax(1, keepdim=True) * (ROUNDING * grams.precision) ** 2
    return (variance * min(0.5, _EXPLAINED * grams.precision)).maximum(rounding)


def tie_breaking(grams: Grams) -> Tensor:
    """Return a small score per channel: what is explained first is decided by variance where samples are few."""
    energy = (grams.weight.diagonal(dim1=1, dim2=2) * grams.activation.diagonal(dim1=1, dim2=2)).sum(0)
    return energy / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny) * _EXPLAINED * grams.precision
