"""Growth by what a loss asks for: exact, on record, refused where it lacks something, and a step only downhill."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxwidth
from fxwidth import FxwidthError
from fxwidth.growth.directions import DIRECTIONS, NEEDS, needs_of
from fxwidth.verification.replay_oracle import largest_difference
from tests.growth.informed_networks import NETWORKS, images, labels, network

METHODS = ("orthogonal", "random", "split", "gradmax", "tiny")
EXACT = 1e-10


def data() -> list[tuple[Tensor, Tensor]]:
    x, y = images(24), labels(24)
    return [(x[:9], y[:9]), (x[9:], y[9:])]


def task(method: str) -> dict[str, Any]:
    return {"data": data(), "loss": F.cross_entropy} if needs_of(method) else {}


def graph(name: str = "mlp") -> fx.GraphModule:
    return fxwidth.trace(network(name), images(4))


def growing(gm: fx.GraphModule, more: int = 3) -> dict[str, int]:
    free = [group for group in fxwidth.analyze(gm).free if group.inexact_growth is None]
    assert free
    return {group.name: group.width + more for group in free}


def outputs(gm: fx.GraphModule) -> list[Tensor]:
    found = []
    for mode in (True, False):
        for count in (6, 3):
            with torch.no_grad():
                found.append(copy.deepcopy(gm).train(mode)(images(count)))
    return found


def record(gm: fx.GraphModule) -> dict[str, Any]:
    return fxwidth.report(gm).resizes[-1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETWORKS)
def test_growth_leaves_the_function_in_both_modes(name: str, method: str) -> None:
    gm = graph(name)
    before, modes = outputs(gm), [part.training for part in gm.modules()]
    buffers = {name: tensor.clone() for name, tensor in gm.named_buffers()}
    plan = growing(gm)
    fxwidth.resize(gm, plan, directions=method, **task(method))
    assert largest_difference(outputs(gm), before) < EXACT
    assert record(gm)["directions"] == method
    assert record(gm)["reader_step"] is None
    assert [part.training for part in gm.modules()] == modes
    for name, tensor in gm.named_buffers():
        own = tuple(slice(0, size) for size in buffers[name].shape)
        torch.testing.assert_close(tensor[own], buffers[name])


@pytest.mark.parametrize("method", ["gradmax", "tiny"])
def test_methods_that_look_at_the_task_take_other_rows_than_orthogonal_ones(method: str) -> None:
    for name in NETWORKS:
        one, other = graph(name), graph(name)
        fxwidth.resize(one, growing(one), directions=method, **task(method))
        fxwidth.resize(other, growing(other))
        untold = record(one)["not_informed"]
        told = [
            parameter
            for parameter, tensor in one.named_parameters()
            if tensor.dim() > 1 and not torch.equal(tensor, other.get_parameter(parameter))
        ]
        assert told
        assert not set(told) & set(untold)


def test_what_cannot_be_gathered_is_on_record() -> None:
    gm = graph("attention")
    fxwidth.resize(gm, growing(gm), directions="tiny", **task("tiny"))
    untold = record(gm)["not_informed"]
    # Queries are multiplied with keys; values grow by heads and by channels of each head at once.
    assert {name: why.partition(" ")[0] for name, why in untold.items()}.keys() >= {"q.weight", "v.weight"}
    assert "up.weight" not in untold
    for more in ("heads", "channels of each head"):
        gm = graph("attention")
        wg = fxwidth.analyze(gm)
        heads, *_, width = (group for group in wg.free if group.sites[0].parameter in ("q.weight", "v.weight"))
        group = heads if more == "heads" else width
        before = outputs(gm)
        fxwidth.resize(gm, {group.name: group.width + 2}, directions="tiny", **task("tiny"))
        assert "v.weight" not in record(gm)["not_informed"], more
        assert largest_difference(outputs(gm), before) < EXACT
    gm = graph("concatenated")
    fxwidth.resize(gm, growing(gm), directions="tiny", **task("tiny"))
    assert set(record(gm)["not_informed"]) == {"depthwise.weight"}


def test_a_mixed_plan_grows_by_the_task_where_other_groups_shrink() -> None:
    gm = graph("residual")
    widths = {group.name: group.width for group in fxwidth.analyze(gm).free}
    fxwidth.resize(gm, {"up": widths["up"] + 2, "stem": widths["stem"] - 2}, directions="tiny", **task("tiny"))
    assert record(gm)["not_informed"] == {}
    assert gm.get_parameter("up.weight").shape[:2] == (widths["up"] + 2, widths["stem"] - 2)


# -- the step of readers ---------------------------------------------------------------------------------------------


def held_out_loss(gm: fx.GraphModule) -> float:
    """Return the loss on the last of two batches, which the step is chosen by."""
    x, y = data()[-1]
    with torch.no_grad():
        return float(F.cross_entropy(copy.deepcopy(gm).eval()(x), y))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_of_readers_lowers_the_loss_held_out_or_changes_nothing(name: str, method: str) -> None:
    gm = graph(name)
    before = held_out_loss(gm)
    fxwidth.resize(gm, growing(gm), directions=method, reader_step=True, data=data(), loss=F.cross_entropy)
    told = record(gm)["reader_step"]
    assert told["loss_before"] == pytest.approx(before, abs=1e-9)
    assert told["loss_after"] == pytest.approx(held_out_loss(gm), abs=1e-9)
    assert (told["loss_after"] < told["loss_before"]) is (told["length"] > 0)


def test_a_step_of_readers_is_judged_in_the_mode_of_the_network() -> None:
    """New channels of a batch norm are normalised by their own statistics in training alone."""
    gm = graph("residual").train()
    buffers = {name: tensor.clone() for name, tensor in gm.named_buffers()}
    fxwidth.resize(gm, growing(gm), directions="tiny", reader_step=True, **task("tiny"))
    told, (x, y) = record(gm)["reader_step"], data()[-1]
    assert told["length"] > 0
    with torch.no_grad():
        assert told["loss_after"] == pytest.approx(float(F.cross_entropy(copy.deepcopy(gm)(x), y)), abs=1e-9)
    assert gm.training
    for name, tensor in gm.named_buffers():
        own = tuple(slice(0, size) for size in buffers[name].shape)
        assert torch.equal(tensor[own], buffers[name]), name


def test_no_step_is_taken_uphill() -> None:
    """The targets of what is held out are those that the network gives: every step makes it worse."""
    gm, exact = graph(), graph()
    (x, y), (other, _) = data()
    with torch.no_grad():
        given = gm.eval()(other)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        wanted = target if target.dim() == 2 else F.one_hot(target, 4).to(output)
        return F.mse_loss(output, wanted)

    options = {"directions": "tiny", "data": [(x, y), (other, given)], "loss": loss}
    fxwidth.resize(gm, growing(gm), reader_step=True, **options)
    told = record(gm)["reader_step"]
    assert told["length"] == 0
    assert told["loss_after"] == told["loss_before"]
    options["data"] = [(x, y)]
    fxwidth.resize(exact, growing(exact), **options)
    for name, tensor in gm.state_dict().items():
        assert torch.equal(tensor, exact.state_dict()[name]), name


def test_a_step_of_readers_goes_by_single_batches_cut_in_two() -> None:
    gm, x = graph(), images(24)
    fxwidth.resize(gm, growing(gm), reader_step=True, data=[(x, labels(24))], loss=F.cross_entropy)
    assert record(gm)["reader_step"]["length"] > 0
    with pytest.raises(FxwidthError, match="one batch that cannot be divided into samples; pass two batches or more"):
        fxwidth.resize(gm, growing(gm), reader_step=True, data=[(x[:1], labels(1))], loss=F.cross_entropy)


# -- refusals --------------------------------------------------------------------------------------------------------


def _nan(output: Tensor, target: Tensor) -> Tensor:
    return output.sum() * float("nan")


def _rows(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")


X = images(8)
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"directions": "tiny"}, "directions='tiny' looks at the task and needs data=, batches of inputs and targets"),
    ({"directions": "gradmax", "data": data()}, "directions='gradmax' looks at the task and needs loss="),
    ({"reader_step": True, "loss": F.cross_entropy}, "reader_step=True looks at the task and needs data="),
    ({"loss": F.cross_entropy, "data": data()}, "loss= would be ignored: directions='orthogonal' does not look at it"),
    ({"data": data()}, "data= would be ignored: the plan drops no channels, and directions='orthogonal' does not look"),
    ({"directions": "tiny", "data": [X], "loss": F.cross_entropy}, "batch 0 of data holds inputs alone"),
    ({"directions": "tiny", "data": X, "loss": F.cross_entropy}, "batch 0 of data holds inputs alone"),
    ({"directions": "tiny", "data": [], "loss": F.cross_entropy}, "data gave no batches"),
    ({"directions": "tiny", "data": data(), "loss": _nan}, "loss= returned nan; it must return one finite number"),
    (
        {"directions": "tiny", "data": data(), "loss": _rows},
        r"loss= returned a tensor of shape \[9\]; it must return one finite number",
    ),
    ({"directions": "tiny", "data": data(), "loss": lambda out, y, z: out}, "fails: TypeError"),
    ({"directions": "tiny", "data": data(), "loss": lambda out, y: 3.0}, "loss= returned 3.0"),
    ({"reader_step": True, "data": data(), "loss": _nan}, "loss= returned nan"),
    ({"directions": "tiny", "data": [(X[:, :1], labels(8))], "loss": F.cross_entropy}, "batch 0 of data has shape"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_what_cannot_be_used_is_refused_before_anything_changes(options: dict[str, Any], words: str) -> None:
    gm = graph()
    plan, before = growing(gm), {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    optimizer = torch.optim.Adam(gm.parameters())
    parameters = list(gm.parameters())
    with pytest.raises(FxwidthError, match=words):
        fxwidth.resize(gm, plan, optimizer=optimizer, **options)
    assert fxwidth.report(gm).resizes == ()
    assert all(one is other for one, other in zip(gm.parameters(), parameters, strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in gm.state_dict().items())


def test_a_loss_that_fails_after_growth_takes_growth_back() -> None:
    gm, calls = graph(), []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        calls.append(0)
        return F.cross_entropy(output, target) * (float("nan") if len(calls) == 4 else 1.0)

    before = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    with pytest.raises(FxwidthError, match="one finite number"):
        fxwidth.resize(gm, growing(gm), directions="tiny", reader_step=True, data=data(), loss=loss)
    assert len(calls) == 4
    assert fxwidth.report(gm).resizes == ()
    assert all(torch.equal(tensor, before[name]) for name, tensor in gm.state_dict().items())


# -- the registry and the loop of training ---------------------------------------------------------------------------


def test_a_method_of_ones_own_is_given_what_it_needs() -> None:
    seen = []

    def own(rows: Tensor, count: int, generator: torch.Generator, moments: fxwidth.TaskMoments) -> Tensor:
        seen.append(moments)
        assert moments.cross is not None
        return moments.cross[:, :1].T.expand(count, -1) + 0 * rows[:1]

    try:
        fxwidth.growth_direction("of my own", needs=["cross"])(own)
        gm = graph()
        fxwidth.resize(gm, {"1": 8}, directions="of my own", data=data(), loss=F.cross_entropy)
        (moments,) = seen
        assert moments.inputs_second is None
        assert moments.residual is None
        assert moments.cross.shape == (128, 5)
        old, new = gm.get_parameter("1.weight").split([6, 2])
        torch.testing.assert_close(new.norm(dim=1), old.norm(dim=1).mean().expand(2))
        assert F.cosine_similarity(new, moments.cross[:, 0].expand(2, -1)).min() > 1 - 1e-9
        with pytest.raises(FxwidthError, match="directions='of my own' looks at the task and needs data="):
            fxwidth.resize(gm, {"1": 9}, directions="of my own")
    finally:
        DIRECTIONS.pop("of my own", None)
        NEEDS.pop("of my own", None)
    for needs in ("cross", ["crosses"]):
        with pytest.raises(FxwidthError, match="must name some of inputs_second, cross, residual"):
            fxwidth.growth_direction("of my own", needs=needs)


def test_rows_of_channels_that_lie_in_every_head_are_put_where_they_belong() -> None:
    made = []

    def own(rows: Tensor, count: int, generator: torch.Generator, moments: fxwidth.TaskMoments) -> Tensor:
        made.append(torch.randn(count, rows.shape[1], generator=generator, dtype=rows.dtype))
        return made[-1]

    try:
        fxwidth.growth_direction("drawn", needs=["cross"])(own)
        gm = graph("attention")
        fxwidth.resize(gm, {"v#1": 6}, directions="drawn", data=data(), loss=F.cross_entropy)
    finally:
        DIRECTIONS.pop("drawn", None)
        NEEDS.pop("drawn", None)
    # Two new channels, each with a row of 12 entries in each of three heads of 4 + 2 channels.
    (rows,) = made
    assert rows.shape == (2, 3 * 12)
    weight = gm.get_parameter("v.weight").detach().unflatten(0, (3, 6))
    for head in range(3):
        for channel in range(2):
            wanted = rows[channel, 12 * head : 12 * head + 12]
            assert F.cosine_similarity(weight[head, 4 + channel], wanted, dim=0) > 1 - 1e-9


def test_an_evolver_grows_by_the_batches_of_training_with_their_targets() -> None:
    options = {"grow_energy": 0.0, "grow_step": 2, "shrink_energy": 0.0, "directions": "tiny", "loss": F.cross_entropy}
    by_training, by_data = graph(), graph()
    evolver = fxwidth.Evolver(by_training, every=2, **options)
    for batch in data():
        evolver.step(*batch)
    fxwidth.Evolver(by_data, every=1, data=data(), recalibrate=False, **options).step()
    for name, tensor in by_training.state_dict().items():
        assert torch.equal(tensor, by_data.state_dict()[name]), name
    assert record(by_training)["directions"] == "tiny"
    assert record(by_training)["not_informed"] == {}


def test_an_evolver_without_targets_is_refused_and_can_go_on() -> None:
    gm = graph()
    options = {"grow_energy": 0.0, "grow_step": 2, "shrink_energy": 0.0, "directions": "tiny", "loss": F.cross_entropy}
    evolver = fxwidth.Evolver(gm, every=1, **options)
    with pytest.raises(FxwidthError, match=r"none has been given to step\(\) yet"):
        evolver.step()
    with pytest.raises(FxwidthError, match="holds inputs alone"):
        evolver.step(data()[0][0])
    assert fxwidth.report(gm).resizes == ()
    assert evolver.step(*data()[0]) is not None


def test_a_network_that_has_grown_trains() -> None:
    gm = graph("residual").train()
    optimizer = torch.optim.Adam(gm.parameters(), lr=1e-2)
    fxwidth.resize(gm, growing(gm), directions="tiny", reader_step=True, optimizer=optimizer, **task("tiny"))
    x, y = images(24), labels(24)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(gm(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(isinstance(tensor, nn.Parameter) for tensor in optimizer.param_groups[0]["params"])
