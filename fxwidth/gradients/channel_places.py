"""Where a growing group is written and read: the rows of its writers, and the entries of its readers, by channel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxwidth.analysis.roles import Role
from fxwidth.axes.index_maps import Indices
from fxwidth.axes.positions import positions_by_channel
from fxwidth.gradients.weight_inputs import is_told, weight_rows
from fxwidth.groups.channel_group import ChannelGroup, Site
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.growth.recipes import Fill
from fxwidth.weights.readers import Reader, wiring_of
from fxwidth.weights.reparametrised import weight_values
from fxwidth.weights.shared_readers import reader_sets

NO_READER = "what reads its channels is no weight with a row for each output"
_READS = "it reads the channels, which are silent in what writes them"
_NO_INPUTS = "it is not multiplied with inputs of its own, row by row"


@dataclass(frozen=True)
class Written:
    """The rows of one weight that write the channels of a group, one for each.

    Attributes:
        parameter: the weight.
        dim: its dim along the channels.
        block: where a channel has several rows in it, which of them.
        positions: those of the present channels in the dim.
        ops: the ops that multiply it with inputs.
        group: which group of a convolution the rows are in.
        order: for each entry of a row, which of the op's inputs it is multiplied with.
    """

    parameter: str
    dim: int
    block: int
    positions: Indices
    ops: tuple[Reader, ...]
    group: int
    order: Tensor

    @property
    def columns(self) -> int:
        """The number of entries of a row."""
        return len(self.order)

    def rows(self, tensor: Tensor) -> Tensor:
        """Return the rows of the present channels in a tensor of the weight's shape, [channels, columns]."""
        return tensor.movedim(self.dim, 0)[torch.from_numpy(self.positions).to(tensor.device)].flatten(1)


@dataclass(frozen=True)
class Read:
    """The entries of one weight that read the channels of a group.

    Attributes:
        readers: the ops that multiply the channels with it.
        positions: those of each present channel in the dim that is read, [channels, positions each].
        outputs: how many entries there are for each position.
    """

    readers: tuple[Reader, ...]
    positions: Indices
    outputs: int

    @property
    def entries(self) -> int:
        """The number of entries of a channel."""
        return int(self.positions.shape[1]) * self.outputs

    def weight(self, entries: Tensor, like: Tensor) -> Tensor:
        """Return the weight operand that holds given entries for each channel, [channels, entries], and zeros."""
        reader = self.readers[0]
        groups, rows, channels = reader.blocks(like).shape
        columns = like.new_zeros(rows, groups * channels)
        places = torch.from_numpy(self.positions).to(like.device)
        columns[:, places] = entries.to(like).unflatten(1, (-1, rows)).permute(2, 0, 1)
        return reader.operand(columns.unflatten(1, (groups, channels)).transpose(0, 1), like)


@dataclass(frozen=True)
class ChannelPlaces:
    """All of them for one group.

    Attributes:
        written: the rows that may be anything in new channels.
        read: the entries of readers, which are zero in new channels.
        untold: the weights of which no moments can be taken, and why.
    """

    written: tuple[Written, ...]
    read: tuple[Read, ...]
    untold: dict[str, str]


def channel_places(width_graph: WidthGraph, group: ChannelGroup) -> ChannelPlaces:
    """Return where the channels of a group are written and read."""
    untold: dict[str, str] = {}
    written: list[Written] = []
    read = tuple(_read(width_graph, group))
    for site in group.sites:
        if group.growth.fills.get((site.parameter, site.dim)) is not Fill.DIRECTIONS:
            continue
        found = _written(width_graph, site) if site.role is Role.WRITER else None
        if site.role is Role.READER:
            untold[site.parameter] = _READS
        elif not read:
            untold[site.parameter] = NO_READER
        elif found is None:
            untold[site.parameter] = _NO_INPUTS
        else:
            written += found
    return ChannelPlaces(tuple(written), read, untold)


def _read(width_graph: WidthGraph, group: ChannelGroup) -> list[Read]:
    space = width_graph.analysis.space
    result = []
    for readers in reader_sets(wiring_of(width_graph)):
        first = readers.first
        if group.factor not in space.factors(first.axis) or not all(map(is_told, readers.readers)):
            continue
        positions = _apart(positions_by_channel(first.axis, group.factor))
        if positions is not None:
            blocks = first.blocks(first.call.arguments[first.weight])
            result.append(Read(readers.readers, positions, blocks.shape[1]))
    return result


def _apart(positions: list[Indices]) -> Indices | None:
    """Return the positions of channels as a matrix, or None where channels share some."""
    if len({len(own) for own in positions}) != 1:
        return None
    result: Indices = np.stack(positions)
    return result if len(np.unique(result)) == result.size else None


def _written(width_graph: WidthGraph, site: Site) -> list[Written] | None:
    ops = tuple(r for r in wiring_of(width_graph).readers if r.view is not None and r.view.parameter == site.parameter)
    positions = _apart(list(site.positions))
    if not ops or positions is None or not all(map(is_told, ops)):
        return None
    if len({(r.view, r.weight_dim, r.groups, r.transposed) for r in ops}) != 1:
        return None
    view = ops[0].view
    assert view is not None
    like = weight_values(width_graph.analysis, site.parameter)
    numbers = torch.empty_like(like, dtype=torch.int64, device="cpu")
    numbers.copy_(torch.arange(numbers.numel()).reshape(numbers.shape))
    if numbers.stride() != like.stride():
        return None
    rows = numbers.movedim(site.dim, 0).flatten(1)
    table = weight_rows(ops[0], view.of(numbers))
    result = []
    for block, own in enumerate(positions.T):
        places = [_place(table, rows[position]) for position in (own[0], own[-1])]
        first, last = places
        if first is None or last is None or first[0] != last[0] or not torch.equal(first[1], last[1]):
            return None
        result.append(Written(site.parameter, site.dim, block, own, ops, *first))
    return result


def _place(table: Tensor, row: Tensor) -> tuple[int, Tensor] | None:
    """Return the group of the convolution that multiplies a row, and with which input each of its entries."""
    found = (table == row.min()).nonzero()
    if len(found) != 1 or table.shape[2] != len(row):
        return None
    group, output, _ = found[0].tolist()
    known, order = table[group, output].sort()
    asked, back = row.sort()
    if not torch.equal(known, asked):
        return None
    return group, order[back.argsort()]
