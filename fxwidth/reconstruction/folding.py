"""Folding dropped channels into the weights that read them: the kept channels predict the dropped ones."""

from __future__ import annotations

from math import prod

import numpy as np
import torch
from torch import Tensor

from fxwidth.analysis.result import Analysis
from fxwidth.axes.factor_space import FactorSpace
from fxwidth.axes.factors import axis_size
from fxwidth.axes.index_maps import NEW, IndexMaps, Indices
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.reconstruction.ridge import regression
from fxwidth.recording.tape import OpCall
from fxwidth.runtime.tensor_slots import complex_rows, real_rows
from fxwidth.statistics.moment import Moment
from fxwidth.statistics.moments import Moments
from fxwidth.statistics.observation_points import NORMS
from fxwidth.weights.readers import wiring_of
from fxwidth.weights.reparametrised import weight_values
from fxwidth.weights.shared_readers import ReaderSet, reader_sets
from fxwidth.work_progress import each

# How many rows of a weight are folded at a time.
_ROWS = 512
_SMALLEST_SHARE = 0.05
# Without a batch norm, outputs that have lost a share of their variance are scaled by the root of its inverse to this
# power: in part, since the error is scaled too; and by no more than for a quarter of the variance that is left.
_MATCHING, _LEAST_MATCHED = 0.6, 0.25


def fold(
    width_graph: WidthGraph, maps: IndexMaps, moments: Moments | None, missed: dict[str, str] | None = None
) -> dict[str, Tensor]:
    """Return the parameters and buffers that change when dropped channels are folded into their readers.

    A reader's weight W [rows, channels], with K kept and d dropped, becomes W_K + W_d R on its kept columns, with
    R = S[d, K] (S[K, K] + rho)^-1; a constant W_d (mu_d - R mu_K) goes to its bias, or off the running mean of the
    batch norm that follows it. S is the covariance where something takes the constant, and E h h^T elsewhere. What is
    predicted varies less than what was there: the running variance of that batch norm is scaled by the share left, and
    without one the weight's rows are scaled in part.

    Args:
        width_graph: the graph; its parameters are read, not changed.
        maps: which channels are kept.
        moments: the evidence; nothing is folded without.
        missed: takes the readers that lose channels without taking over what they read from them, and why.

    Returns:
        New tensors of the old shapes by parameter name, their kept entries ready to be indexed.

    Source: least-squares reconstruction, as in He et al., Channel Pruning for Accelerating Very Deep Neural Networks
        (2017), solved for all readers in closed form from moments.
    """
    folded: dict[str, Tensor] = {}
    if moments is None:
        return folded
    analysis = width_graph.analysis
    for readers in each(list(reader_sets(wiring_of(width_graph))), "refitting readers"):
        reader = readers.first
        if not maps.changes(reader.axis):
            continue
        indices = maps.indices(reader.axis)
        kept = indices[indices != NEW]
        reason = _why_not(readers, moments)
        if reason is None and not _fold_set(analysis, readers, kept, moments, folded):
            reason = "what it would take over is beyond the range of its dtype"
        if reason is not None and missed is not None and len(kept) < axis_size(reader.axis):
            missed[reader.view.parameter if reader.view is not None else f"node {reader.call.node}"] = reason
    return folded


def _why_not(readers: ReaderSet, moments: Moments) -> str | None:
    """Return why readers cannot take over what they read from dropped channels; None where they can."""
    if readers.first.view is None:
        return "its weight is computed from parameters"
    if not readers.foldable:
        return "its weight is used for something else too"
    missed = [moments.missed[one.call.node] for one in readers.readers if one.call.node in moments.missed]
    if missed or _common_moment(readers, moments) is None:
        return next(iter(missed), "nothing is known of what it reads")
    return None


def variance_ratio(space: FactorSpace, maps: IndexMaps, moments: Moments | None, call: OpCall) -> float:
    """Return the variance (RMS norm: mean square) that a norm sees after a resize, relative to what it saw before.

    It is the kept channels' share of the sum of squares, over the new size instead of the old; new channels are at the
    mean (RMS norm: zero) and add nothing. For a layer norm the squares are of deviations from the mean over all old
    channels. Without evidence the dropped channels are taken to carry nothing.

    Args:
        space: knows the factors of the graph.
        maps: which channels are kept.
        moments: the evidence, if there is any.
        call: a layer norm or RMS norm on the tape.
    """
    reductions = [reduction for reduction in call.reductions if reduction.kind in NORMS]
    axes = [space.normalise(call.axes[reduction.tensor][reduction.dim]) for reduction in reductions]
    if not any(maps.changes(axis) for axis in axes):
        return 1.0
    resized = prod(map(axis_size, axes)) / prod(map(maps.size, axes))
    squares = None if moments is None else moments.deviations.get(call.index)
    if squares is None:
        return resized
    kept = squares
    for dim, axis in enumerate(axes):
        indices = maps.indices(axis)
        kept = kept.index_select(dim, torch.from_numpy(indices[indices != NEW]).to(kept.device))
    total = float(squares.sum())
    # A norm over constants sees no variance, and its eps alone decides: as for growth, the size is all that changes.
    return resized if total == 0.0 else resized * float(kept.sum()) / total


