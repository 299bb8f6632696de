"""New rows for growing groups by methods that look at the task."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxwidth.axes.index_maps import IndexMaps
from fxwidth.errors import FxwidthError
from fxwidth.gradients.gradient_run import Batch
from fxwidth.gradients.task_moments import GroupMoments, gather_task_moments
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.growth.directions import Direction, mean_norm, needs_of, new_rows
from fxwidth.growth.new_entries import new_positions
from fxwidth.growth.tape_index import Slot
from fxwidth.option_keywords import Loss
from fxwidth.runtime.finiteness import accumulation_dtype
from fxwidth.runtime.process_groups import of_all_ranks, rank_share
from fxwidth.statistics.calibration_data import batches_from, targets_of
from fxwidth.weights.reparametrised import weight_values

# How many samples are enough.
_SAMPLES = 2048
_SEVERAL_FACTORS = "its rows are those of two groups that grow together"


@dataclass(frozen=True)
class InformedRows:
    """New rows by parameter and dim, as `growth.new_entries` takes them, and the weights without, with the reason."""

    rows: Mapping[Slot, Tensor] = field(default_factory=dict)
    untold: Mapping[str, str] = field(default_factory=dict)


def labelled_batches(width_graph: WidthGraph, data: Iterable[Any]) -> list[Batch]:
    """Return the first batches of data, with their targets.

    Raises:
        FxwidthError: there are none, one does not fit the graph, or one has no targets.
    """
    analysis, samples, enough = width_graph.analysis, 0, rank_share(_SAMPLES)
    result: list[Batch] = []
    for number, batch in enumerate([data] if isinstance(data, Tensor) else data):
        targets = targets_of(analysis, batch)
        for values in batches_from(analysis, [batch], None):
            if not targets:
                raise FxwidthError(
                    f"batch {number} of data holds inputs alone, and directions that look at the task need targets for "
                    "loss= too; pass batches (x, y)."
                )
            result.append((values, targets))
            samples += analysis.samples_in(values)
        if samples >= enough:
            break
    result = list(of_all_ranks("the batches with targets", result))
    if not result:
        raise FxwidthError("data gave no batches; pass at least one (a generator can be gone through only once).")
    return result


def informed_rows(
    width_graph: WidthGraph,
    maps: IndexMaps,
    groups: Sequence[ChannelGroup],
    batches: Sequence[Batch],
    loss: Loss,
    directions: Direction,
) -> InformedRows:
    """Return new rows for groups that grow.

    Raises:
        FxwidthError: the loss, the data or what the method gives cannot be used.
    """
    found = gather_task_moments(width_graph, groups, batches, loss, needs_of(directions))
    rows: dict[Slot, Tensor] = {}
    untold: dict[str, str] = {}
    for group, seen in found.items():
        untold |= seen.untold
        if seen.moments is not None:
            own, left = _group_rows(width_graph, maps, group, seen, directions)
            rows |= own
            untold |= left
    return InformedRows(rows, untold)


def _group_rows(
    width_graph: WidthGraph, maps: IndexMaps, group: ChannelGroup, seen: GroupMoments, directions: Direction
) -> tuple[dict[Slot, Tensor], dict[str, str]]:
    written, analysis = seen.places.written, width_graph.analysis
    tensors = {one.parameter: weight_values(analysis, one.parameter).detach() for one in written}
    present = [_wide(one.rows(tensors[one.parameter])) for one in written]
    count = len(maps.of(group.factor)) - group.width
    generator = torch.Generator().manual_seed(zlib.crc32(f"{group.name}:{group.width}".encode()))
    made = new_rows(directions, torch.cat(present, 1), count, generator, seen.moments)
    parts: dict[Slot, dict[int, Tensor]] = {}
    for one, old, new in zip(written, present, made.split([one.columns for one in written], 1), strict=True):
        parts.setdefault((one.parameter, one.dim), {})[one.block] = _scaled(new, old)
    rows, untold = {}, {}
    for (name, dim), blocks in parts.items():
        channels, places = new_positions(analysis, maps, name, dim, group.factor)
        if len(channels) != count * len(blocks):
            untold[name] = _SEVERAL_FACTORS
            continue
        others = [size for place, size in enumerate(tensors[name].shape) if place != dim]
        stacked = torch.stack([blocks[block] for block in range(len(blocks))])
        rows[name, dim] = stacked[places, channels - group.width].unflatten(1, others)
    return rows, untold


def _wide(rows: Tensor) -> Tensor:
    return rows.to(accumulation_dtype(rows))


def _scaled(rows: Tensor, present: Tensor) -> Tensor:
    """Return rows of the present ones' mean norm; rows of zeros stay so."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return torch.where(norms > 0, rows / norms.clamp_min(torch.finfo(rows.dtype).tiny) * mean_norm(present), rows)
