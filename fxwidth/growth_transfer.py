"""How new channels pass each family of ops: movements, products, norms, reductions, look-ups.

An op that is not in this table, and not pointwise, refuses: unknown ops must not be guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from fxwidth.growth_states import ALL_ZERO, CONSTANT, AxisFacts, CallView, State, transfer
from fxwidth.tape import OpCall

Result = Sequence[Sequence[State]]


def meet(states: Iterable[State]) -> State:
    """Return what holds for all of several states; for none of them, what holds for memory nobody wrote to."""
    result = ALL_ZERO
    for state in states:
        result &= state
    return result


# -- movements -----------------------------------------------------------------------------------------------------


def _follow(c: CallView, source: Tensor, kept: State = ALL_ZERO) -> Result:
    """Pair the dims that carry the factor in order; where their numbers differ, each result has what all sources have.

    `kept` is what the op leaves standing: all of it for a copy, `ZERO` alone where f(0) = 0 is all that is known.
    """
    states, into = c.states(source), c.carrying(source)
    simple = not any(c.facts.repeats(c.axes(source)[dim]) for dim in into)
    rows = []
    for output, axes in c.outputs:
        onto = [dim for dim, axis in enumerate(axes) if c.facts.carries(axis)]
        paired = dict(zip(onto, into, strict=True)) if simple and len(onto) == len(into) else None
        shared = meet(states[dim] for dim in into)
        row = [CONSTANT] * len(axes)
        for dim in onto:
            state = states[paired[dim]] if paired is not None else shared
            # Of a reduction's results the integers are positions, which are not zero where the values are.
            own = kept if kept == ALL_ZERO or output.dtype.is_floating_point else State.ANY
            row[dim] = _passed(state, own) if into else c.refuse("it makes the channels itself")
        rows.append(row)
    return rows


def _passed(state: State, kept: State) -> State:
    # Entries that are all equal stay so under any op that acts on all channels alike.
    return (state & kept) | (state & CONSTANT if state & State.UNIFORM else State.ANY)


@transfer("view", "_unsafe_view", "_reshape_alias", "_reshape_copy", "view_copy", "unsqueeze", "squeeze")
@transfer("select", "slice", "slice_copy", "as_strided", "flip", "roll", "unfold", "native_channel_shuffle")
@transfer("split", "unsafe_split", "split_with_sizes", "unsafe_split_with_sizes", "split_with_sizes_copy")
@transfer("unbind", "channel_shuffle", "tril", "triu", "cumsum")
def _moved(c: CallView) -> Result:
    return _follow(c, c.tensor("self"))


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


@transfer("slice_scatter")
def _slice_scatter(c: CallView) -> Result:
    return [[meet(pair) for pair in zip(c.states("self"), c.states("src"), strict=True)]]


@transfer("glu")
def _glu(c: CallView) -> Result:
    return _follow(c, c.tensor("self"), State.ZERO)


def of_number(value: object) -> State:
    """Return the state of channels that all hold one number."""
    return ALL_ZERO if isinstance(value, (int, float)) and value == 0 else CONSTANT


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
    return _follow(c, c["self"])


@transfer("index_select")
def _index_select(c: CallView) -> Result:
    _check_index(c, c["index"])
    return c.everywhere(State.ANY) if c.carrying("index") else _follow(c, c["self"])


@transfer("gather")
def _gather(c: CallView) -> Result:
    _check_index(c, c["index"])
    signal, index = c.states("self"), c.states("index")
    return c.each_output(lambda dim: signal[dim] if index[dim] & State.UNIFORM else State.ANY)


# -- matrix products and convolutions ------------------------------------------------------------------------------


def multiplied(one: State, other: State) -> State:
    """Return the state of products, channel by channel."""
    result = (one | other) & State.ZERO
    if one & State.UNIFORM:
        result |= other
    if other & State.UNIFORM:
        result |= one
    return result


def _product(c: CallView, left: str, right: str, formula: str) -> list[State]:
    """Return the states of a sum of products written as an einsum formula."""
    operands, result = formula.split("->")
    one, other = operands.split(",")
    left_states, right_states = c.states(left), c.states(right)
    for letter in set(one) - set(result):
        c.contract(left, one.index(letter), right, other.index(letter))
    row = []
    for letter in result:
        sides = [s[term.index(letter)] for s, term in ((left_states, one), (right_states, other)) if letter in term]
        row.append(multiplied(*sides) if len(sides) == 2 else sides[0])
    return row


_PRODUCTS = {
    "mm": ("self", "mat2", "ik,kj->ij"),
    "bmm": ("self", "mat2", "bik,bkj->bij"),
    "mv": ("self", "vec", "ik,k->i"),
    "dot": ("self", "tensor", "k,k->"),
    "vdot": ("self", "other", "k,k->"),
    "addmm": ("mat1", "mat2", "ik,kj->ij"),
    "baddbmm": ("batch1", "batch2", "bik,bkj->bij"),
}


@transfer("mm", "bmm", "mv", "dot", "vdot")
def _plain_product(c: CallView) -> Result:
    return [_product(c, *_PRODUCTS[c.call.name])]


@transfer("addmm", "baddbmm")
def _product_with_bias(c: CallView) -> Result:
    row = _product(c, *_PRODUCTS[c.call.name])
    bias = c.states("self")
    bias = [CONSTANT] * (len(row) - len(bias)) + bias
    return [[state & added for state, added in zip(row, bias, strict=True)]]


@transfer("convolution", "_convolution")
def _convolution(c: CallView) -> Result:
    """Tell the groups, which are not summed over, from the channels read and written per group."""
    reads, writes = (0, 1) if c["transposed"] else (1, 0)
    signal, weight, out = c.axes("input"), c.axes("weight"), c.outputs[0][1]
    if any(c.facts.repeats(axis) for axis in (signal[1], weight[0], out[1])):
        c.refuse("its channels hold the growing ones twice")
    if is_grouped_by(c.call, c.facts):
        grouped = multiplied(c.states("input")[1], c.states("weight")[0])
    else:
        c.contract("input", 1, "weight", reads)
        grouped = c.states("weight")[writes]
    channels = grouped & c.entry("bias")
    # Samples, and positions under a kernel of size one, are treated alike; a bias adds the same to all of them.
    signals, kept = c.states("input"), CONSTANT if "bias" in c else ALL_ZERO
    return c.each_output(lambda dim: channels if dim == 1 else signals[dim] & kept)


def is_grouped_by(call: OpCall, facts: AxisFacts) -> bool:
    """Tell whether the factor is (in) the groups of a convolution."""
    arguments = call.arguments
    if arguments["groups"] == 1:
        return False
    within = call.axes[id(arguments["weight"])][1]
    across = call.output_axes[0][1] if arguments["transposed"] else call.axes[id(arguments["input"])][1]
    return facts.carries(across) and not facts.carries(within)


@transfer("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention")
@transfer("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")
def _attention(c: CallView) -> Result:
    if c.facts.carries(c.axes("key")[2]):
        c.refuse("its softmax sees new entries")
    c.contract("query", 3, "key", 3)
    value = c.states("value")
    output, *rest = c.everywhere(State.ANY)
    heads = [value[dim] & State.ZERO if c.facts.carries(c.outputs[0][1][dim]) else CONSTANT for dim in (0, 1)]
    return [(*heads, output[2], value[3]), *rest]


# -- norms ---------------------------------------------------------------------------------------------------------


@transfer("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training")
@transfer("_batch_norm_with_update", "_batch_norm_no_update", "cudnn_batch_norm")
def _batch_norm(c: CallView) -> Result:
    for mixing in c.call.mixings:
        if c.facts.carries(c.axes(mixing.tensor)[mixing.dim]):
            c.refuse("its batch norm normalises over new entries")
    kept = c.states("input")[1] & c.entry("bias") & c.entry("running_mean") & State.ZERO
    own = [kept if dim == 1 and c.facts.carries(a) else State.ANY for dim, a in enumerate(c.axes("input"))]
    _, *saved = c.everywhere(State.ANY)
    return [tuple(own), *saved]


def _normalised_dims(c: CallView) -> range:
    rank = len(c.axes("input"))
    return range(rank - len(c["normalized_shape"]), rank)


def _rescale(c: CallView, kind: str) -> None:
    weight = c.call.arguments.get("weight")
    conflict = "has no gain that could be rescaled" if weight is None else c.observer.gain_conflict(weight)
    if conflict is not None:
        c.refuse(f"its {kind} {conflict}")
    if any(map(c.observer.is_used, c.call.outputs[1:])):
        c.refuse(f"the statistics of its {kind} are used elsewhere")
    c.observer.gain_rescaled(c.call)


@transfer("native_layer_norm")
def _layer_norm(c: CallView) -> Result:
    """Keep the mean by new entries at the mean; the variance falls by n / n', gain and eps make up for it."""
    states, axes, dims = c.states("input"), c.axes("input"), _normalised_dims(c)
    inside = [dim for dim in dims if c.facts.carries(axes[dim])]
    for dim in inside:
        if c.facts.is_sum(axes[dim]):
            c.refuse("its layer norm sees several concatenated parts")
        if not c.facts.is_bare(axes[dim]) or any(c.tensor("input").shape[d] != 1 for d in dims if d != dim):
            c.refuse("its layer norm runs over more than these channels")
        if not states[dim] & State.MEAN:
            c.refuse("its layer norm sees new channels that cannot be at the mean of the others")
        _rescale(c, "layer norm")
    bias = c["bias"]

    def normalised(dim: int) -> State:
        if dim in inside:
            return State.ZERO & (ALL_ZERO if bias is None else c.states(bias)[dim - dims[0]])
        return _passed(states[dim], State.ANY)

    return c.each_output(normalised)


