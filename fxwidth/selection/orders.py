"""The channels of a group in the order of a method, whatever evidence there is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxwidth.errors import FxwidthError
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.selection.grams import Grams
from fxwidth.selection.methods import magnitude_scores
from fxwidth.selection.registry import METHODS, Selection, reads_moments
from fxwidth.selection.scores import scored_order


def channel_order(
    width_graph: WidthGraph, group: ChannelGroup, count: int, grams: Grams | None, selection: Selection
) -> Tensor:
    """Return all channels of a group, those first that are to be kept when so many are.

    Raises:
        FxwidthError: what the method gives is no order or no scores.
    """
    if not isinstance(selection, str):
        return scored_order(width_graph, group, selection)
    if not reads_moments(selection):
        return scored_order(width_graph, group, METHODS[selection].function)
    # Where nothing is known of what is read, the writers tell.
    return scored_order(width_graph, group, magnitude_scores) if grams is None else rank(grams, count, selection)


def rank(grams: Grams, count: int, selection: str = "greedy") -> Tensor:
    """Return all channels in the order of a method; those that nobody reads come last, whatever they may tell.

    Raises:
        FxwidthError: what the method gives is no order.
    """
    # Dropping what nobody reads costs nothing at all.
    read = grams.read_channels()
    is_read = torch.zeros(grams.width, dtype=torch.bool, device=read.device)
    is_read[read] = True
    if len(read):
        order = METHODS[selection].function(grams.among(read).merged(), min(count, len(read)))
        read = read[_checked(order, len(read), selection).to(read.device)]
    return torch.cat([read, torch.nonzero(~is_read)[:, 0]])


def _checked(order: Any, width: int, selection: str) -> Tensor:
    # Not by as_tensor, which brings tensors to the device that is set as the default.
    numbers = order if isinstance(order, Tensor) else torch.tensor(order, device="cpu")
    if numbers.shape != (width,) or numbers.is_floating_point() or numbers.is_complex():
        form = f"{str(numbers.dtype).removeprefix('torch.')} of shape {list(numbers.shape)}"
        raise FxwidthError(f"selection={selection!r} gave {form}; return all {width} channels, those to keep first.")
    if not numbers.is_meta and sorted(numbers.tolist()) != list(range(width)):
        raise FxwidthError(
            f"selection={selection!r} gave an order that does not name each of {width} channels once; return a "
            "permutation of them, those to keep first."
        )
    return numbers
