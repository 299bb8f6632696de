"""What tests do to single channels of a network."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fxwidth.axes.index_maps import Indices
from fxwidth.axes.positions import channel_positions
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.selection.grams import grams_of
from fxwidth.selection.orders import channel_order
from fxwidth.selection.registry import Selection, check_selection, reads_moments
from fxwidth.statistics.moments import Moments, moments_from_data
from fxwidth.weights.readers import wiring_of
from tests.zoo.nets import build


def evidence(graph: WidthGraph, x: Tensor) -> Moments:
    moments = moments_from_data(graph, [x], limit=None)
    assert moments is not None
    return moments


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def kept_without(width: int, *dropped: int) -> Indices:
    return np.setdiff1d(np.arange(width), dropped)


def channel_slices(graph: WidthGraph, name: str, roles: tuple[str, ...]) -> list[tuple[Tensor, int, list[Indices]]]:
    """Return each tensor and dim in which a group has one of some roles, with the positions of its channels."""
    group = graph[name]
    result = []
    for site in group.sites:
        if site.role in roles:
            entry = graph.analysis.parameters[site.parameter]
            positions = channel_positions(graph.analysis.space, entry.axes[site.dim], group.factor)
            result.append((entry.tensor, site.dim, positions))
    return result


@torch.no_grad()
def copy_channel(graph: WidthGraph, name: str, source: int, target: int) -> None:
    """Make one channel of a group the copy of another in all that makes it."""
    for tensor, dim, occurrences in channel_slices(graph, name, ("writer", "per-channel")):
        for positions in occurrences:
            moved = tensor.movedim(dim, 0)
            moved[positions[target]] = moved[positions[source]].clone()


@torch.no_grad()
def silence_channel(graph: WidthGraph, name: str, channel: int, role: str) -> None:
    """Make a channel of a group zero, or unread."""
    for tensor, dim, occurrences in channel_slices(graph, name, (role,)):
        for positions in occurrences:
            tensor.movedim(dim, 0)[positions[channel]] = 0


def plain_groups(name: str) -> list[str]:
    """Return the groups of a network that nothing mixes, wide enough to lose a channel."""
    graph, _ = build(name)
    return [group.name for group in graph.free if group.mixed is None and group.width > 2]


def readers_of(graph: WidthGraph, name: str) -> list[object]:
    return [site for site in graph[name].sites if site.role == "reader"]


def select(
    width_graph: WidthGraph, group: ChannelGroup, width: int, moments: Moments | None, selection: Selection = "greedy"
) -> Indices:
    """Return the channels of a group to keep, sorted.

    Args:
        width_graph: the graph.
        group: one of its groups.
        width: how many channels to keep.
        moments: what the readers see; without, or where nothing reads the group, the writers' largest rows are kept.
        selection: the method, one that is registered, or a function that scores the channels.

    Raises:
        FxwidthError: there is no such method, or what it gives is no order or no scores.
    """
    check_selection(selection)
    if width >= group.width:
        return np.arange(group.width, dtype=np.int64)
    grams = (
        grams_of(wiring_of(width_graph), group, moments) if moments is not None and reads_moments(selection) else None
    )
    order = channel_order(width_graph, group, width, grams, selection)
    return np.sort(order[:width].cpu().numpy().astype(np.int64))
