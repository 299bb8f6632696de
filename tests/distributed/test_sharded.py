"""Parameters that are spread over ranks, by fully_shard or tensor parallelism, are resized and spread again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fxwidth
from fxwidth import FxwidthError
from tests.distributed.networks import digest, inputs, mlp
from tests.distributed.processes import Processes


def whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def by_layers(gm: Any) -> None:
    for name in ("0", "2"):
        fully_shard(gm.get_submodule(name))
    fully_shard(gm)


def in_parts(gm: Any) -> None:
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(gm, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


WAYS: dict[str, Any] = {"root": fully_shard, "by layers": by_layers, "tensor parallel": in_parts}
SIZE = 8
SLOW = pytest.mark.slow


def state_of(gm: nn.Module, optimizer: Any) -> Any:
    """Return the whole parameters and the whole state of the optimizer."""
    named = {name: whole(one.detach()).clone() for name, one in gm.named_parameters()}
    states = [
        {key: whole(value).clone() for key, value in optimizer.state.get(one, {}).items()} for one in gm.parameters()
    ]
    return named, states


def trained(rank: int, size: int, way: str) -> Any:
    gm = fxwidth.trace(mlp(), inputs(0, 2, 6))
    is_split = size > 1 and way != "tensor parallel"
    options: dict[str, Any] = {"params": 0.5, "rounds": 4, "stop": 20, "align": 2}
    if size > 1:
        WAYS[way](gm)
        options |= {"shard": WAYS[way]} if is_split else {}
    optimizer = torch.optim.Adam(gm.parameters(), lr=0.01)
    evolver = fxwidth.Evolver(gm, optimizer, every=2, **options)
    losses, found = [], []
    for step in range(22):
        x = inputs(step, 2 * SIZE, 6)
        y = x[:, :3].sin()
        if is_split:
            x, y = x[rank * SIZE :][:SIZE], y[rank * SIZE :][:SIZE]
        optimizer.zero_grad()
        loss = F.mse_loss(gm(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(whole(loss.detach())))
        if evolver.step(x, y) is not None:
            found.append(digest(state_of(gm, optimizer), evolver.history))
            assert size == 1 or isinstance(gm.get_parameter("0.weight"), DTensor)
    return losses, found, state_of(gm, optimizer)[0], evolver.history


@pytest.mark.parametrize(
    "way", [pytest.param("root", marks=SLOW), "by layers", pytest.param("tensor parallel", marks=SLOW)]
)
def test_training_is_that_of_one_process(two: Processes, way: str) -> None:
    first, second = two.run(trained, way)
    losses, found, weights, history = trained(0, 1, way)
    assert first[1] == second[1]
    assert len(first[1]) == len(found) == 10
    assert first[3] == history
    for name, one in weights.items():
        torch.testing.assert_close(first[2][name], one, rtol=1e-6, atol=1e-8)
    mean = [(a + b) / 2 for a, b in zip(first[0], second[0], strict=True)]
    assert mean == pytest.approx(losses, rel=1e-7)


def failing_batches(rank: int) -> Any:
    yield inputs(0, 8, 6)
    if rank:
        raise OSError("the disk is full")


def failed(rank: int, size: int, way: str) -> str:
    gm = fxwidth.trace(mlp(), inputs(0, 2, 6))
    WAYS[way](gm)
    optimizer = torch.optim.Adam(gm.parameters(), lr=0.01)
    options: dict[str, Any] = {} if way == "tensor parallel" else {"shard": WAYS[way]}

    def step(number: int) -> None:
        optimizer.zero_grad()
        gm(inputs(number, 4, 6)).square().mean().backward()
        optimizer.step()

    step(0)
    before, kinds = digest(state_of(gm, optimizer)), [type(part) for part in gm.modules()]
    parameters = list(gm.parameters())
    with pytest.raises((FxwidthError, OSError)) as caught:
        fxwidth.evolve(gm, params=0.5, data=failing_batches(rank), optimizer=optimizer, **options)
    assert [type(part) for part in gm.modules()] == kinds
    assert all(a is b for a, b in zip(gm.parameters(), parameters, strict=True))
    assert digest(state_of(gm, optimizer)) == before
    step(1)
    fxwidth.evolve(gm, params=0.5, align=2, data=[inputs(0, 8, 6)], optimizer=optimizer, **options)
    step(2)
    return str(caught.value)


@pytest.mark.parametrize("way", [pytest.param("root", marks=SLOW), "by layers", "tensor parallel"])
def test_a_failure_leaves_them_as_they_were(two: Processes, way: str) -> None:
    for message in two.run(failed, way):
        assert "the disk is full" in message


def with_gradients(rank: int, size: int, way: str) -> Any:
    gm = fxwidth.trace(mlp(), inputs(0, 2, 6))
    options: dict[str, Any] = {}
    if size > 1:
        WAYS[way](gm)
        options = {} if way == "tensor parallel" else {"shard": WAYS[way]}
    for number in range(2):  # they add up
        gm(inputs(number, 4, 6)).square().mean().backward()
    data = inputs(0, 8, 6)
    fxwidth.resize(gm, {"0": 10, "2": 18}, data=[data[4 * rank :][:4] if options else data], **options)
    return {name: None if one.grad is None else whole(one.grad).clone() for name, one in gm.named_parameters()}


@pytest.mark.parametrize("way", [pytest.param("root", marks=SLOW), "by layers", "tensor parallel"])
def test_gradients_come_through_a_resize(two: Processes, way: str) -> None:
    wanted = with_gradients(0, 1, way)
    assert all(one is not None and one.abs().sum() > 0 for one in wanted.values())
    for found in two.run(with_gradients, way):
        assert found.keys() == wanted.keys()
        for name, one in wanted.items():
            torch.testing.assert_close(found[name], one, rtol=1e-7, atol=1e-9)


def refused(rank: int, size: int, kind: str) -> str:
    gm = fxwidth.trace(mlp(), inputs(0, 2, 6))
    WAYS["tensor parallel" if kind in ("uneven", "needless") else "root"](gm)
    before = digest(state_of(gm, torch.optim.SGD(gm.parameters())))
    options: dict[str, Any] = {"needless": {"shard": fully_shard}, "other": {"shard": lambda _: None}}.get(kind, {})
    with pytest.raises(FxwidthError) as caught:
        fxwidth.resize(gm, {"0": 11}, **options)
    assert digest(state_of(gm, torch.optim.SGD(gm.parameters()))) == before
    gm(inputs(0, 4, 6)).sum().backward()
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("uneven", "'0.weight' would have 11 entries along dim 0, which 2 ranks cannot share evenly"),
        ("needless", "shard= is for a graph sharded by fully_shard"),
        ("unsaid", "Pass the function that does it: shard=fully_shard"),
        ("other", "give the function by which the graph was sharded"),
    ],
)
def test_what_cannot_be_spread_anew_is_refused(two: Processes, kind: str, told: str) -> None:
    for message in two.run(refused, kind):
        assert told in message


def piped(rank: int, size: int) -> Any:
    gm = fxwidth.trace(mlp(), inputs(0, 2, 6))
    fully_shard(gm)
    wanted = gm(inputs(0, 4, 6))
    with pytest.raises(FxwidthError, match="sharded over processes") as caught:
        fxwidth.passes.Pipeline(lambda _: None)(gm)
    assert torch.equal(gm(inputs(0, 4, 6)), wanted)
    return str(caught.value)


def test_a_pipeline_leaves_a_sharded_graph_as_it_is(two: Processes) -> None:
    assert all("taken by fxwidth.resize, fxwidth.evolve and an Evolver, with shard=" in told for told in two.run(piped))