@transfer("_fused_rms_norm", "fxwidth::rms_norm")
def _rms_norm(c: CallView) -> Result:
    """Keep the sum of squares by new entries of zero; the mean square falls, gain and eps make up for it."""
    states, axes = c.states("input"), c.axes("input")
    for dim in _normalised_dims(c):
        if c.facts.carries(axes[dim]):
            c.need_zero("input", dim, "its RMS norm sees new channels that cannot be zero")
            _rescale(c, "RMS norm")
    return c.each_output(lambda dim: _passed(states[dim], State.ZERO))


@transfer("_weight_norm_interface")
def _weight_norm(c: CallView) -> Result:
    """Let zeros in where the norm runs over them; a slice of zeros has no direction."""
    own = c["dim"] % len(c.axes("v"))
    directions = c.states("v")
    for dim in c.carrying("v"):
        if dim != own:
            c.need_zero("v", dim, "its weight norm sees new channels that cannot be zero")
        elif directions[dim] & State.ZERO:
            c.refuse("it divides new channels that are zero by their norm")
    _, norms = c.everywhere(State.ANY)
    row = [CONSTANT if state & State.UNIFORM else state & State.ZERO for state in directions]
    row[own] = c.states("g")[own] & State.ZERO if c.facts.carries(c.axes("v")[own]) else CONSTANT
    return [row, norms]


