"""The singular spectrum of a group: how much of what its writers can say each direction holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fxwidth.analysis.result import Dim
from fxwidth.analysis.roles import Provenance, Role
from fxwidth.axes.factors import Axis, Factor
from fxwidth.axes.positions import channel_positions
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.memo import per_graph
from fxwidth.recording.tape import OpCall
from fxwidth.rules.family_table import as_family, running_norm
from fxwidth.rules.op_families import LookUp
from fxwidth.runtime.finiteness import accumulation_dtype
from fxwidth.weights.channel_rows import channel_rows, row_index
from fxwidth.weights.readers import Wiring, wiring_of
from fxwidth.weights.reparametrised import normed_weights, weight_values

# Up to here the stacked matrix itself is decomposed; above, its Gram matrix, at half the digits.
_STACKED_ENTRIES = 2**17


def singular_values(width_graph: WidthGraph, group: ChannelGroup) -> Tensor:
    """Return the singular values of a group's writers side by side, one per channel, largest first, [width].

    Each writer is unfolded to [width, everything else], scaled by the batch norm that directly follows it, and stands
    beside the others: the identity path of a residual block is among the writers of its stream. A group that nothing
    but per-channel tensors writes, and one of a model without values (meta device), has a flat spectrum.

    Source: J. Dejaegher, SVD evolutive CNN (2021), which decomposes each layer's own kernel.
    """
    writers = list(writer_matrices(width_graph, group))
    if not writers or writers[0].device.type == "meta":
        return torch.ones(group.width, dtype=torch.float64, device="cpu")
    columns = sum(writer.shape[1] for writer in writers)
    if group.width * columns <= _STACKED_ENTRIES:
        values = torch.linalg.svdvals(torch.cat([writer.to(accumulation_dtype(writer)) for writer in writers], 1))
        return torch.cat([values, values.new_zeros(group.width - len(values))])
    gram = writer_gram(width_graph, group)
    assert gram is not None
    squares: Tensor = torch.linalg.eigvalsh(gram).flip(0)
    return squares.clamp_min(0).sqrt()


def writer_columns(width_graph: WidthGraph, group: ChannelGroup) -> int:
    """Return how many columns the stacked writers of a group have; 0 where nothing but per-channel tensors writes."""
    return sum(writer.shape[1] for writer in writer_matrices(width_graph, group))


def writer_gram(width_graph: WidthGraph, group: ChannelGroup) -> Tensor | None:
    """Return the stacked writers times their transpose, [width, width]; None where there are no values."""
    gram: Tensor | None = None
    for writer in writer_matrices(width_graph, group):
        if writer.device.type == "meta":
            return None
        wide = writer.to(accumulation_dtype(writer))
        gram = wide @ wide.T if gram is None else torch.addmm(gram, wide, wide.T)
    return gram


def tail_share(values: Tensor) -> Tensor:
    """Return for every k from 0 to n the share of the sum of n values, largest first, that those after the k-th hold.

    Returns:
        [n + 1], from 1 down to 0.
    """
    from_end = torch.cat([values.new_zeros(1), values.flip(0).cumsum(0)]).flip(0)
    return from_end / from_end[0] if float(from_end[0]) > 0 else torch.zeros_like(from_end)


def writer_norms(width_graph: WidthGraph, group: ChannelGroup) -> Tensor | None:
    """Return the Euclidean norm of each channel's row over all writers, [width]; None where there are no values."""
    squares: Tensor | None = None
    for writer in writer_matrices(width_graph, group):
        if writer.device.type == "meta":
            return None
        # Without a copy of the whole in a wider dtype.
        real = writer.abs() if writer.is_complex() else writer
        own = torch.linalg.vector_norm(real, dim=1, dtype=accumulation_dtype(real)).square()
        squares = own if squares is None else squares + own
    return None if squares is None else squares.sqrt()


@dataclass(frozen=True, eq=False)
class Scaling:
    """A batch norm that directly follows a writer.

    Attributes:
        gain: the norm's gain on the tape, or None.
        variance: its running variance on the tape.
        eps: what is added to that.
        index: the positions of the group's channels in both, [channels, positions each].
    """

    gain: Tensor | None
    variance: Tensor
    eps: float
    index: Tensor

    def factors(self, wiring: Wiring, differentiable: bool) -> Tensor:
        """Return gamma / sqrt(variance + eps), [channels, positions each]."""
        variance = wiring.values(self.variance)
        gain = wiring.values(self.gain, differentiable=differentiable)
        assert variance is not None
        factors = (variance + self.eps).rsqrt() if gain is None else gain * (variance + self.eps).rsqrt()
        return factors[self.index.to(factors.device)]


