"""Channels that add nothing to norms over all channels: without them, a norm treats the others as before."""

from __future__ import annotations

import torch
from torch import Tensor

from fxwidth.analysis.result import Analysis
from fxwidth.axes.positions import channel_positions
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.selection.grams import ROUNDING
from fxwidth.statistics.moments import Moments
from fxwidth.statistics.observation_points import NORMS


def silent_channels(analysis: Analysis, group: ChannelGroup, moments: Moments) -> Tensor | None:
    """Return which channels of a group always are at the mean that a layer norm takes off, or zero in an RMS norm.

    Growth puts its new channels there. They add nothing to the sum of squares that the norm divides by, and depend on
    the others, so that dropping them changes the number of channels alone, which gain and eps make up for.

    Args:
        analysis: that of the graph.
        group: one of its groups.
        moments: what its norms see.

    Returns:
        [width], true where that holds in all norms that see the group; None where none does.
    """
    space, silent = analysis.space, None
    for index, squares in moments.deviations.items():
        call = analysis.calls[index]
        reductions = [reduction for reduction in call.reductions if reduction.kind in NORMS]
        least = float(squares.amax()) * (ROUNDING * torch.finfo(reductions[0].tensor.dtype).eps) ** 2
        for dim, reduction in enumerate(reductions):
            for positions in channel_positions(space, call.axes[reduction.tensor][reduction.dim], group.factor):
                places = torch.from_numpy(positions).to(squares.device)
                largest = squares.movedim(dim, 0).reshape(squares.shape[dim], -1).amax(1)[places].amax(1)
                quiet = largest <= least
                silent = quiet if silent is None else silent & quiet.to(silent.device)
    return silent


def silent_last(order: Tensor, silent: Tensor | None) -> Tensor:
    """Return an order of channels with the silent ones, which are dropped without loss, behind all others."""
    if silent is None:
        return order
    last = silent.to(order.device)[order]
    return torch.cat([order[~last], order[last]])