@transfer("native_group_norm")
def _group_norm(c: CallView) -> Result:
    """Let whole groups in; more channels per group change the statistics of that group."""
    states, axes = c.states("input"), c.axes("input")
    grows_groups = c.facts.carries(c.outputs[1][1][1])
    if c.facts.repeats(axes[1]) or (c.facts.carries(axes[1]) and not grows_groups):
        c.refuse("its group norm reduces over new channels together with old ones of their group")
    if any(map(c.facts.carries, axes[2:])):
        c.refuse("its group norm reduces over new entries")
    kept = State.ZERO & states[1] & c.entry("bias") if grows_groups else State.ANY
    output, *statistics = c.everywhere(State.ANY)
    return [(output[0], kept, *output[2:]), *statistics]


# -- reductions ----------------------------------------------------------------------------------------------------

_REDUCTIONS = {
    "sum": "it sums over new channels, which cannot be zero",
    "vector norm": "its vector norm sees new channels that cannot be zero",
    "mean": "it takes the mean over new channels, which cannot be at the mean of the others",
}
_LINEAR = frozenset({"sum", "nansum", "mean"})
_EXTREMA = frozenset({"amax", "amin", "max", "min"})
_ZERO_AT_ZERO = _EXTREMA | {"linalg_vector_norm", "norm", "prod", "var", "std"}


