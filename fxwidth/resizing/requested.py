"""What a plan asks of a graph: new widths, and the channels that it names itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fxwidth.analysis.least_widths import why_too_narrow
from fxwidth.axes.index_maps import Indices
from fxwidth.errors import FxwidthError
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.importance.estimates import Evidence
from fxwidth.planning.planner import Plan


@dataclass(frozen=True)
class Requested:
    """The groups that change.

    Attributes:
        widths: the new width of each.
        channels: the channels that are kept of those for which the plan names them, ascending.
    """

    widths: Mapping[ChannelGroup, int]
    channels: Mapping[ChannelGroup, Indices]

    @property
    def drops(self) -> bool:
        """Whether some group loses channels."""
        return any(width < group.width for group, width in self.widths.items())


@dataclass(frozen=True)
class Known:
    """What is known before a resize.

    Attributes:
        evidence: moments and a selection; data serve recalibration alone then.
        blind: whether channels are kept without a look at values, which are about to be loaded.
        norms: the variance ratios of norms that were found with values, by the names of their gains.
        kept: which channels the values that are about to be loaded have kept, for the record.
        copies: what copies of channels read after it, where that was found with values.
        keeps_eps: whether norms keep their eps, as the module asks for which the plan was made.
    """

    evidence: Evidence | None = None
    blind: bool = False
    norms: Mapping[str, float] | None = None
    kept: Mapping[str, Sequence[int]] = field(default_factory=dict)
    copies: Sequence[list[int]] | None = None
    keeps_eps: bool = False


def requested(width_graph: WidthGraph, plan: Mapping[str, int | Sequence[int]], exact: bool) -> Requested:
    """Return what a plan asks of a graph.

    Raises:
        FxwidthError: a name, a width, a channel, a pinned group or an inexact growth makes the plan unusable.
    """
    if not isinstance(plan, Mapping):
        raise FxwidthError(
            f"a plan maps group names to widths, but received {plan!r:.80}; fxwidth.plan(wg, params=0.5) makes one."
        )
    whole = Plan(dict(plan))
    widths, channels = {}, {}
    for name, width in whole.widths.items():
        group, named = width_graph[name], whole.channels.get(name)
        if named is not None and named[-1] >= group.width:
            raise FxwidthError(
                f"the plan keeps channel {named[-1]} of group {name!r}, whose channels are 0 to {group.width - 1}. "
                "Name channels that there are; to grow the group, give it a width."
            )
        if width == group.width:
            continue
        if group.pinned is not None:
            raise FxwidthError(
                f"group {name!r} must keep its width {group.width}: {group.pinned}. Remove it from the plan."
            )
        if width > group.width and exact and group.inexact_growth is not None:
            raise FxwidthError(
                f"growing group {name!r} from {group.width} to {width} would change the function: "
                f"{group.inexact_growth}. Pass exact=False to grow it all the same."
            )
        widths[group] = width
        if named is not None:
            channels[group] = np.array(named, dtype=np.int64)
    return Requested(widths, channels)


def refuse_too_narrow(width_graph: WidthGraph, asked: Requested) -> None:
    """Check that no group becomes so narrow that what is computed of its channels tells nothing.

    Raises:
        FxwidthError: one does, alone or with others.
    """
    for group, width in asked.widths.items():
        if width < min(group.width, group.least.width):
            named = f" (channels {asked.channels[group].tolist()})" if group in asked.channels else ""
            raise FxwidthError(
                f"group {group.name!r} cannot shrink from {group.width} to {width}{named}: {group.least.reason}. "
                f"Its least width is {group.least.width}."
            )
    narrow = why_too_narrow(width_graph.analysis, {group.factor: width for group, width in asked.widths.items()})
    if narrow is not None:
        names = ", ".join(repr(group.name) for group in asked.widths)
        raise FxwidthError(f"these widths do not go together: {narrow}. Keep one of {names} wider.")
