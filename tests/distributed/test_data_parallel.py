"""A network in DistributedDataParallel evolves on all ranks as one process does on all of the data."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fxwidth
from fxwidth.reconstruction import bn_recalibration
from fxwidth.runtime.process_groups import Ranks, rank_share
from tests.distributed.networks import cnn, digest, inputs, mlp
from tests.distributed.processes import Processes

SIZE = 8


def trained(step_of: Any, network: nn.Module, optimizer: Any, evolver: fxwidth.Evolver, steps: int) -> Any:
    """Return the losses, and after each resize a digest and the weights."""
    losses, states = [], []
    for step in range(steps):
        x, y = step_of(step)
        optimizer.zero_grad()
        loss = F.mse_loss(network(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if evolver.step(x, y) is not None:
            states.append(digest(evolver.gm, optimizer, evolver.history))
    return losses, states, {name: one.detach() for name, one in evolver.gm.named_parameters()}


def joint(step: int) -> tuple[Tensor, Tensor]:
    x = inputs(step, 2 * SIZE, 6)
    return x, x[:, :3].sin()


OPTIONS = {"params": 0.4, "rounds": 4, "stop": 20}
BY_LOSS = {"params": 0.5, "rounds": 1, "stop": 6, "loss": F.mse_loss, "directions": "tiny", "reader_step": True}


def evolved(rank: int, size: int, options: dict[str, Any], unused: bool) -> Any:
    gm = fxwidth.trace(mlp(), torch.randn(2, 6, dtype=torch.float64))
    network = DistributedDataParallel(gm, find_unused_parameters=unused) if size > 1 else gm
    optimizer = torch.optim.Adam(gm.parameters(), lr=0.01)
    evolver = fxwidth.Evolver(network, optimizer, every=2, **options)  # type: ignore[arg-type]

    def part(step: int) -> tuple[Tensor, Tensor]:
        x, y = joint(step)
        return (x, y) if size == 1 else (x[rank * SIZE :][:SIZE], y[rank * SIZE :][:SIZE])

    return trained(part, network, optimizer, evolver, options["stop"] + 3)


@pytest.mark.parametrize("unused", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_training_is_that_of_one_process_on_the_joint_batch(two: Processes, unused: bool) -> None:
    first, second = two.run(evolved, OPTIONS, unused)
    losses, states, weights = evolved(0, 1, OPTIONS, False)
    assert first[1] == second[1]
    assert len(first[1]) == len(states) == 10
    for name, one in weights.items():
        torch.testing.assert_close(first[2][name], one, rtol=1e-6, atol=1e-8)
        assert torch.equal(first[2][name], second[2][name])
    mean = [(a + b) / 2 for a, b in zip(first[0], second[0], strict=True)]
    assert mean == pytest.approx(losses, rel=1e-7)


@pytest.mark.slow
def test_ranks_stay_equal_where_growth_goes_by_the_loss(two: Processes) -> None:
    first, second = two.run(evolved, BY_LOSS, False)
    assert first[1] == second[1]
    assert len(first[1]) == 3


def shards(rank: int, size: int, amounts: tuple[int, ...], *shape: int) -> list[Tensor]:
    """Return the batches of a rank, of sizes of their own; of all ranks where there is one process."""
    starts = [sum(amounts[:place]) for place in range(len(amounts))]
    whole = inputs(7, sum(amounts), *shape)
    own = [rank] if size > 1 else list(range(len(amounts)))
    return [part for one in own for part in whole[starts[one] :][: amounts[one]].split(5)]


NETWORKS = {"mlp": (mlp, (6,)), "cnn": (cnn, (3, 8, 8))}


def evolved_at_once(rank: int, size: int, name: str, amounts: tuple[int, ...], options: dict[str, Any]) -> Any:
    make, shape = NETWORKS[name]
    data = shards(rank, size, amounts, *shape)
    group = dist.group.WORLD if size > 1 else None
    gm = fxwidth.evolve(make(), inputs(1, 2, *shape), params=0.5, data=data, process_group=group, **options)
    return {name: one.detach() for name, one in gm.state_dict().items()}, fxwidth.report(gm).resizes


@pytest.mark.parametrize(
    ("name", "amounts", "options"),
    [
        ("cnn", (3, 30), {}),
        ("mlp", (20, 0), {"rotate": False, "selection": "cholesky"}),
        pytest.param("mlp", (20, 20), {}, marks=pytest.mark.slow),
        pytest.param("cnn", (20, 0), {"rotate": False, "selection": "cholesky"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_data_of_all_ranks_are_seen(two: Processes, name: str, amounts: tuple[int, ...], options: Any) -> None:
    first, second = two.run(evolved_at_once, name, amounts, options)
    weights, history = evolved_at_once(0, 1, name, amounts, options)
    assert first[1] == second[1]
    assert [one["kept"] for one in first[1]] == [one["kept"] for one in history]
    for key, one in weights.items():
        assert torch.equal(first[0][key], second[0][key])
        torch.testing.assert_close(first[0][key], one, rtol=1e-7, atol=1e-9)


def normed(rank: int, size: int) -> Any:
    gm = fxwidth.trace(cnn(norms=True), inputs(0, 2, 3, 8, 8)).train()
    ddp = DistributedDataParallel(gm) if size > 1 else gm
    x = inputs(3, 32, 3, 8, 8)
    part = x[16 * rank :][:16] if size > 1 else x
    ddp(part).sum().backward()
    own = gm.get_buffer("1.running_mean").clone()
    fxwidth.evolve(ddp, params=0.5, data=[part], recalibrate=True)
    return own, {name: one.detach() for name, one in gm.state_dict().items()}


def test_running_statistics_are_equal_after_a_resize(two: Processes) -> None:
    (first, one), (second, other) = two.run(normed)
    assert not torch.equal(first, second)
    for key in one:
        assert torch.equal(one[key], other[key])


def other_buffers(rank: int, size: int) -> Any:
    """Choose channels by what runs with statistics that differ between the ranks."""
    gm = fxwidth.trace(cnn(norms=True), inputs(0, 2, 3, 8, 8)).eval()
    gm.get_buffer("1.running_var").copy_(inputs(20 + rank, 12).exp())
    gm.get_buffer("1.running_mean").copy_(inputs(30 + rank, 12))
    parts = [inputs(3 + one, 16, 3, 8, 8) for one in ([rank] if size > 1 else [0, 1])]
    fxwidth.evolve(gm, params=0.5, data=parts, process_group=dist.group.WORLD if size > 1 else None)
    return {name: one.detach() for name, one in gm.state_dict().items()}


def test_buffers_are_those_of_the_first_rank_where_they_are_looked_at(two: Processes) -> None:
    wanted = other_buffers(0, 1)
    for found in two.run(other_buffers):
        for key, one in wanted.items():
            torch.testing.assert_close(found[key], one, rtol=1e-7, atol=1e-9)


def recalibrated(rank: int, size: int) -> Any:
    """Give more data than are looked at, which are few here."""
    with patch.object(bn_recalibration, "SAMPLES", 16):
        gm = fxwidth.trace(cnn(norms=True), inputs(0, 2, 3, 8, 8)).train()
        data = [inputs(40 + 10 * rank + number, 8, 3, 8, 8) for number in range(3)]
        if size == 1:
            data = [inputs(40, 8, 3, 8, 8), inputs(50, 8, 3, 8, 8)]
        group = dist.group.WORLD if size > 1 else None
        # Nothing else looks at data then.
        options: dict[str, Any] = {"selection": "magnitude", "fold": False, "rotate": False}
        fxwidth.resize(gm, {"0": 9}, data=data, recalibrate=True, process_group=group, **options)
    return gm.get_buffer("4.running_mean"), gm.get_buffer("4.running_var")


def test_ranks_share_the_number_of_samples_to_look_at(two: Processes) -> None:
    wanted = recalibrated(0, 1)
    for found in two.run(recalibrated):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)


def shares(rank: int, size: int) -> list[int]:
    found = [rank_share(5)]
    for is_data_parallel in (True, False):
        ranks = Ranks(dist.group.WORLD, is_data_parallel=is_data_parallel)

        def work(ranks: Ranks = ranks) -> None:
            found.append(rank_share(5))
            ranks.end()

        ranks.run(work)
    return found


def test_a_share_is_a_whole_number_and_all_of_it_where_data_are_the_same(two: Processes) -> None:
    assert two.run(shares) == [[5, 3, 5], [5, 3, 5]]


def trained_on(rank: int, size: int) -> Any:
    """Train on after a resize with gradients that differ between the ranks."""
    gm = fxwidth.trace(mlp(), inputs(0, 2, 6))
    ddp = DistributedDataParallel(gm)
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    fxwidth.resize(ddp, {"0": 10, "2": 30}, optimizer=optimizer)
    for step in range(3):
        optimizer.zero_grad()
        ddp(inputs(step + 10 * rank, 4, 6)).square().mean().backward()
        optimizer.step()
    return digest(gm, optimizer), gm.get_parameter("2.weight").grad


def test_gradients_are_averaged_after_a_resize(two: Processes) -> None:
    first, second = two.run(trained_on)
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])


def by_epochs(rank: int, size: int) -> Any:
    gm = fxwidth.trace(mlp(), inputs(0, 2, 6))
    ddp = DistributedDataParallel(gm)
    evolver = fxwidth.Evolver(gm, every="epoch", patience=1, params=0.5, rounds=2)
    # Rank 1 alone would go on waiting: together the metric has not become smaller.
    plans = [evolver.epoch(metric) is not None for metric in [(1.0, 1.0), (2.0, 0.9)][rank]]
    del ddp
    return plans, digest(gm)


def test_ranks_wait_for_the_same_metric(two: Processes) -> None:
    first, second = two.run(by_epochs)
    assert first == second