@dataclass(frozen=True, eq=False)
class Writer:
    """Where a weight writes a group.

    Attributes:
        parameter: the name of the parameter.
        dim: the dim that holds the channels.
        index: their positions in it, [channels, positions each]; None for all of them in order.
        scalings: the batch norms that follow, one for each use of the weight, if one follows each.
    """

    parameter: str
    dim: int
    index: Tensor | None
    scalings: tuple[Scaling, ...]


def writer_matrices(width_graph: WidthGraph, group: ChannelGroup, *, differentiable: bool = False) -> Iterator[Tensor]:
    """Yield the weights that write a group as [width, everything else], scaled by a batch norm that directly follows.

    Biases, position embeddings and per-channel parameters are left out: they hold no direction of their own.

    Args:
        width_graph: the graph.
        group: one of its groups.
        differentiable: whether gradients flow back to the parameters, gains included.
    """
    for writer in writers_of(width_graph, group):
        weight = weight_values(width_graph.analysis, writer.parameter, differentiable=differentiable)
        rows = channel_rows(weight, writer.dim, writer.index)
        if writer.scalings:
            wiring = wiring_of(width_graph)
            scale = torch.stack([one.factors(wiring, differentiable) for one in writer.scalings]).mean(0)
            # Where rows of several output channels share one entry (transposed convolution), their mean stands in.
            rows = rows * (scale if scale.shape == rows.shape[:2] else scale.mean(1, keepdim=True))[:, :, None]
        yield (torch.view_as_real(rows) if rows.is_complex() else rows).flatten(1)


@per_graph
def writers_of(width_graph: WidthGraph, group: ChannelGroup) -> tuple[Writer, ...]:
    """Return where weights write a group, once for each occurrence of the group in a dim."""
    return tuple(_find_writers(width_graph, group))


def _find_writers(width_graph: WidthGraph, group: ChannelGroup) -> Iterator[Writer]:
    wiring = wiring_of(width_graph)
    space = width_graph.analysis.space
    provenance = width_graph.roles.provenance
    companions = {normed.companion for normed in normed_weights(width_graph.analysis).values()}
    for site in group.sites:
        entry = width_graph.analysis.parameters[site.parameter]
        dim = site.parameter, site.dim
        uses = wiring.uses.get(site.parameter, [])
        calls = [call for call, tensor in uses if _writes(call, tensor, provenance.get(tensor, ()), dim)]
        # A bias is one-dimensional, whatever it meets: where it projects a parameter it looks like a weight.
        if not calls or site.role == Role.PER_CHANNEL or site.parameter in companions or len(entry.axes) < 2:
            continue
        found = [_batch_norm_scaling(wiring, width_graph, call, group.factor) for call in calls]
        scalings = tuple(scaling for scaling in found if scaling is not None)
        for positions in channel_positions(space, entry.axes[site.dim], group.factor):
            index = row_index(positions, entry.tensor, site.dim)
            yield Writer(site.parameter, site.dim, index, scalings if len(scalings) == len(calls) else ())


def _writes(call: OpCall, tensor: Tensor, provenance: Provenance, dim: Dim) -> bool:
    """Tell whether an op makes channels of a parameter's dim: not one that it sums over, nor one that it looks up."""
    for contraction in call.contractions:
        for side, dims in ((contraction.left, contraction.left_dims), (contraction.right, contraction.right_dims)):
            if side is tensor and any(dim in provenance[k] for k in range(tensor.dim()) if k not in dims):
                return True
    found = as_family(call.func, LookUp)
    is_table = found is not None and found.slices and call.arguments[found.table] is tensor
    return is_table and any(dim in sources for sources in provenance[1:])


def _batch_norm_scaling(wiring: Wiring, width_graph: WidthGraph, call: OpCall, factor: Factor) -> Scaling | None:
    """Return the batch norm after an op, if it is known by what it divides the channels of a factor."""
    norm = wiring.following_batch_norm(call)
    family = None if norm is None else running_norm(norm.func)
    if norm is None or family is None:
        return None
    signal: Axis = norm.axes[norm.arguments["input"]][1]
    occurrences = channel_positions(width_graph.analysis.space, signal, factor)
    gain, variance = norm.arguments["weight"], norm.arguments[family.variance]
    if not occurrences or variance is None or not wiring.roles.is_parameter(variance):
        return None
    known = gain if gain is not None and wiring.roles.is_parameter(gain) else None
    return Scaling(known, variance, norm.arguments[family.eps], torch.from_numpy(occurrences[0]))
