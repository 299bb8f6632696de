"""The rule for copies of channels by a table: operand and result have widths of their own, and the table follows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from fxwidth.axes.factors import Axis, axis_size
from fxwidth.axes.index_maps import NEW, IndexMaps, Indices
from fxwidth.recording.channel_copies import NOTHING
from fxwidth.recording.tape import OpCall
from fxwidth.rules.family_table import as_family
from fxwidth.rules.op_families import ChannelCopies
from fxwidth.rules.registry import ResizedCall, RuleContext, literal_rule, revised, rule


@rule(torch.ops.fxwidth.copied_channels, family=ChannelCopies())
def _copied_channels(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal = c.axes("self")
    signal[c.dim(c["dim"], len(signal))] = c.fresh(len(c["table"]), "copies")
    return [signal]


@literal_rule(torch.ops.fxwidth.copied_channels)
def _table(call: OpCall, maps: IndexMaps) -> ResizedCall:
    known = maps.table(call.index)
    return revised(call, table=followed(call, maps, {}) if known is None else known)


def followed(call: OpCall, maps: IndexMaps, stand_ins: Mapping[int, int]) -> list[int]:
    """Return what each channel of copies reads after a resize: what it read before, where that is now.

    Args:
        call: copies the channels.
        maps: of both sides. New channels of the result read nothing.
        stand_ins: which channel that stays is read for one that goes, both by their old positions; nothing is read for
            those that are not there.
    """
    dim, table = call.arguments["dim"], call.arguments["table"]
    places = new_places(maps, call.axes[call.arguments["self"]][dim])

    def source_of(old: int) -> int:
        before = NOTHING if old == NEW else table[old]
        if before != NOTHING and places[before] == NOTHING:
            before = stand_ins.get(before, NOTHING)
        return NOTHING if before == NOTHING else int(places[before])

    return [source_of(int(old)) for old in maps.indices(call.output_axes[0][dim])]


def channel_copies(calls: Iterable[OpCall]) -> list[OpCall]:
    """Return those of some calls that copy channels, in order."""
    return [call for call in calls if as_family(call.func, ChannelCopies) is not None]


def new_places(maps: IndexMaps, axis: Axis) -> Indices:
    """Return where each position of a dim is after a resize, `NOTHING` where it is gone."""
    old = maps.indices(axis)
    places: Indices = np.full(axis_size(axis), NOTHING, dtype=np.int64)
    stays = old != NEW
    places[old[stays]] = np.nonzero(stays)[0]
    return places
