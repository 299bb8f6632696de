"""Channels in the order of scores that a function of the user's gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxwidth.errors import FxwidthError
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph

# One number per channel: those with higher ones are kept.
Scores = Callable[[ChannelGroup, WidthGraph], Tensor | Sequence[float]]


def scored_order(width_graph: WidthGraph, group: ChannelGroup, scores: Scores) -> Tensor:
    """Return all channels of a group, those with the highest scores first; of equal ones the first.

    Raises:
        FxwidthError: the function does not give one finite number per channel.
    """
    values = torch.from_numpy(_checked(group, scores(group, width_graph)))
    return torch.argsort(values, descending=True, stable=True)


def _checked(group: ChannelGroup, given: Any) -> npt.NDArray[np.float64]:
    values = _numbers(given)
    if values is None or values.shape != (group.width,):
        form = type(given).__name__ if values is None else f"numbers of shape {list(values.shape)}"
        raise FxwidthError(
            f"selection= gave {form} for group {group.name!r}; return one real number for each of its {group.width} "
            "channels, higher ones for those to keep."
        )
    if not np.isfinite(values).all():
        channel = int(np.flatnonzero(~np.isfinite(values))[0])
        raise FxwidthError(
            f"selection= gave the score {values[channel]} for channel {channel} of group {group.name!r}; "
            "return finite numbers."
        )
    return values


def _numbers(given: Any) -> npt.NDArray[np.float64] | None:
    """Return what a function gave as numbers; None if it is none."""
    if isinstance(given, Tensor):
        if given.is_meta or given.is_complex():
            return None
        given = given.detach().cpu().double().numpy()
    try:
        values = np.asarray(given)
    except (ValueError, RuntimeError, TypeError):
        return None
    # Booleans, integers and floats; no text, complex numbers or objects.
    return values.astype(np.float64) if values.dtype.kind in "biuf" else None
