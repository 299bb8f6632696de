"""Choosing which channels of a group to keep: one registry of methods, of which each gives an order of the channels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fxwidth.axes.index_maps import Indices
from fxwidth.errors import FxwidthError
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.selection.grams import Pairs, pairs_of
from fxwidth.selection.methods import (
    backward_order,
    cholesky_order,
    greedy_order,
    leverage_order,
    projection_order,
    spectral_pruning_order,
)
from fxwidth.selection.scores import Scores, scored_order
from fxwidth.statistics.moments import Moments
from fxwidth.weights.writer_spectra import writer_norms

Ranking = Callable[[Pairs, int], Tensor]

MAGNITUDE, PROJECTION = "magnitude", "projection"
RANKINGS: dict[str, Ranking] = {
    "greedy": greedy_order,
    "cholesky": cholesky_order,
    "leverage": leverage_order,
    "backward": backward_order,
    "spectral_pruning": spectral_pruning_order,
    PROJECTION: projection_order,
}


# Their order does not depend on how many channels are to be kept.
_NESTED = frozenset({"greedy", "cholesky", "backward", "spectral_pruning", MAGNITUDE})
SELECTIONS = (*RANKINGS, MAGNITUDE)
# A method by its name, or a function that scores the channels of a group.
Selection = str | Scores


def check_selection(selection: Selection) -> Selection:
    """Return a method of selection.

    Raises:
        FxwidthError: there is no such method.
    """
    if not callable(selection) and selection not in SELECTIONS:
        raise FxwidthError(
            f"selection={selection!r} is none of {', '.join(map(repr, SELECTIONS))}, nor a function "
            "(group, width_graph) -> scores."
        )
    return selection


def selection_name(selection: Selection) -> str:
    """Return what a method is called; for a function that is its module and its name in there."""
    if isinstance(selection, str):
        return selection
    named = selection if hasattr(selection, "__qualname__") else type(selection)
    return f"{named.__module__}.{named.__qualname__}"


def is_nested(selection: Selection) -> bool:
    """Tell whether the order of the channels does not depend on how many of them are to be kept."""
    return callable(selection) or selection in _NESTED


def reads_moments(selection: Selection) -> bool:
    """Tell whether a method asks what readers see of the channels."""
    return not callable(selection) and selection != MAGNITUDE


def select(
    width_graph: WidthGraph, group: ChannelGroup, width: int, moments: Moments | None, selection: Selection = "greedy"
) -> Indices:
    """Return the channels of a group to keep, sorted.

    Args:
        width_graph: the graph.
        group: one of its groups.
        width: how many channels to keep.
        moments: what the readers see; without, or where nothing reads the group, the writers' largest rows are kept.
        selection: the method, one of `SELECTIONS`, or a function that scores the channels.

    Raises:
        FxwidthError: there is no such method.
    """
    check_selection(selection)
    if width >= group.width:
        return np.arange(group.width, dtype=np.int64)
    pairs = pairs_of(width_graph, group, moments) if moments is not None and reads_moments(selection) else None
    return _sorted(channel_order(width_graph, group, width, pairs, selection)[:width])


def channel_order(
    width_graph: WidthGraph, group: ChannelGroup, count: int, pairs: Pairs | None, selection: Selection
) -> Tensor:
    """Return all channels of a group, those first that are to be kept when so many are."""
    if not isinstance(selection, str):
        return scored_order(width_graph, group, selection)
    return by_magnitude(width_graph, group) if pairs is None else rank(pairs, count, selection)


def rank(pairs: Pairs, count: int, selection: str = "greedy") -> Tensor:
    """Return all channels in the order of a method; those that nobody reads come last, whatever they may tell."""
    # Dropping what nobody reads costs nothing at all.
    read = pairs.read_channels()
    is_read = torch.zeros(pairs.width, dtype=torch.bool, device=read.device)
    is_read[read] = True
    order = read[RANKINGS[selection](pairs.among(read).merged(), min(count, len(read)))] if len(read) else read
    return torch.cat([order, torch.nonzero(~is_read)[:, 0]])


def by_magnitude(width_graph: WidthGraph, group: ChannelGroup) -> Tensor:
    """Return all channels, those with the largest rows in their writers first, batch norm scales folded in.

    Without values (meta device, nothing that writes the group but biases) the order is that of the channels.
    """
    norms = writer_norms(width_graph, group)
    return (
        torch.arange(group.width, device="cpu") if norms is None else torch.argsort(norms, descending=True, stable=True)
    )


def _sorted(channels: Tensor) -> Indices:
    return np.sort(channels.cpu().numpy().astype(np.int64))
