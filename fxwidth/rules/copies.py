"""The rule for copies of channels by a table: operand and result have widths of their own, and the table follows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fxwidth.axes.factors import Axis, axis_size
from fxwidth.axes.index_maps import NEW, IndexMaps, Indices
from fxwidth.recording.channel_copies import NOTHING
from fxwidth.recording.tape import OpCall
from fxwidth.rules.op_families import ChannelCopies
from fxwidth.rules.registry import ResizedCall, RuleContext, literal_rule, revised, rule


@rule(torch.ops.fxwidth.copied_channels, family=ChannelCopies())
def _copied_channels(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal = c.axes("self")
    signal[c.dim(c["dim"], len(signal))] = c.fresh(len(c["table"]), "copies")
    return [signal]


@literal_rule(torch.ops.fxwidth.copied_channels)
def _table(call: OpCall, maps: IndexMaps) -> ResizedCall:
    """Let each channel read what it read before, where that is now, or what stands in for it; new ones read nothing."""
    dim = call.arguments["dim"]
    places = new_places(maps, call.axes[call.arguments["self"]][dim])
    stand_ins = maps.stand_ins(call.index)

    def source_of(old: int) -> int:
        before = NOTHING if old == NEW else call.arguments["table"][old]
        if before == NOTHING:
            return NOTHING
        now = int(places[before])
        return now if now != NOTHING or before not in stand_ins else int(places[stand_ins[before]])

    return revised(call, table=[source_of(int(old)) for old in maps.indices(call.output_axes[0][dim])])


def new_places(maps: IndexMaps, axis: Axis) -> Indices:
    """Return where each position of a dim is after a resize, `NOTHING` where it is gone."""
    old = maps.indices(axis)
    places: Indices = np.full(axis_size(axis), NOTHING, dtype=np.int64)
    stays = old != NEW
    places[old[stays]] = np.nonzero(stays)[0]
    return places