@transfer("sum", "nansum", "mean", "var", "std", "var_mean", "std_mean", "amax", "amin", "any", "all", "logsumexp")
@transfer("linalg_vector_norm", "norm", "prod")
def _reduction(c: CallView) -> Result:
    for mixing in c.call.mixings:
        if c.facts.carries(c.axes(mixing.tensor)[mixing.dim]):
            _check_mixing(c, mixing.kind, mixing.dim)
    gone = {mixing.dim for mixing in c.call.mixings}
    name = c.call.name
    kept = ALL_ZERO if name in _LINEAR else State.ZERO if name in _ZERO_AT_ZERO else State.ANY
    states = c.states("self")
    keeps_dims = len(c.outputs[0][1]) == len(states)
    row = [_passed(state, kept) for dim, state in enumerate(states) if keeps_dims or dim not in gone]
    return [row] * len(c.outputs)


def _check_mixing(c: CallView, kind: str, dim: int) -> None:
    axis = c.axes("self")[dim]
    if kind == "mean":
        if not c.facts.is_product(axis):
            c.refuse("it takes the mean over several concatenated parts")
        if not c.states("self")[dim] & State.MEAN:
            c.refuse(_REDUCTIONS[kind])
    elif kind == "sum" or (kind == "vector norm" and _ignores_zeros(c)):
        c.need_zero("self", dim, _REDUCTIONS[kind])
    elif c.call.name == "any":
        c.need_zero("self", dim, "it asks whether any new channel is set")
    elif not (c.call.name in _EXTREMA and c.states("self")[dim] & State.MEAN):
        # A mean is never beyond the extremes.
        c.refuse(f"it takes a {kind} over new channels")


def _ignores_zeros(c: CallView) -> bool:
    order = c.call.arguments.get("ord", c.call.arguments.get("p", 2))
    return order is None or (isinstance(order, (int, float)) and order >= 0)


@transfer("max", "min", "argmax", "argmin")
def _extremum(c: CallView) -> Result:
    if c.call.mixings:
        return _reduction(c)
    if "other" in c:
        return c.everywhere(State.ANY)
    return _follow(c, c["self"], State.ZERO)


@transfer("_softmax", "_log_softmax", "_safe_softmax")
def _softmax(c: CallView) -> Result:
    dim = c["dim"] % max(1, len(c.axes("self")))
    if c.facts.carries(c.axes("self")[dim]):
        c.refuse("its softmax sees new channels")
    return _follow(c, c["self"], State.ANY)


@transfer("cumprod", "sort", "cummax", "cummin", "topk")
def _ordered(c: CallView) -> Result:
    return _follow(c, c["self"], State.ZERO)


# -- positions -----------------------------------------------------------------------------------------------------


@transfer("avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "pixel_shuffle")
@transfer("pixel_unshuffle", "im2col", "col2im")
@transfer("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d")
@transfer("_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d")
@transfer("upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")
@transfer("reflection_pad1d", "reflection_pad2d", "reflection_pad3d")
@transfer("replication_pad1d", "replication_pad2d", "replication_pad3d")
def _linear_over_positions(c: CallView) -> Result:
    return _follow(c, c.call.inputs[0])


@transfer("max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d")
def _max_pool(c: CallView) -> Result:
    return _follow(c, c.call.inputs[0], State.ZERO)


@transfer("grid_sampler_2d", "grid_sampler_3d")
def _grid_sampler(c: CallView) -> Result:
    signal, grid = c.call.inputs
    states, places = c.states(signal), c.states(grid)
    own = [states[0] if places[0] & State.UNIFORM else states[0] & State.ZERO, states[1]]
    return c.each_output(lambda dim: own[dim] if dim < 2 else State.ANY)
