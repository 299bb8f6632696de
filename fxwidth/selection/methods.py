"""Orders of a group's channels, most useful first: one function for each method of selection.

All but magnitude take what readers see and want of the channels, `Grams`, and how many are to be kept, and return all
channels in an order whose first `count` are the choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.selection.grams import Grams
from fxwidth.selection.greedy import (
    greedy_order,
    negligible_variance,
    tie_breaking,
)
from fxwidth.selection.registry import PROJECTION, selection_method
from fxwidth.weights.writer_spectra import writer_norms

_BISECTIONS = 60


@selection_method("cholesky", nested=True)
def cholesky_order(grams: Grams, count: int) -> Tensor:
    """Return channels by the variance that those before them leave unexplained, weighted by how readers weigh it.

    It is Cholesky's decomposition with diagonal pivots E_jj D_jj: unlike the greedy order it does not look at what a
    channel tells about the others.

    Source: H. Harbrecht, M. Peters and R. Schneider, On the Low-Rank Approximation by the Pivoted Cholesky
        Decomposition (2012).
    """
    del count
    E = grams.activation.clone()
    weights = grams.weight.diagonal(dim1=1, dim2=2)
    negligible = negligible_variance(grams, E.diagonal(dim1=1, dim2=2))
    tie_break = tie_breaking(grams)
    taken = torch.zeros(grams.width, dtype=torch.bool, device=E.device)
    chosen = []
    for _ in range(grams.width):
        variance = E.diagonal(dim1=1, dim2=2)
        open_ = variance > negligible
        score = (torch.where(open_, variance, 0.0) * weights).sum(0) + tie_break
        j = int(score.masked_fill(taken, -1.0).argmax())
        chosen.append(j)
        taken[j] = True
        scale = torch.where(open_[:, j], variance[:, j], torch.inf)[:, None]
        own = E[:, j].clone()
        E.baddbmm_((own / scale)[:, :, None], own[:, None], alpha=-1)
    return torch.tensor(chosen, device=E.device)


@selection_method("leverage")
def leverage_order(grams: Grams, count: int) -> Tensor:
    """Return channels by their ridge leverage scores, the diagonal of A (A + lambda)^-1.

    A = sqrt(D_jj D_kk) S_jk is what readers read of the channels, and lambda is such that the scores of a pair add up
    to the count: the effective number of dimensions that are kept.

    Source: A. El Alaoui and M. W. Mahoney, Fast Randomized Kernel Ridge Regression with Statistical Guarantees (2015);
        M. B. Cohen, C. Musco and C. Musco, Input Sparsity Time Low-Rank Approximation via Ridge Leverage Score Sampling
        (2017).
    """
    weights = grams.weight.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    weighted = grams.activation * weights[:, :, None] * weights[:, None]
    values, vectors = torch.linalg.eigh(weighted)
    values = values.clamp_min(0)
    low, high = torch.zeros_like(values[:, :1]), values.sum(1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        is_too_many = (values / (values + middle)).sum(1, keepdim=True) > count
        low, high = torch.where(is_too_many, middle, low), torch.where(is_too_many, high, middle)
    scores = (vectors.square() * (values / (values + high))[:, None]).sum(2).sum(0)
    return torch.argsort(scores + tie_breaking(grams), descending=True, stable=True)


@selection_method("backward", nested=True)
def backward_order(grams: Grams, count: int) -> Tensor:
    """Return channels by how late they are dropped when the one that costs readers least goes first.

    Dropping channel j, the others made to stand in for it as well as they can, costs D_jj / (S^-1)_jj; D then becomes
    what the readers make of the channels that are left.

    Source: B. Hassibi and D. G. Stork, Second Order Derivatives for Network Pruning: Optimal Brain Surgeon (1993), with
        whole channels in the place of weights.
    """
    del count
    S, D = grams.activation.double(), grams.weight.double()
    variance = S.diagonal(dim1=1, dim2=2)
    ridge = variance.amax(1, keepdim=True) * max(1e-12, 10 * grams.precision)
    H = torch.linalg.inv(S + torch.diag_embed(ridge.expand_as(variance)))
    gone = torch.zeros(grams.width, dtype=torch.bool, device=S.device)
    dropped = []
    for _ in range(grams.width):
        precision = H.diagonal(dim1=1, dim2=2)
        cost = (D.diagonal(dim1=1, dim2=2) / precision.clamp_min(torch.finfo(S.dtype).tiny)).sum(0)
        j = int(cost.masked_fill(gone, torch.inf).argmin())
        dropped.append(j)
        gone[j] = True
        row = H[:, j] / H[:, j, j, None]
        UDU = D[:, j].clone()
        D = D - UDU[:, :, None] * row[:, None] - row[:, :, None] * UDU[:, None]
        D = D + UDU[:, j, None, None] * row[:, :, None] * row[:, None]
        H = H - row[:, :, None] * row[:, None] * H[:, j, j, None, None]
    return torch.tensor(dropped[::-1], device=S.device)


@selection_method("spectral_pruning", nested=True)
def spectral_pruning_order(grams: Grams, count: int) -> Tensor:
    """Return channels by greedy minimisation of Suzuki's information losses, input and output in equal parts.

    The input loss is what the kept channels cannot tell about all channels, tr(E); the output loss what they cannot
    tell about the readers' outputs, tr(D E); each is taken relative to its value without any channel. No mean is taken
    off in the paper; here it is where something takes the constant that is left.

    Source: T. Suzuki et al., Spectral Pruning: Compressing Deep Neural Networks via Spectral Analysis and its
        Generalization Error (2018), with theta = 1/2 and no constraint on leverage scores.
    """
    S, D = grams.activation, grams.weight
    all_of = S.diagonal(dim1=1, dim2=2).sum(1).clamp_min(torch.finfo(S.dtype).tiny)
    identity = torch.eye(grams.width, dtype=S.dtype, device=S.device)
    output = (D * S).sum((1, 2)).clamp_min(0)
    # A reader's loss is in the unit of its output's energy: the input's is brought to the same.
    both = (output / all_of)[:, None, None] * identity + D
    return greedy_order(Grams(S, both / 2, grams.precision), count)


@selection_method(PROJECTION)
def projection_order(grams: Grams, count: int) -> Tensor:
    """Return first the channels on which the leading singular directions of the writers can be told apart best.

    The rows of the leading `count` eigenvectors of S are chosen by pivots, so that these directions, and through them
    the rows of all other channels, follow from the rows that are kept.

    Source: J. Dejaegher, SVD evolutive CNN (2021), where the first channels are kept; the pivots are those of
        P. Businger and G. H. Golub, Linear Least Squares Solutions by Householder Transformations (1965).
    """
    S = grams.activation.double()
    scale = S.diagonal(dim1=1, dim2=2).sum(1).clamp_min(torch.finfo(S.dtype).tiny)
    _, vectors = torch.linalg.eigh((S / scale[:, None, None]).mean(0))
    rest = vectors.flip(1)[:, :count].clone()
    chosen: list[int] = []
    for _ in range(count):
        lengths = rest.square().sum(1)
        lengths[chosen] = -1.0
        j = int(lengths.argmax())
        chosen.append(j)
        direction = rest[j] / rest[j].norm().clamp_min(torch.finfo(S.dtype).tiny)
        rest = rest - (rest @ direction)[:, None] * direction[None]
    others = torch.ones(grams.width, dtype=torch.bool, device=S.device)
    others[chosen] = False
    return torch.cat([torch.tensor(chosen, device=S.device), torch.nonzero(others)[:, 0]])


@selection_method("magnitude", needs_moments=False)
def magnitude_scores(group: ChannelGroup, width_graph: WidthGraph) -> Tensor:
    """Return how large each channel's rows in the writers are, batch norm scales folded in.

    Without values (meta device, nothing that writes the group but biases) all are equal.
    """
    norms = writer_norms(width_graph, group)
    # Rows beyond the range of numbers are the largest.
    return torch.zeros(group.width, device="cpu") if norms is None else norms.nan_to_num(torch.finfo(norms.dtype).max)
