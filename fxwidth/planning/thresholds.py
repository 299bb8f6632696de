"""Widths by each group's own singular spectrum: the thresholds of SVD evolutive CNN."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxwidth.errors import FxwidthError
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.planning.constraints import Class, Limits
from fxwidth.weights.writer_spectra import singular_values, tail_share, writer_matrices


@dataclass(frozen=True)
class Thresholds:
    """When a group shrinks or grows by its own spectrum."""

    shrink_energy: float
    grow_energy: float
    grow_step: int

    def __post_init__(self) -> None:
        if not 0 <= self.shrink_energy < 1:
            raise FxwidthError(f"shrink_energy={self.shrink_energy!r} must lie in [0, 1): a share of the spectrum.")
        if not 0 <= self.grow_energy <= 1:
            raise FxwidthError(f"grow_energy={self.grow_energy!r} must lie in [0, 1]: a share of the spectrum.")
        if isinstance(self.grow_step, bool) or not isinstance(self.grow_step, int) or self.grow_step < 0:
            raise FxwidthError(f"grow_step={self.grow_step!r} must be an integer of at least 0: channels to add.")


def by_thresholds(
    width_graph: WidthGraph, unit: Class, limits: Limits, thresholds: Thresholds, exact: bool
) -> dict[ChannelGroup, int]:
    """Return the widths that the groups' own spectra ask for; of groups that go together, the widest."""
    wanted = {group: _by_threshold(width_graph, group, limits, thresholds, exact) for group in unit.groups}
    if len(unit.groups) == 1 and unit.fixed is None:
        return wanted
    widest = max(wanted.values())
    if unit.fixed is None and all(width > group.width for group, width in wanted.items()):
        return dict.fromkeys(unit.groups, widest)
    # One that may not grow holds the others back: they shrink to a width that all can take.
    allowed = unit.widths(limits)
    return dict.fromkeys(unit.groups, next((width for width in allowed if width >= widest), allowed[-1]))


def _by_threshold(
    width_graph: WidthGraph, group: ChannelGroup, limits: Limits, thresholds: Thresholds, exact: bool
) -> int:
    """Return the width that a group's own spectrum asks for."""
    width = group.width
    if next(writer_matrices(width_graph, group), None) is not None:
        values = singular_values(width_graph, group)
        tails = tail_share(values)
        # The tails fall: the first below the threshold is the smallest width that keeps enough.
        width = int(torch.count_nonzero(tails >= thresholds.shrink_energy)) if thresholds.shrink_energy else width
        width = max(1, min(width, group.width))
        total = float(values.sum())
        is_full = width == group.width and float(values[-1]) * width > thresholds.grow_energy * total
        if is_full and thresholds.grow_step and not (exact and group.inexact_growth):
            width = group.width + thresholds.grow_step
    if width == group.width and (limits.most is None or width <= limits.most):
        return width
    return limits.nearest(group, width)
