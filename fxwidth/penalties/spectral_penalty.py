"""A term for the loss that makes channel groups low-rank, or channels small, while a network trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from fxwidth.errors import FxwidthError
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.option_values import patterns
from fxwidth.penalties.channel_norms import batch_norm_gains, channel_lengths, gain_sizes
from fxwidth.penalties.known_graphs import known_groups
from fxwidth.penalties.singular_values import spectral_term
from fxwidth.plain_numbers import plain_number
from fxwidth.planning.constraints import chosen_groups
from fxwidth.runtime.contexts import plain_surroundings
from fxwidth.weights.writer_spectra import writer_matrices

_Term = Callable[[WidthGraph, ChannelGroup], Tensor | None]
_KINDS = ("spectral", "group_lasso", "batch_norm")
_SPARSITIES = ("l1", "hoyer", None)
_SPARSITY, _ORTHOGONALITY = "l1", 0.1


def spectral_penalty(
    gm: fx.GraphModule,
    *,
    kind: str = "spectral",
    sparsity: str | None = _SPARSITY,
    orthogonality: float = _ORTHOGONALITY,
    only: str | Sequence[str] | None = None,
    keep: str | Sequence[str] | None = None,
) -> Tensor:
    """Return a term to add to the loss, by which the network becomes one that loses less when it is shrunk."""
    _check(kind, sparsity, orthogonality)
    only, keep = patterns(only, "only"), patterns(keep, "keep")
    width_graph = known_groups(gm)
    groups = chosen_groups(width_graph, only, keep)
    if kind == "batch_norm" and groups and not batch_norm_gains(width_graph):
        raise FxwidthError(
            'kind="batch_norm" is the size of the gains of batch norms, but the network has none; '
            'choose kind="group_lasso" or "spectral".'
        )
    terms: dict[str, _Term] = {
        "spectral": partial(_of_singular_values, sparsity=sparsity, orthogonality=float(orthogonality)),
        "group_lasso": channel_lengths,
        "batch_norm": gain_sizes,
    }
    # In half precision a Gram matrix would hold little.
    with plain_surroundings():
        found = [terms[kind](width_graph, group) for group in groups]
        return total([term.sum() for term in found if term is not None], gm)


def total(terms: Sequence[Tensor], gm: fx.GraphModule) -> Tensor:
    """Return the sum of numbers, wherever they are; zero, where the module is, for none."""
    if not terms:
        return torch.zeros((), device=next((parameter.device for parameter in gm.parameters()), None))
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


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
    except torch.linalg.LinAlgError as error:
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
