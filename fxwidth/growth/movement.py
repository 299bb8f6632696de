"""How new channels pass ops that move, look up or make entries, or act over positions."""

from __future__ import annotations

import torch
from torch import Tensor

from fxwidth.growth.call_view import CallView
from fxwidth.growth.states import ALL_ZERO, CONSTANT, State, meet, of_number, passed
from fxwidth.growth.transfers import NO_TRANSFER, Result, family_transfer, follow, transfer
from fxwidth.rules.family_table import as_family, is_move
from fxwidth.rules.op_families import Bags, ChannelCopies, Move, Movement, Positions

aten = torch.ops.aten

# -- movements -----------------------------------------------------------------------------------------------------


@family_transfer(Movement)
@transfer(aten.tril, aten.triu, aten.cumsum, aten.view_as_real, aten.view_as_complex)
def _moved(c: CallView) -> Result:
    if is_move(c.call.func, Move.PERMUTATION, Move.EXPANSION, Move.REPETITION, Move.JOIN):
        c.refuse(NO_TRANSFER)  # which dim of its result is which depends on the op
    return follow(c, c.call.inputs[0])


@transfer(aten.permute)
def _permute(c: CallView) -> Result:
    states = c.states("self")
    return [[states[dim] for dim in c["dims"]]]


@transfer(aten.t)
def _transposed(c: CallView) -> Result:
    return [c.states("self")[::-1]]


@transfer(aten.transpose)
def _transpose(c: CallView) -> Result:
    states, i, j = c.states("self"), c["dim0"], c["dim1"]
    states[i], states[j] = states[j], states[i]
    return [states]


@transfer(aten.expand, aten.repeat)
def _copies(c: CallView) -> Result:
    # Where the source does not carry the factor, the channels are copies of one entry.
    states = c.states("self")
    rank = len(c.outputs[0][1])
    return [[CONSTANT] * (rank - len(states)) + states]


@transfer(aten.cat)
def _cat(c: CallView) -> Result:
    rank = c.outputs[0][0].dim()
    # Legacy: empty one-dimensional tensors are skipped by cat.
    parts = [tensor for tensor in c["tensors"] if len(c.axes(tensor)) == rank]

    def joined(dim: int) -> State:
        return meet(c.states(part)[dim] for part in parts if c.facts.carries(c.axes(part)[dim]))

    return c.each_output(joined)


@transfer(aten.stack)
def _stack(c: CallView) -> Result:
    rows = [meet(column) for column in zip(*(c.states(tensor) for tensor in c["tensors"]), strict=True)]
    rows.insert(c["dim"] % c.outputs[0][0].dim(), CONSTANT)
    return [rows]


@transfer(aten.constant_pad_nd)
def _pad(c: CallView) -> Result:
    states, axes, filled = c.states("self"), c.axes("self"), of_number(c["value"])

    def padded(dim: int) -> State:
        return states[dim] & filled if c.facts.carries(axes[dim]) else filled

    return c.each_output(padded)


@transfer(aten._pack_padded_sequence)
def _pack(c: CallView) -> Result:
    return follow(c, c["input"])


@transfer(torch.ops.fxwidth.pad_packed_sequence)
def _pad_packed(c: CallView) -> Result:
    states, filled = c.states("data"), of_number(c["padding_value"])
    # The dim of rows becomes two.
    return c.each_output(lambda dim: states[dim - 1] & filled)


@transfer(aten.slice_scatter)
def _slice_scatter(c: CallView) -> Result:
    return [[meet(pair) for pair in zip(c.states("self"), c.states("src"), strict=True)]]


@transfer(aten.glu)
def _glu(c: CallView) -> Result:
    return follow(c, c.tensor("self"), State.ZERO)


@family_transfer(ChannelCopies)
def _channel_copies(c: CallView) -> Result:
    # New channels of what is copied are read by no copy, and new copies read nothing.
    states = c.states("self")
    states[c["dim"]] = State.ZERO
    return [states]


# -- tensors made from nothing, and look-ups -----------------------------------------------------------------------


@transfer(aten.zeros, aten.new_zeros, aten.empty, aten.new_empty)
def _zeros(c: CallView) -> Result:
    return c.everywhere(ALL_ZERO)


@transfer(aten.ones, aten.new_ones, aten.full, aten.new_full)
def _filled(c: CallView) -> Result:
    return c.everywhere(of_number(c.call.arguments.get("fill_value", 1)))


@transfer(aten.rand, aten.randn)
def _random(c: CallView) -> Result:
    return c.everywhere(State.ANY)


def check_index(c: CallView, index: Tensor) -> None:
    """Refuse an index of which new channels hold positions.

    Raises:
        RefusedError: they do.
    """
    if any(not state & (State.ZERO | State.UNIFORM) for state in c.states(index)):
        c.refuse("new channels hold positions that it looks up")


@transfer(aten.embedding)
def _embedding(c: CallView) -> Result:
    check_index(c, c["indices"])
    return [[*_looked_up(c, c["indices"]), c.states("weight")[1]]]


@family_transfer(Bags)
def _bags(c: CallView) -> Result:
    bags, rows = c.states("offsets")[0], c.states("weight")[1]
    kept = passed(rows, ALL_ZERO if c["mode"] < 2 else State.ZERO)
    return c.each_output(lambda dim: kept if dim else bags & State.ANY)[:1] + c.everywhere(State.ANY)[1:]


def _looked_up(c: CallView, index: Tensor) -> list[State]:
    return [CONSTANT if state & State.UNIFORM else State.ANY for state in c.states(index)]


@transfer(aten.index, aten._unsafe_index)
def _index(c: CallView) -> Result:
    indices = [index for index in c["indices"] if index is not None]
    for index in indices:
        check_index(c, index)
    if any(c.carrying(index) for index in indices):
        return c.everywhere(State.ANY)
    return follow(c, c["self"])


@transfer(aten.index_select)
def _index_select(c: CallView) -> Result:
    check_index(c, c["index"])
    return c.everywhere(State.ANY) if c.carrying("index") else follow(c, c["self"])


@transfer(aten.gather)
def _gather(c: CallView) -> Result:
    check_index(c, c["index"])
    signal, index = c.states("self"), c.states("index")
    return c.each_output(lambda dim: signal[dim] if index[dim] & State.UNIFORM else State.ANY)


# -- positions -----------------------------------------------------------------------------------------------------


@family_transfer(Positions)
def _over_positions(c: CallView) -> Result:
    family = as_family(c.call.func, Positions)
    return follow(c, c.call.inputs[0], ALL_ZERO if family is not None and family.linear else State.ZERO)


@transfer(aten.affine_grid_generator)
def _affine_grid(c: CallView) -> Result:
    samples = c.states("theta")[0]  # of which each place is a sum of products with numbers
    return c.each_output(lambda dim: samples if dim == 0 else State.ANY)


@transfer(aten.grid_sampler_2d, aten.grid_sampler_3d)
def _grid_sampler(c: CallView) -> Result:
    signal, grid = c.call.inputs
    states, places = c.states(signal), c.states(grid)
    own = [states[0] if places[0] & State.UNIFORM else states[0] & State.ZERO, states[1]]
    return c.each_output(lambda dim: own[dim] if dim < 2 else State.ANY)
