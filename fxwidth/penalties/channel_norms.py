"""The weights of each channel of a group, and the gains that batch norms give it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fxwidth.axes.positions import channel_positions
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.memo import per_graph
from fxwidth.rules.family_table import as_family
from fxwidth.rules.op_families import Norm, NormKind
from fxwidth.weights.channel_rows import channel_rows, row_index
from fxwidth.weights.readers import wiring_of
from fxwidth.weights.reparametrised import normed_weights, weight_values

# A parameter, one of its dims, and where a group's channels lie in that.
_Place = tuple[str, int, Tensor | None]


def channel_lengths(width_graph: WidthGraph, group: ChannelGroup) -> Tensor | None:
    """Return the Euclidean norm of all weights that write or read each channel, [width]; None where there are none.

    Vectors (biases, gains) are left out. Of weight norm and spectral norm it is the weight that is used which counts.
    """
    lengths = []
    for name, dim, index in _weights(width_graph, group):
        weight = weight_values(width_graph.analysis, name, differentiable=True)
        rows = channel_rows(weight, dim, index).flatten(1)
        real = rows.abs() if rows.is_complex() else rows
        lengths.append(torch.linalg.vector_norm(real, dim=1, dtype=_precision(real)))
    # A norm of norms: its gradient is finite where a channel has no weights but zeros.
    return torch.linalg.vector_norm(torch.stack(_on_one_device(lengths)), dim=0) if lengths else None


def gain_sizes(width_graph: WidthGraph, group: ChannelGroup) -> Tensor | None:
    """Return the sum of the sizes of the batch norm gains of each channel, [width]; None where there are none."""
    sizes = []
    for name, dim, index in _gains(width_graph, group):
        gain = width_graph.analysis.parameters[name].tensor
        sizes.append(channel_rows(gain[..., None], dim, index).abs().sum((1, 2), dtype=_precision(gain)))
    return torch.stack(_on_one_device(sizes)).sum(0) if sizes else None


def _precision(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _on_one_device(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.to(tensors[0].device) for tensor in tensors]


@per_graph
def _weights(width_graph: WidthGraph, group: ChannelGroup) -> tuple[_Place, ...]:
    companions = {normed.companion for normed in normed_weights(width_graph.analysis).values()}
    return tuple(
        place
        for place in _places(width_graph, group)
        if place[0] not in companions and len(width_graph.analysis.parameters[place[0]].axes) > 1
    )


@per_graph
def _gains(width_graph: WidthGraph, group: ChannelGroup) -> tuple[_Place, ...]:
    known = _batch_norm_gains(width_graph)
    return tuple(place for place in _places(width_graph, group) if place[0] in known)


@per_graph
def _batch_norm_gains(width_graph: WidthGraph) -> frozenset[str]:
    """Return the names of the gains of batch norms."""
    wiring, found = wiring_of(width_graph), set()
    for call in width_graph.analysis.calls:
        norm = as_family(call.func, Norm)
        gain = call.arguments["weight"] if norm is not None and norm.kind is NormKind.BATCH else None
        view = None if gain is None else wiring.view(gain)
        if view is not None:
            found.add(view.parameter)
    return frozenset(found)


def _places(width_graph: WidthGraph, group: ChannelGroup) -> Iterator[_Place]:
    """Yield where a group occurs in parameters that can be trained."""
    analysis = width_graph.analysis
    for site in group.sites:
        entry = analysis.parameters[site.parameter]
        if isinstance(entry.tensor, nn.Parameter):
            for positions in channel_positions(analysis.space, entry.axes[site.dim], group.factor):
                yield site.parameter, site.dim, row_index(positions, entry.tensor, site.dim)
