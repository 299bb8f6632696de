"""The weights that write the channels of a group, as matrices with one row for each channel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fxwidth.analysis.result import Dim
from fxwidth.analysis.roles import Provenance, Role
from fxwidth.axes.factors import Axis, Factor
from fxwidth.axes.positions import channel_positions
from fxwidth.groups.channel_group import ChannelGroup, Site
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.memo import per_graph
from fxwidth.recording.tape import OpCall, storage_of
from fxwidth.rules.family_table import family_of, running_norm
from fxwidth.rules.op_families import Bags, LookUp
from fxwidth.weights.channel_rows import channel_rows, row_index
from fxwidth.weights.readers import Wiring, wiring_of
from fxwidth.weights.reparametrised import computed_values, normed_weights, weight_values


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
        weight: the name of the parameter, or the tensor of the tape that is computed from parameters.
        dim: the dim that holds the channels.
        index: their positions in it, [channels, positions each]; None for all of them in order.
        scalings: the batch norms that follow, one for each use of the weight, if one follows each.
    """

    weight: str | Tensor
    dim: int
    index: Tensor | None
    scalings: tuple[Scaling, ...]

    def values(self, width_graph: WidthGraph, differentiable: bool) -> Tensor:
        """Return the weight as it is."""
        if isinstance(self.weight, str):
            return weight_values(width_graph.analysis, self.weight, differentiable=differentiable)
        return computed_values(width_graph.analysis, self.weight, differentiable=differentiable)


def writer_matrices(width_graph: WidthGraph, group: ChannelGroup, *, differentiable: bool = False) -> Iterator[Tensor]:
    """Yield the weights that write a group as [width, everything else], scaled by a batch norm that directly follows.

    Biases, position embeddings and per-channel parameters are left out: they hold no direction of their own.

    Args:
        width_graph: the graph.
        group: one of its groups.
        differentiable: whether gradients flow back to the parameters, gains included.
    """
    for writer in writers_of(width_graph, group):
        rows = channel_rows(writer.values(width_graph, differentiable), writer.dim, writer.index)
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
    provenance = width_graph.roles.provenance
    companions = {normed.companion for normed in normed_weights(width_graph.analysis).values()}
    computed: dict[object, tuple[Tensor, int, list[OpCall]]] = {}
    for site in group.sites:
        entry = width_graph.analysis.parameters[site.parameter]
        # A bias is one-dimensional, whatever it meets: where it projects a parameter it looks like a weight.
        if site.role == Role.PER_CHANNEL or site.parameter in companions or len(entry.axes) < 2:
            continue
        dim, calls = (site.parameter, site.dim), []
        for call, tensor in _writing(wiring, provenance, site):
            if wiring.view(tensor) is not None:
                calls.append(call)
                continue
            # What is computed of several parameters, such as a masked weight, is one weight; of one that is used twice
            # there may be several views.
            for k in _written_dims(call, tensor, provenance[tensor], dim):
                seen = storage_of(tensor), tensor.shape, tensor.stride(), int(tensor.storage_offset()), k
                known = computed.setdefault(seen, (tensor, k, []))[2]
                known += [call] if call not in known else []
        if calls:
            yield from _of_calls(width_graph, group, site.parameter, site.dim, entry.axes[site.dim], calls)
    for tensor, k, calls in computed.values():
        yield from _of_calls(width_graph, group, tensor, k, calls[0].axes[tensor][k], calls)


def _writing(wiring: Wiring, provenance: Mapping[Tensor, Provenance], site: Site) -> list[tuple[OpCall, Tensor]]:
    """Return the ops that make channels of a parameter's dim, and what they take for it."""
    uses, dim = wiring.uses.get(site.parameter, []), (site.parameter, site.dim)
    found = [(call, tensor) for call, tensor in uses if _written_dims(call, tensor, provenance.get(tensor, ()), dim)]
    # A factor of a weight writes, or reads, as a part of that.
    outer = [one for one in found if not all(map(wiring.roles.is_parameter, one[0].inputs))]
    return outer or (found if site.role == Role.WRITER else [])


def _of_calls(
    width_graph: WidthGraph, group: ChannelGroup, weight: str | Tensor, dim: int, axis: Axis, calls: list[OpCall]
) -> Iterator[Writer]:
    analysis = width_graph.analysis
    found = [_batch_norm_scaling(wiring_of(width_graph), width_graph, call, group.factor) for call in calls]
    scalings = tuple(scaling for scaling in found if scaling is not None)
    like = analysis.parameters[weight].tensor if isinstance(weight, str) else weight
    for positions in channel_positions(analysis.space, axis, group.factor):
        yield Writer(weight, dim, row_index(positions, like, dim), scalings if len(scalings) == len(calls) else ())


def _written_dims(call: OpCall, tensor: Tensor, provenance: Provenance, dim: Dim) -> list[int]:
    """Return the dims of an operand that come from a parameter's dim and of which an op makes channels.

    Those are the ones that it does not sum over, nor looks up by.
    """
    free, summed = set[int](), set[int]()
    for contraction in call.contractions:
        for side, dims in ((contraction.left, contraction.left_dims), (contraction.right, contraction.right_dims)):
            if side is tensor:
                free |= set(range(tensor.dim()))
                summed |= set(dims)
    match family_of(call.func):
        case LookUp(table=table, slices=True) | Bags(table=table) if call.arguments[table] is tensor:
            free |= set(range(1, tensor.dim()))
    return [k for k in sorted(free - summed) if k < len(provenance) and dim in provenance[k]]


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