def _common_moment(readers: ReaderSet, moments: Moments) -> Moment | None:
    """Return the moment of all that passes through one weight: of the mixture where it is used several times."""
    every = [moments.of(reader) for reader in readers.readers]
    known = list({moment: moment for moment in every if moment is not None}.values())
    if any(moment is None for moment in every) or not known:
        return None
    if len(known) == 1:
        return known[0]
    mean = torch.stack([moment.mean for moment in known]).mean(0)
    second = torch.stack([moment.second for moment in known]).mean(0)
    rows, samples = sum(moment.rows for moment in known), sum(moment.samples for moment in known)
    covariance = torch.addr(second, mean, mean, alpha=-1)
    return Moment(mean, covariance, rows, samples, max(moment.precision for moment in known))


def _fold_set(
    analysis: Analysis, readers: ReaderSet, kept: Indices, moments: Moments, folded: dict[str, Tensor]
) -> bool:
    """Fold what is not kept into one weight, the constant into what absorbs it, lost variance into a batch norm.

    Returns:
        Whether the weight's dtype has numbers for all of it; else nothing has changed.
    """
    reader, view, absorber = readers.first, readers.first.view, readers.absorber
    moment = _common_moment(readers, moments)
    assert view is not None
    assert moment is not None
    weight = view.of(_working_copy(analysis, view.parameter, folded))
    # Contiguous, so that the blocks of a transposed weight can be written to in place.
    blocks = real_rows(reader.blocks(weight)).clone(memory_format=torch.contiguous_format)
    groups, _, size = blocks.shape
    constants = moment.mean.new_zeros(groups, reader.outputs)
    shares = moment.mean.new_ones(groups, reader.outputs)
    for group in range(groups):
        own = kept[kept // size == group] % size
        lost = np.setdiff1d(np.arange(size), own)
        if len(own) and len(lost):
            K, d = (torch.from_numpy(np.sort(indices)).to(blocks.device) for indices in (own, lost))
            part = _part(moment, slice(group * size, (group + 1) * size))
            centred, matched = absorber is not None, readers.variance is None
            constant, share = _fold_block(blocks[group], part, K, d, reader.outputs, centred=centred, matched=matched)
            constants[group], shares[group] = constant / reader.strides, share
    if not all(_fits(part, weight.dtype) for part in (blocks, constants, shares)):
        return False
    weight.copy_(reader.operand(complex_rows(blocks) if weight.is_complex() else blocks, weight))
    if absorber is not None:
        vector = absorber.view.of(_working_copy(analysis, absorber.view.parameter, folded))
        vector.add_(absorber.sign * constants.view(-1).to(vector.dtype))
    if readers.variance is not None:
        vector = readers.variance.of(_working_copy(analysis, readers.variance.parameter, folded))
        vector.mul_(shares.view(-1).to(vector.dtype))
    return True


def _fits(values: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether values are finite, and stay so in another dtype; NaN is not."""
    return bool((values.abs() <= torch.finfo(dtype).max).all())


def _fold_block(
    block: Tensor, moment: Moment, K: Tensor, d: Tensor, outputs: int, *, centred: bool, matched: bool
) -> tuple[Tensor, Tensor]:
    """Fold columns d of a weight, [rows, channels], into its columns K, in place, and match variances where asked to.

    Returns:
        The constant to add to each output, and the share of each output's variance that is left, [outputs] each.
    """
    # Wide weights are worked on some outputs at a time: as a whole they would be in memory several times.
    rows = len(block) // outputs
    parts = block.split(rows * max(1, _ROWS // rows))
    wide = moment.covariance.dtype
    weights = moment.mean.new_zeros(len(d))
    for part in parts:
        weights += part.index_select(1, d).to(wide).square().sum(0)
    R = regression(moment, K, d, weights, centred=centred)
    S = moment.covariance if centred else moment.second
    left = S[K[:, None], K]
    constants, shares = [], []
    for part in parts:
        folded = part.to(wide)
        lost = folded.index_select(1, d)
        before = ((folded @ S) * folded).sum(1).view(-1, rows).sum(1)
        own = torch.addmm(folded.index_select(1, K), lost, R)
        after = ((own @ left) * own).sum(1).view(-1, rows).sum(1)
        # An output of which nothing is left must not be blown up to its old size.
        share = torch.where(before > 0, after / before, 1.0).clamp_min(_SMALLEST_SHARE)
        # Of an output that hardly varies the quotient is one of rounding errors, where it should be that of equals.
        share = torch.where((lost != 0).view(-1, rows * len(d)).any(1), share, 1.0)
        constant = lost @ (moment.mean[d] - R @ moment.mean[K]) if centred else lost.new_zeros(len(lost))
        if matched:
            scale = share.clamp_min(_LEAST_MATCHED).pow(-_MATCHING / 2).repeat_interleave(rows)
            if centred:
                constant = constant + (1 - scale) * (own @ moment.mean[K])
            own *= scale[:, None]
        part.index_copy_(1, K, own.to(part.dtype))
        constants.append(constant.view(-1, rows).sum(1))
        shares.append(share)
    return torch.cat(constants), torch.cat(shares)


def _part(moment: Moment, channels: slice) -> Moment:
    covariance = moment.covariance[channels, channels]
    return Moment(moment.mean[channels], covariance, moment.rows, moment.samples, moment.precision)


def _working_copy(analysis: Analysis, name: str, folded: dict[str, Tensor]) -> Tensor:
    """Return the tensor that will replace a parameter, laid out like it."""
    if name not in folded:
        tensor = weight_values(analysis, name)
        copy = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        folded[name] = copy.copy_(tensor)
    return folded[name]
