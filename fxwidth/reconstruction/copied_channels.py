"""What copies of channels read in the place of those that go: no weights stand between that could be refitted."""

from __future__ import annotations

import numpy as np
import torch

from fxwidth.analysis.result import Analysis
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.recording.channel_copies import NOTHING
from fxwidth.recording.tape import OpCall
from fxwidth.rules.copies import channel_copies, followed, new_places
from fxwidth.statistics.moment import Moment
from fxwidth.statistics.moments import Moments


def copy_tables(analysis: Analysis, maps: IndexMaps, moments: Moments | None) -> list[list[int]]:
    """Return what the channels of all copies read after a resize, in the order of the tape.

    A copy of a channel g that goes reads the kept channel k nearest to it, by E (h_g - h_k)^2, if that is nearer than
    zero is, E h_g^2 away. Without evidence nothing stands in.

    Args:
        analysis: that of the graph.
        maps: which channels are kept.
        moments: what is known of the channels, if anything is.
    """
    seen = {} if moments is None else moments.contracted
    calls = channel_copies(analysis.calls)
    return [followed(call, maps, _nearest(call, maps, seen.get((call.index, "self")))) for call in calls]


def _nearest(call: OpCall, maps: IndexMaps, moment: Moment | None) -> dict[int, int]:
    """Return the nearest of the channels that stay for each that goes, where there is one nearer than zero."""
    axis = call.axes[call.arguments["self"]][call.arguments["dim"]]
    if moment is None or not maps.changes(axis):
        return {}
    stays = new_places(maps, axis) != NOTHING
    gone, kept = (torch.from_numpy(np.nonzero(one)[0]).to(moment.mean.device) for one in (~stays, stays))
    if not len(gone) or not len(kept):
        return {}
    products = moment.entries(gone, kept, centred=False)
    nearer, which = (2 * products - moment.squares()[kept]).max(1)
    chosen = nearer > 0
    return dict(zip(gone[chosen].tolist(), kept[which[chosen]].tolist(), strict=True))
