"""Widths by one ratio for all groups."""

from __future__ import annotations

from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.options import PlanOptions
from fxwidth.planning.constraints import Class, Limits


def by_ratio(width_graph: WidthGraph, unit: Class, options: PlanOptions) -> dict[ChannelGroup, int]:
    """Return the allowed widths that are nearest to a ratio of the present ones; the wider of two that are as near."""
    assert options.ratio is not None
    may_grow = not (options.exact and any(group.inexact_growth for group in unit.groups))
    # The next multiple may be nearer than the last one below.
    growth = options.ratio + options.align / unit.present if options.ratio > 1 and may_grow else 1.0
    wanted = options.ratio * unit.present
    allowed = unit.widths(Limits.of(options, width_graph), growth)
    return unit.of_groups(min(allowed, key=lambda width: (abs(width - wanted), -width)))
