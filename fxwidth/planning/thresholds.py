"""Widths by each group's own singular spectrum: the thresholds of SVD evolutive CNN."""

from __future__ import annotations

import torch

from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.options import PlanOptions
from fxwidth.planning.constraints import Class, Limits
from fxwidth.weights.writer_spectra import singular_values, tail_share
from fxwidth.weights.writers import writer_matrices


def by_thresholds(width_graph: WidthGraph, unit: Class, options: PlanOptions) -> dict[ChannelGroup, int]:
    """Return the widths that the groups' own spectra ask for; of groups that go together, the widest."""
    limits = Limits.of(options, width_graph)
    wanted = {group: _by_threshold(width_graph, group, options) for group in unit.groups}
    if len(unit.groups) == 1 and unit.fixed is None:
        return wanted
    widest = max(-(-wanted[group] // one) for group, one in zip(unit.groups, unit.each_unit, strict=True))
    if unit.fixed is None and all(width > group.width for group, width in wanted.items()):
        return unit.of_groups(widest)
    # One that may not grow holds the others back: they shrink to a width that all can take.
    allowed = unit.widths(limits)
    return unit.of_groups(next((width for width in allowed if width >= widest), allowed[-1]))


def _by_threshold(width_graph: WidthGraph, group: ChannelGroup, options: PlanOptions) -> int:
    """Return the width that a group's own spectrum asks for."""
    width, limits = group.width, Limits.of(options, width_graph)
    if next(writer_matrices(width_graph, group), None) is not None:
        values = singular_values(width_graph, group)
        tails = tail_share(values)
        # The tails fall: the first below the threshold is the smallest width that keeps enough.
        width = int(torch.count_nonzero(tails >= options.shrink_energy)) if options.shrink_energy else width
        width = max(1, min(width, group.width))
        total = float(values.sum())
        is_full = width == group.width and float(values[-1]) * width > options.grow_energy * total
        if is_full and options.grow_step and not (options.exact and group.inexact_growth):
            width = group.width + options.grow_step
    if width == group.width and (limits.most is None or width <= limits.most):
        return width
    return limits.nearest(group, width)
