"""How new channels pass ops that move, look up or make entries, or act over positions."""

from __future__ import annotations

from torch import Tensor

from fxwidth.growth.states import ALL_ZERO, CONSTANT, CallView, Result, State, follow, meet, of_number, transfer

# -- movements -----------------------------------------------------------------------------------------------------


@transfer("view", "_unsafe_view", "_reshape_alias", "_reshape_copy", "view_copy", "unsqueeze", "squeeze")
@transfer("select", "slice", "slice_copy", "as_strided", "flip", "roll", "unfold", "native_channel_shuffle")
@transfer("split", "unsafe_split", "split_with_sizes", "unsafe_split_with_sizes", "split_with_sizes_copy")
@transfer("unbind", "channel_shuffle", "tril", "triu", "cumsum")
def _moved(c: CallView) -> Result:
    return follow(c, c.tensor("self"))


@transfer("permute")
def _permute(c: CallView) -> Result:
    states = c.states("self")
    return [[states[dim] for dim in c["dims"]]]


@transfer("t")
def _transposed(c: CallView) -> Result:
    return [c.states("self")[::-1]]


@transfer("transpose")
def _transpose(c: CallView) -> Result:
    states, i, j = c.states("self"), c["dim0"], c["dim1"]
    states[i], states[j] = states[j], states[i]
    return [states]


@transfer("expand", "repeat")
def _copies(c: CallView) -> Result:
    # Where the source does not carry the factor, the channels are copies of one entry.
    states = c.states("self")
    rank = len(c.outputs[0][1])
    return [[CONSTANT] * (rank - len(states)) + states]


@transfer("cat")
def _cat(c: CallView) -> Result:
    rank = c.outputs[0][0].dim()
    # Legacy: empty one-dimensional tensors are skipped by cat.
    parts = [tensor for tensor in c["tensors"] if len(c.axes(tensor)) == rank]

    def joined(dim: int) -> State:
        return meet(c.states(part)[dim] for part in parts if c.facts.carries(c.axes(part)[dim]))

    return c.each_output(joined)


@transfer("stack")
def _stack(c: CallView) -> Result:
    rows = [meet(column) for column in zip(*(c.states(tensor) for tensor in c["tensors"]), strict=True)]
    rows.insert(c["dim"] % c.outputs[0][0].dim(), CONSTANT)
    return [rows]


@transfer("constant_pad_nd")
def _pad(c: CallView) -> Result:
    states, axes, filled = c.states("self"), c.axes("self"), of_number(c["value"])

    def padded(dim: int) -> State:
        return states[dim] & filled if c.facts.carries(axes[dim]) else filled

    return c.each_output(padded)


@transfer("_pack_padded_sequence")
def _pack(c: CallView) -> Result:
    return follow(c, c["input"])


@transfer("fxwidth::pad_packed_sequence")
def _pad_packed(c: CallView) -> Result:
    states, filled = c.states("data"), of_number(c["padding_value"])
    # The dim of rows becomes two.
    return c.each_output(lambda dim: states[dim - 1] & filled)


@transfer("slice_scatter")
def _slice_scatter(c: CallView) -> Result:
    return [[meet(pair) for pair in zip(c.states("self"), c.states("src"), strict=True)]]


@transfer("glu")
def _glu(c: CallView) -> Result:
    return follow(c, c.tensor("self"), State.ZERO)


# -- tensors made from nothing, and look-ups -----------------------------------------------------------------------


@transfer("zeros", "new_zeros", "empty", "new_empty")
def _zeros(c: CallView) -> Result:
    return c.everywhere(ALL_ZERO)


@transfer("ones", "new_ones", "full", "new_full")
def _filled(c: CallView) -> Result:
    return c.everywhere(of_number(c.call.arguments.get("fill_value", 1)))


@transfer("rand", "randn")
def _random(c: CallView) -> Result:
    return c.everywhere(State.ANY)


def _check_index(c: CallView, index: Tensor) -> None:
    if any(not state & (State.ZERO | State.UNIFORM) for state in c.states(index)):
        c.refuse("new channels hold positions that it looks up")


@transfer("embedding")
def _embedding(c: CallView) -> Result:
    _check_index(c, c["indices"])
    return [[*_looked_up(c, c["indices"]), c.states("weight")[1]]]


def _looked_up(c: CallView, index: Tensor) -> list[State]:
    return [CONSTANT if state & State.UNIFORM else State.ANY for state in c.states(index)]


@transfer("index", "_unsafe_index")
def _index(c: CallView) -> Result:
    indices = [index for index in c["indices"] if index is not None]
    for index in indices:
        _check_index(c, index)
    if any(c.carrying(index) for index in indices):
        return c.everywhere(State.ANY)
    return follow(c, c["self"])


@transfer("index_select")
def _index_select(c: CallView) -> Result:
    _check_index(c, c["index"])
    return c.everywhere(State.ANY) if c.carrying("index") else follow(c, c["self"])


@transfer("gather")
def _gather(c: CallView) -> Result:
    _check_index(c, c["index"])
    signal, index = c.states("self"), c.states("index")
    return c.each_output(lambda dim: signal[dim] if index[dim] & State.UNIFORM else State.ANY)


# -- positions -----------------------------------------------------------------------------------------------------


@transfer("avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "pixel_shuffle")
@transfer("pixel_unshuffle", "im2col", "col2im")
@transfer("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d")
@transfer("_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d")
@transfer("upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")
@transfer("reflection_pad1d", "reflection_pad2d", "reflection_pad3d")
@transfer("replication_pad1d", "replication_pad2d", "replication_pad3d")
def _linear_over_positions(c: CallView) -> Result:
    return follow(c, c.call.inputs[0])


@transfer("max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d")
def _max_pool(c: CallView) -> Result:
    return follow(c, c.call.inputs[0], State.ZERO)


@transfer("grid_sampler_2d", "grid_sampler_3d")
def _grid_sampler(c: CallView) -> Result:
    signal, grid = c.call.inputs
    states, places = c.states(signal), c.states(grid)
    own = [states[0] if places[0] & State.UNIFORM else states[0] & State.ZERO, states[1]]
    return c.each_output(lambda dim: own[dim] if dim < 2 else State.ANY)
