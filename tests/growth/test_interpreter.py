"""How new channels pass each op, judged by the op itself.

Every sample call runs at its own sizes and with one factor grown, the new entries of its operands being zero, the mean,
like the others, or anything. Where the transfer lets them pass, the old part of the results must not notice, and the
new part must be what the transfer says.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxwidth.analysis.roles import Roles, find_roles
from fxwidth.axes.factors import Axis, Factor
from fxwidth.axes.index_maps import NEW, IndexMaps
from fxwidth.growth import pointwise
from fxwidth.growth.call_view import CallView
from fxwidth.growth.interpreter import Interpretation
from fxwidth.growth.states import ALL_ZERO, CONSTANT, State
from fxwidth.growth.tape_index import Slot
from fxwidth.growth.transfers import TRANSFERS, Result, Transfer, follow, transfer_of
from fxwidth.recording.tape import tensors_in, unbind
from fxwidth.rules.registry import RULES, resized_call
from tests.oracles.rules import Probe, make_probe
from tests.oracles.sample_calls import Sample
from tests.oracles.samples import ROWS

# In the order in which they can be made of a random tensor without spoiling one another.
KINDS = (CONSTANT, State.MEAN, State.ANY, State.ZERO, ALL_ZERO)
GROWN_BY = 2


def grown_maps(probe: Probe, factor: Factor) -> IndexMaps:
    kept = np.concatenate([np.arange(factor.size), np.full(GROWN_BY, NEW)])
    return IndexMaps(probe.analysis.space, {factor: kept})


def partners(axis: Axis, maps: IndexMaps, factor: Factor) -> dict[int, list[int]]:
    """Return, for each new position of a dim, the old ones that differ from it in the factor alone, by enumeration."""
    old: dict[tuple[object, ...], list[int]] = {}
    new: dict[int, tuple[object, ...]] = {}
    for place, own in enumerate(_coordinates(axis, maps)):
        others = tuple((element, 0 if element is factor else index) for element, index in own)
        if any(element is factor and index >= factor.size for element, index in own):
            new[place] = others
        else:
            old.setdefault(others, []).append(place)
    return {place: old[others] for place, others in new.items()}


def _coordinates(axis: Axis, maps: IndexMaps) -> Iterator[tuple[tuple[object, int], ...]]:
    for number, term in enumerate(axis):
        ranges = []
        for element in term:
            if isinstance(element, tuple):
                ranges.append(list(_coordinates(element, maps)))
            else:
                size = element if isinstance(element, int) else len(maps.of(element))
                ranges.append([((element, index),) for index in range(size)])
        for row in itertools.product(*ranges):
            yield (("term", number), *(part for parts in row for part in parts))


def expand(tensor: Tensor, axes: Sequence[Axis], maps: IndexMaps) -> Tensor:
    """Return a tensor at its new sizes with numbers in its new slots that occur nowhere else."""
    for dim, axis in enumerate(axes):
        indices = torch.from_numpy(maps.indices(axis))
        tensor = tensor.index_select(dim, indices.clamp(min=0))
        new = (indices == NEW).reshape([-1 if d == dim else 1 for d in range(tensor.dim())])
        if is_number(tensor):
            tensor = torch.where(new, torch.rand_like(tensor) * 0.8 + 0.1, tensor)
        elif tensor.dtype == torch.bool:
            tensor = torch.where(new, torch.rand(tensor.shape) < 0.5, tensor)
    return tensor


def make(probe: Probe, operand: int, factor: Factor, kinds: Mapping[Slot, State]) -> Tensor:
    """Return an operand at its new sizes whose entries along the factor are as the states say."""
    if probe.operands[operand].layout is not torch.strided:
        return probe.operands[operand]  # all of its dims are fixed
    maps, axes = grown_maps(probe, factor), [probe.analysis.space.normalise(a) for a in probe.operand_axes[operand]]
    tensor = expand(probe.operands[operand], axes, maps)
    order = sorted(range(len(axes)), key=lambda dim: KINDS.index(kinds.get((f"operand{operand}", dim), State.ANY)))
    for dim in order:
        kind = kinds.get((f"operand{operand}", dim), State.ANY)
        places = partners(axes[dim], maps, factor)
        rows = tensor.movedim(dim, 0)
        for new, olds in places.items():
            if kind == CONSTANT:
                rows[[*olds, new]] = rows[olds[0]].clone()
            elif kind == ALL_ZERO:
                rows[[*olds, new]] = torch.zeros_like(rows[new])
            elif kind == State.MEAN:
                rows[new] = rows[olds].mean(0)
            elif kind == State.ZERO:
                rows[new] = torch.zeros_like(rows[new])
    return tensor


def old_part(tensor: Tensor, axes: Sequence[Axis], maps: IndexMaps) -> Tensor:
    for dim, axis in enumerate(axes):
        tensor = tensor.index_select(dim, torch.from_numpy(np.flatnonzero(maps.indices(axis) != NEW)))
    return tensor


def is_number(tensor: Tensor) -> bool:
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def precise(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype.is_complex else tensor.double()


def holds(tensor: Tensor, dim: int, state: State, places: Mapping[int, list[int]]) -> bool:
    """Tell whether new entries are what a state says."""
    rows = tensor.movedim(dim, 0)
    tensor = precise(rows)
    for new, olds in places.items():
        if not tensor[new].isfinite().all() and tensor[olds].isfinite().all():
            return False
        expected = {
            State.ZERO: torch.zeros_like(tensor[new]),
            State.MEAN: tensor[olds].mean(0),
            State.UNIFORM: tensor[olds[0]],
        }
        for kind, value in expected.items():
            if state & kind and not torch.allclose(tensor[new], value, rtol=1e-9, atol=1e-12, equal_nan=True):
                return False
        if state & State.UNIFORM and not torch.allclose(tensor[olds], tensor[olds[:1]], equal_nan=True):
            return False
    return True


def combinations(probe: Probe, factor: Factor, limit: int = 12) -> Iterator[dict[Slot, State]]:
    """Yield states for the operand dims that carry a factor: all combinations, or a random choice of them."""
    slots = []
    for i, (axes, operand) in enumerate(zip(probe.operand_axes, probe.operands, strict=True)):
        for dim, axis in enumerate(axes):
            if factor in probe.analysis.space.factors(axis):
                kinds = KINDS if is_number(operand) else (CONSTANT, State.ANY, State.ZERO)
                slots.append(((f"operand{i}", dim), kinds))
    every = list(itertools.product(*(kinds for _, kinds in slots)))
    generator = np.random.default_rng(0)
    for number in generator.permutation(len(every))[:limit]:
        yield dict(zip((slot for slot, _ in slots), every[number], strict=True))


def call_grown(probe: Probe, maps: IndexMaps, run: Interpretation, operands: Sequence[Tensor]) -> list[Tensor]:
    """Run the prescribed call; a norm that asks for it gets its gain and eps rescaled."""
    call = probe.analysis.calls[0]
    if run.norms:
        signal = call.arguments["input"]
        ratio = signal.numel() / np.prod([maps.size(axis) for axis in call.axes[signal]])
        maps = maps.with_variance_ratios({call.index: float(ratio)})
    values = {e.fake: t for e, t in zip(probe.analysis.parameters.values(), operands, strict=True)}
    if run.norms:
        values[call.arguments["weight"]] = values[call.arguments["weight"]] * ratio**0.5
    func, arguments = resized_call(call, maps)
    real = {
        name: pytree.tree_map(lambda leaf: values.get(leaf, leaf).clone() if isinstance(leaf, Tensor) else leaf, v)
        for name, v in arguments.items()
    }
    args, kwargs = unbind(func, real)
    return tensors_in(func(*args, **kwargs))


def judge(probe: Probe, roles: Roles, factor: Factor, kinds: Mapping[Slot, State]) -> tuple[str | None, bool]:
    """Return why the transfer refuses, or None, and whether the op agrees with what the transfer says."""
    maps = grown_maps(probe, factor)
    run = Interpretation(probe.analysis, roles, factor, kinds).run()
    grown = [make(probe, i, factor, kinds) for i in range(len(probe.operands))]
    before = [old_part(*pair, maps) for pair in zip(grown, probe.operand_axes, strict=True)]
    try:
        expected = probe.run(before)
    except torch.linalg.LinAlgError:
        return "there is no result to compare with", True
    try:
        actual = call_grown(probe, maps, run, grown)
    except (RuntimeError, IndexError):
        return str(run.refusal), False
    agree = True
    results = list(zip(probe.analysis.calls[0].outputs, actual, expected, probe.result_axes, strict=True))
    # The saved statistics of a rescaled norm are not what they were; where they are used, it refuses.
    for output, new, old, axes in results[: 1 if run.norms else None]:
        agree &= torch.allclose(precise(old_part(new, axes, maps)), precise(old), rtol=1e-9, atol=1e-12, equal_nan=True)
        states = run.states.get(output)
        if run.refusal is not None or states is None:
            continue
        for dim, (axis, state) in enumerate(zip(axes, states, strict=True)):
            agree &= holds(new, dim, state, partners(probe.analysis.space.normalise(axis), maps, factor))
    return (None if run.refusal is None else str(run.refusal)), agree


def disagreements(sample: Sample) -> list[str]:
    """Return where the op does not do what its transfer says."""
    probe = make_probe(sample)
    if [call.func for call in probe.analysis.calls] != [sample.overload()]:
        pytest.skip("it is seen as other ops, which have rows of their own")
    # What no output depends on is not looked at.
    probe.analysis.outputs = probe.analysis.calls[0].outputs[:1]
    roles = find_roles(probe.analysis)
    found = []
    for factor in probe.factors():
        for kinds in combinations(probe, factor):
            refusal, agrees = judge(probe, roles, factor, kinds)
            if refusal is None and not agrees:
                found.append(f"{factor} with {kinds}")
    return found


@pytest.mark.parametrize("sample", ROWS, ids=[f"{row.op}-{i}" for i, row in enumerate(ROWS)])
def test_new_channels_pass_as_the_op_lets_them(sample: Sample) -> None:
    if not sample.by_value:
        pytest.skip("its results cannot be compared")
    assert not disagreements(sample)


def careless(c: CallView) -> Result:
    """Let everything pass as it is."""
    return follow(c, c.call.inputs[0])


def summing(c: CallView) -> Result:
    """Multiply and sum whatever comes."""
    states = c.states("self")
    return [[states[0], states[1], c.states("mat2")[2]]]


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("_softmax", careless),
        ("native_layer_norm", lambda c: [c.states("input"), *c.everywhere(State.ANY)[1:]]),
        ("native_group_norm", lambda c: [c.states("input"), *c.everywhere(State.ANY)[1:]]),
        ("native_batch_norm", lambda c: [c.states("input"), *c.everywhere(State.ANY)[1:]]),
        ("bmm", summing),
        ("convolution", lambda c: c.everywhere(State.ANY)),
        ("max_pool2d_with_indices", careless),
        ("mean", lambda c: [[State.ANY] * len(c.outputs[0][1])]),
        ("constant_pad_nd", lambda c: c.everywhere(ALL_ZERO)),
        ("glu", careless),
        ("index_put", careless),
        ("index_reduce", careless),
        ("scatter_add", careless),
        ("scatter_reduce", careless),
        ("masked_scatter", careless),
        ("logcumsumexp", careless),
        ("linalg_matrix_exp", careless),
        ("diag_embed", careless),
        ("_trilinear", lambda c: c.everywhere(State.ANY)),
        ("_cdist_forward", lambda c: c.everywhere(State.ANY)),
        ("torchvision::deform_conv2d", lambda c: c.everywhere(State.ANY)),
        ("_embedding_bag", lambda c: [[State.ANY, c.states("weight")[1]], *c.everywhere(State.ANY)[1:]]),
        ("fake_quantize_per_channel_affine_cachemask", careless),
    ],
)
def test_planted_faults_are_found(name: str, fault: Transfer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRANSFERS, name, fault)
    rows = [row for row in ROWS if row.op.split(".")[0] == name]
    assert any(disagreements(row) for row in rows)


def test_a_planted_pointwise_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pointwise._COMBINATIONS, "sigmoid", lambda at: at.state("self"))
    assert any(disagreements(row) for row in ROWS if row.op == "sigmoid")


def test_every_rule_has_a_transfer() -> None:
    made_once = "arange eye linspace randperm scalar_tensor empty_strided tril_indices triu_indices"
    # All that these take is pinned, or, for the last, growth is refused where they stand.
    looks = "nonzero _unique2 unique_consecutive unique_dim masked_select torchvision::nms"
    refused = "torchvision::roi_align torchvision::roi_pool"
    without = {name for name in RULES if transfer_of(name) is None}
    assert without == {*made_once.split(), *looks.split(), *refused.split()}
    assert set(TRANSFERS) <= set(RULES)
