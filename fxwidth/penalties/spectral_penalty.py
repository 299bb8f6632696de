"""A term for the loss that makes channel groups low-rank, or channels small, while a network trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from fxwidth.errors import FxwidthError
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.option_keywords import Chosen
from fxwidth.option_values import patterns
from fxwidth.penalties.channel_norms import channel_lengths, gain_sizes
from fxwidth.penalties.known_graphs import known_groups
from fxwidth.penalties.singular_values import spectral_term
from fxwidth.penalties.sums import total
from fxwidth.plain_numbers import plain_number
from fxwidth.planning.group_choice import chosen_groups
from fxwidth.runtime.contexts import plain_surroundings
from fxwidth.weights.writers import writer_matrices

_Term = Callable[[WidthGraph, ChannelGroup], Tensor | None]
# What each kind looks at.
_OF = {
    "spectral": "the weights that write channels",
    "group_lasso": "the weights that write or read channels",
    "batch_norm": "the gains of batch norms",
}
_KINDS = tuple(_OF)
# How many groups an error lists.
_SHOWN = 5
_SPARSITIES = ("l1", "hoyer", None)
_SPARSITY, _ORTHOGONALITY = "l1", 0.1


def spectral_penalty(
    gm: fx.GraphModule,
    *,
    kind: str = "spectral",
    sparsity: str | None = _SPARSITY,
    orthogonality: float = _ORTHOGONALITY,
    only: Chosen | None = None,
    keep: Chosen | None = None,
) -> Tensor:
    """Return a term to add to the loss, which makes the channel groups of a graph such that less is lost in a resize.

    With the default kind, the singular values of each group's stacked writers become few: of all weights that write the
    channels side by side, [width, columns], scaled by the batch norm that directly follows. That is a sum over groups:

    - `sparsity="l1"`: the sum of the singular values (nuclear norm); `"hoyer"`: that over their Euclidean norm, from 1
      to sqrt(width), which no scaling of the weights changes;
    - `orthogonality` times the width times the share, from 0 to 1, of the squares of W W^T that are off its diagonal.
      Where rows are orthogonal their lengths are the singular values, so that those which vanish are channels.

    Yang et al. train U, s and V of each layer with penalties on U^T U - 1, V^T V - 1 and s. Here there are weights as
    they are, whose singular vectors are orthogonal anyway: singular values are found from the smaller of the matrices
    W W^T and W^T W, in single precision at least, and it is the rows themselves that are made orthogonal. Where
    singular values are equal the gradient is defined; in directions that the matrix lacks, it is zero.

    The groups are those of the graph as it is: after a resize they are found anew, in some milliseconds. Weights that
    are computed from parameters (weight norm, spectral norm, masks, low-rank updates) count as they are used. The
    number is the same in both modes, and nothing is changed.

    It takes as long for any batch: for a resnet18 on one CPU thread, forward and backward, 1.5 times a step with 32
    images of 32 x 32 pixels and 0.07 times one with 224 x 224; group_lasso takes a quarter of that. It can be added at
    every k-th step, by k times the factor.

    Args:
        gm: a graph from `fxwidth.trace`, or any GraphModule that carries shapes.
        kind: "spectral"; "group_lasso", the sum over channels of the Euclidean norm of all parameters of two or more
            dims that the channel has entries in, those of weight norm and spectral norm as they are used; or
            "batch_norm", the sum of the sizes of the batch norm gains of channels.
        sparsity: "l1", "hoyer", or None for orthogonality alone.
        orthogonality: the factor of that part, at least 0.
        only: names or patterns of the groups that count, or modules, as for `fxwidth.plan`.
        keep: likewise of groups to leave out.

    Returns:
        A number, shape [], that is differentiable by all parameters which it counts; zero where no group is free.

    Raises:
        FxwidthError: it is no graph or cannot be analysed, an option or pattern cannot be used, there is nothing of the
            kind in the groups, such as no batch norm, or weights are not finite.

    Source: H. Yang, M. Tang, W. Wen et al., Learning Low-rank Deep Neural Networks via Singular Vector Orthogonality
        Regularization and Singular Value Sparsification (2020); group_lasso: W. Wen, C. Wu, Y. Wang, Y. Chen and H. Li,
        Learning Structured Sparsity in Deep Neural Networks (2016); batch_norm: Z. Liu, J. Li, Z. Shen, G. Huang,
        S. Yan and C. Zhang, Learning Efficient Convolutional Networks through Network Slimming (2017).

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> loss = gm(torch.randn(32, 8)).square().mean() + 1e-4 * fxwidth.spectral_penalty(gm)
        >>> loss.backward()
        >>> torch.linalg.svdvals(net[0].weight).sum().allclose(fxwidth.spectral_penalty(gm, orthogonality=0))
        True
    """
    _check(kind, sparsity, orthogonality)
    only, keep = patterns(only, "only"), patterns(keep, "keep")
    width_graph = known_groups(gm)
    groups = chosen_groups(width_graph, only, keep)
    terms: dict[str, _Term] = {
        "spectral": partial(_of_singular_values, sparsity=sparsity, orthogonality=float(orthogonality)),
        "group_lasso": channel_lengths,
        "batch_norm": gain_sizes,
    }
    # In half precision a Gram matrix would hold little.
    with plain_surroundings():
        found = [terms[kind](width_graph, group) for group in groups]
        known = [term.sum() for term in found if term is not None]
        if groups and not known:
            raise FxwidthError(_nothing(kind, groups))
        return total(known, gm)


def _nothing(kind: str, groups: Sequence[ChannelGroup]) -> str:
    names = ", ".join(repr(group.name) for group in groups[:_SHOWN]) + (", ..." if len(groups) > _SHOWN else "")
    others = ", ".join(repr(other) for other in _KINDS if other != kind)
    return (
        f"kind={kind!r} penalises {_OF[kind]}, but there are none in the groups {names}; choose another kind "
        f"({others}), or other groups."
    )


def _of_singular_values(
    width_graph: WidthGraph, group: ChannelGroup, *, sparsity: str | None, orthogonality: float
) -> Tensor | None:
    matrices = [
        matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        for matrix in writer_matrices(width_graph, group, differentiable=True)
    ]
    if not matrices:
        return None
    dtype = max((matrix.dtype for matrix in matrices), key=lambda one: one.itemsize)
    try:
        return spectral_term([one.to(matrices[0].device, dtype) for one in matrices], sparsity, orthogonality)
    except LinAlgError as error:
        raise FxwidthError(
            f"the weights that write group {group.name!r} have no singular values; most likely some are NaN, infinite, "
            "or too large to be squared. Go back to a checkpoint from before training diverged, or leave the group out "
            f"by keep={group.name!r}."
        ) from error


def _check(kind: Any, sparsity: Any, orthogonality: Any) -> None:
    if kind not in _KINDS:
        raise FxwidthError(f"kind={kind!r} is none of {', '.join(map(repr, _KINDS))}.")
    if sparsity not in _SPARSITIES:
        raise FxwidthError(f'sparsity={sparsity!r} must be "l1", "hoyer" or None.')
    factor = plain_number(orthogonality)
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 <= factor < float("inf"):
        raise FxwidthError(f"orthogonality={orthogonality!r} must be a number of at least 0: the factor of that part.")
    if kind != "spectral" and (sparsity, factor) != (_SPARSITY, _ORTHOGONALITY):
        raise FxwidthError(f'sparsity= and orthogonality= are parts of kind="spectral"; kind={kind!r} ignores them.')
    if sparsity is None and not factor:
        raise FxwidthError("sparsity=None and orthogonality=0 leave nothing to penalise; give one of them.")
