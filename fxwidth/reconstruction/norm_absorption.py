"""Batch norms in a new basis: their scales go into the writers, and they come to normalise the new channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxwidth.bases.foldable_norms import InnerNorm
from fxwidth.bases.linear_groups import Basis
from fxwidth.statistics.moments import Moments
from fxwidth.weights.readers import Wiring

Overwrite = Callable[[str, Tensor], None]


def can_absorb(wiring: Wiring, norm: InnerNorm) -> bool:
    """Tell whether a batch norm's gains and running statistics are numbers that it can work with."""
    gain, mean, variance = (_values(wiring, name) for name in (norm.weight, norm.mean, norm.variance))
    usable = bool(gain.isfinite().all()) and bool(mean.isfinite().all()) and bool(variance.isfinite().all())
    return usable and bool((variance >= 0).all()) and bool((variance + norm.eps > 0).all())


def spread(wiring: Wiring, norm: InnerNorm, bases: Sequence[Basis], moments: Moments) -> Tensor:
    """Return the covariance of what a batch norm makes of its channels, [channels, channels], as training left it.

    The variances are the running ones. The correlations are those that a reader sees where it reads no other writer;
    elsewhere those that the layer makes of the moments of its inputs, kernel positions taken to know nothing of each
    other; and none where the moments are unknown.
    """
    gain, variance = _values(wiring, norm.weight), _values(wiring, norm.variance)
    deviation = gain * (variance / (variance + norm.eps)).sqrt()
    seen = _covariance_seen(norm, bases, moments, len(gain))
    if seen is not None:
        seen = seen.to(deviation)
        # As it was before the batch norm's gains, which change signs.
        covariance: Tensor | None = gain.sign()[:, None] * seen * gain.sign()
    else:
        covariance = _covariance_made(wiring, norm, moments, len(gain))
    if covariance is None:
        return torch.diag(deviation.square())
    scale = covariance.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    # Of a channel that the moments hold for constant nothing is known but its running variance.
    correlation = (inverse[:, None] * covariance * inverse).fill_diagonal_(1.0)
    return deviation[:, None] * correlation.to(deviation) * deviation


def _covariance_seen(norm: InnerNorm, bases: Sequence[Basis], moments: Moments, count: int) -> Tensor | None:
    """Return the covariance of a batch norm's results if readers see these alone."""
    own = norm.vectors | {writer.parameter for writer in norm.writers}
    covariance = None
    for basis in bases:
        places = [place for place in basis.places if not place.inverse and place.parameter == norm.mean]
        others = [place for place in basis.places if not place.inverse and place.parameter not in own]
        if not places:
            continue
        moment = moments.of(basis.views[0].readers.first) if basis.views and not others else None
        if moment is None:
            return None
        covariance = moment.covariance.new_zeros(count, count) if covariance is None else covariance
        positions = (places[0].positions.reshape(-1), basis.views[0].positions.reshape(-1))
        channels, read = (torch.from_numpy(one).to(covariance.device) for one in positions)
        covariance[channels[:, None], channels] = moment.covariance[read[:, None], read]
    return covariance


def _covariance_made(wiring: Wiring, norm: InnerNorm, moments: Moments, count: int) -> Tensor | None:
    """Return the covariance of a layer's outputs if its inputs were uncorrelated over the positions of a kernel."""
    reader = next((one for one in wiring.readers if one.call is norm.layer), None)
    moment = None if reader is None else moments.of(reader)
    values = None if reader is None else wiring.values(reader.call.arguments[reader.weight])
    if reader is None or moment is None or values is None or reader.groups * reader.outputs != count:
        return None
    blocks = reader.blocks(values).to(moment.covariance)
    groups, _, size = blocks.shape
    covariance = moment.covariance.new_zeros(count, count)
    for group in range(groups):
        own = slice(group * reader.outputs, (group + 1) * reader.outputs)
        inputs = slice(group * size, (group + 1) * size)
        crossed = (blocks[group] @ moment.covariance[inputs, inputs]).view(reader.outputs, -1)
        covariance[own, own] = crossed @ blocks[group].reshape(reader.outputs, -1).T
    rows = torch.from_numpy(norm.writers[0].rows).to(covariance.device)
    return covariance[rows][:, rows]


def take_scales(wiring: Wiring, norm: InnerNorm, channels: Tensor, overwrite: Overwrite) -> None:
    """Move some channels' scales, gain over deviation, into the writers: what is left of the norm is a shift."""
    gain, variance = _values(wiring, norm.weight), _values(wiring, norm.variance)
    scale = gain / (variance + norm.eps).sqrt()
    mean = _values(wiring, norm.mean)
    mean[channels] *= scale[channels]
    overwrite(norm.mean, mean)
    for writer in norm.writers:
        values = _values(wiring, writer.parameter).movedim(writer.dim, 0).contiguous()
        rows = torch.from_numpy(writer.rows).to(values.device)[channels]
        values[rows] *= scale[channels].view(-1, *[1] * (values.dim() - 1)).to(values.device)
        overwrite(writer.parameter, values.movedim(0, writer.dim))


def normalise(wiring: Wiring, norm: InnerNorm, channels: Tensor, variance: Tensor, overwrite: Overwrite) -> None:
    """Let a batch norm divide some channels by their own variance, [channels], and multiply them by its root again."""
    running, gain = _values(wiring, norm.variance), _values(wiring, norm.weight)
    # With next to no eps, a channel that never varies would be divided by zero.
    running[channels] = variance[channels].clamp_min(torch.finfo(torch.float32).tiny).to(running)
    overwrite(norm.variance, running)
    # The gain undoes what is stored, not what was meant.
    stored = _values(wiring, norm.variance)
    gain[channels] = (stored[channels] + norm.eps).sqrt()
    overwrite(norm.weight, gain)


def _values(wiring: Wiring, name: str) -> Tensor:
    """Return a copy of a parameter in double precision."""
    return wiring.analysis.parameters[name].tensor.detach().to(torch.float64, copy=True)
