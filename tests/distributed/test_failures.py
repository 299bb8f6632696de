"""What fails on one rank fails on all, with nothing changed; and ranks that have parted are refused."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import fxwidth
from fxwidth import FxwidthError, passes
from tests.distributed.networks import digest, inputs, mlp
from tests.distributed.processes import PATIENCE, Processes
from tests.distributed.test_data_parallel import OPTIONS, evolved


def traced() -> Any:
    return fxwidth.trace(mlp(), inputs(0, 2, 6))


class OwnError(Exception):
    """What fails in a loader."""


def failing_batches() -> Iterator[Tensor]:
    yield inputs(0, 8, 6)
    raise OwnError("the disk is full")


def listener(update: Any) -> None:
    raise KeyboardInterrupt


def failing(rank: int, size: int, kind: str) -> Any:
    gm = traced()
    ddp = DistributedDataParallel(gm)
    optimizer = torch.optim.Adam(gm.parameters())
    ddp(inputs(0, 4, 6)).sum().backward()
    optimizer.step()
    before, reducer, message = digest(gm, optimizer), ddp.reducer, ""
    data: Any = [inputs(rank, 8, 6)]
    options: dict[str, Any] = {}
    if rank == 1 and kind == "data":
        data = failing_batches()
    if rank == 1 and kind == "not finite":
        data = [inputs(0, 8, 6).log()]
    if rank == 1 and kind == "Ctrl-C":
        options["progress"] = listener
    try:
        fxwidth.evolve(ddp, params=0.5, data=data, optimizer=optimizer, **options)
    except (FxwidthError, OwnError, KeyboardInterrupt) as error:
        message = f"{type(error).__name__}: {error}"
    assert digest(gm, optimizer) == before
    assert ddp.reducer is reducer
    # They are in step again, and gradients are averaged as before.
    ddp(inputs(rank, 4, 6)).sum().backward()
    fxwidth.evolve(ddp, params=0.5, data=[inputs(rank, 8, 6)], optimizer=optimizer)
    return message, digest(gm, optimizer)


@pytest.mark.parametrize(
    ("kind", "own", "others"),
    [
        ("data", "OwnError: the disk is full", "rank 1 has failed: OwnError: the disk is full."),
        pytest.param(
            "not finite",
            "holds NaN or infinite values",
            "rank 1 has failed: FxwidthError: input 'input' in batch 0",
            marks=pytest.mark.slow,
        ),
        ("Ctrl-C", "KeyboardInterrupt", "rank 1 has failed: KeyboardInterrupt."),
    ],
)
def test_a_rank_that_fails_makes_all_fail(two: Processes, kind: str, own: str, others: str) -> None:
    first, second = two.run(failing, kind)
    assert others in first[0]
    assert "nothing has changed on any" in first[0]
    assert own in second[0]
    assert first[1] == second[1]


def refused(rank: int, size: int, kind: str) -> str:
    gm = traced()
    ddp = None if kind == "by itself" else DistributedDataParallel(gm)
    plan, data, optimizer = {"0": 12}, [inputs(rank, 8, 6)], torch.optim.SGD(gm.parameters(), lr=0.1, momentum=0.9)
    gm(inputs(0, 2, 6)).sum().backward()
    optimizer.step()
    if kind == "parted" and rank:
        gm.get_parameter("2.weight").data[0, 0] += 1e-9
    if kind == "momentum" and rank:
        optimizer.state[gm.get_parameter("2.bias")]["momentum_buffer"] += 1
    if kind == "rate" and rank:
        optimizer.param_groups[0]["lr"] = 0.2
    if kind == "plan" and rank:
        plan = {"0": 11}
    if kind == "hook":
        ddp.register_comm_hook(None, lambda state, bucket: None)  # type: ignore[union-attr]
    before = digest(gm, optimizer)
    options = {"data": data} if kind != "no data" or rank else {}
    work = partial(fxwidth.evolve, gm, params=0.5) if kind == "no data" else partial(fxwidth.resize, gm, plan)
    with pytest.raises(FxwidthError) as caught:
        work(optimizer=optimizer, **options)
    assert digest(gm, optimizer) == before
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("parted", "rank 0 and rank 1 differ in '2.weight' before the resize"),
        ("momentum", "differ in \"'momentum_buffer' of SGD's parameter 3 in group 0\" before the resize"),
        ("rate", 'differ in "lr= of SGD\'s group 0" before the resize'),
        ("plan", "rank 1 was given another plan"),
        ("no data", "the ranks are at different points of the work"),
        ("hook", "with a communication hook, whose reducer cannot be made anew"),
    ],
)
def test_ranks_that_do_not_do_the_same_are_refused(two: Processes, kind: str, told: str) -> None:
    messages = two.run(refused, kind)
    assert any(told in message for message in messages)
    assert all(messages)


def wrapped_otherwise(rank: int, size: int) -> str:
    ddp = DistributedDataParallel(mlp())
    with pytest.raises(FxwidthError) as caught:
        fxwidth.evolve(ddp, inputs(0, 2, 6), params=0.5)
    return str(caught.value)


def test_a_wrapper_of_a_model_is_refused(two: Processes) -> None:
    for message in two.run(wrapped_otherwise):
        assert "holds a Sequential and no graph" in message
        assert "fxwidth.trace(model, inputs)" in message


def test_what_is_no_process_group_is_refused() -> None:
    with pytest.raises(FxwidthError, match=r"process_group= takes a group of torch\.distributed"):
        fxwidth.resize(traced(), {"0": 12}, process_group=3)  # type: ignore[arg-type]


def sharded(rank: int, size: int) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    gm = traced()
    parallelize_module(gm, init_device_mesh("cpu", (size,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    with pytest.raises(FxwidthError) as caught:
        fxwidth.analyze(gm)
    return str(caught.value)


def test_sharded_weights_are_never_taken_for_whole_ones(two: Processes) -> None:
    for message in two.run(sharded):
        assert "0.weight is sharded over processes (DTensor)" in message


def killed(rank: int, size: int) -> Any:
    gm = traced()
    ddp = DistributedDataParallel(gm)
    optimizer = torch.optim.Adam(gm.parameters())
    ddp(inputs(0, 4, 6)).sum().backward()
    optimizer.step()
    before, reducer = digest(gm, optimizer), ddp.reducer
    batches = [inputs(rank, 8, 6), inputs(rank + 3, 8, 6)]
    with pytest.raises(FxwidthError) as caught:
        fxwidth.evolve(ddp, params=0.5, data=dying(batches, rank == size - 1), optimizer=optimizer)
    assert digest(gm, optimizer) == before
    assert ddp.reducer is reducer
    return str(caught.value)


def dying(batches: list[Tensor], dies: bool) -> Iterator[Tensor]:
    yield batches[0]
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)
    yield batches[1]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_the_others_have_what_they_had_if_one_is_killed(tmp_path: Path, size: int) -> None:
    processes = Processes(size, tmp_path, seconds=20)
    for end in processes.ends:
        end.send((killed, ()))
    for end in processes.ends[:-1]:
        assert end.poll(PATIENCE)
        fault, message = end.recv()
        assert fault is None
        assert f"the {size} ranks could not exchange what they have" in message
        assert "Nothing has changed in this process" in message
    processes.close()


@pytest.mark.slow
def test_four_ranks_stay_equal(tmp_path: Path) -> None:
    processes = Processes(4, tmp_path)
    results = processes.run(evolved, OPTIONS, False)
    processes.close()
    assert len(results[0][1]) == 10
    assert all(found[1] == results[0][1] for found in results)


PASSES: dict[str, Callable[[], passes.WidthPass]] = {
    "ChangeBasis": lambda: passes.ChangeBasis([inputs(0, 8, 6)]),
    "RecalibrateBatchNorm": lambda: passes.RecalibrateBatchNorm([inputs(0, 8, 6)]),
    "FactorizeLinear": lambda: passes.FactorizeLinear(params=0.9),
    "FoldBatchNorm": passes.FoldBatchNorm,
}


def passed(rank: int, size: int, name: str) -> Any:
    gm = traced().eval()
    ddp = DistributedDataParallel(gm)
    before, messages = digest(gm, None), []
    for run in (PASSES[name](), passes.Pipeline(PASSES[name]())):
        with pytest.raises(FxwidthError) as caught:
            run(gm)
        messages.append(str(caught.value))
    ddp(inputs(rank, 4, 6)).sum().backward()
    return messages, digest(gm, None) == before


@pytest.mark.parametrize("name", PASSES)
def test_passes_that_see_one_rank_alone_are_refused_in_a_wrapper(two: Processes, name: str) -> None:
    for messages, is_same in two.run(passed, name):
        assert is_same
        assert all(name in one and "no DistributedDataParallel is around it" in one for one in messages)


def varying(rank: int, size: int) -> Any:
    times = iter(range(1, 1000))

    def measure(gm: Any) -> float:
        """Return times that go with the widths and differ between the ranks and from call to call."""
        return sum(one.numel() for one in gm.parameters()) * (1 + 0.05 * ((next(times) * (rank + 2)) % 7) / 7)

    gm = traced()
    ddp = DistributedDataParallel(gm)
    fxwidth.evolve(ddp, budget=fxwidth.Budget(latency=0.6, measure=measure), data=[inputs(rank, 8, 6)])
    return digest(gm, None)


@pytest.mark.filterwarnings("ignore::fxwidth.FxwidthWarning")
def test_times_that_differ_between_ranks_make_one_plan(two: Processes) -> None:
    one, other = two.run(varying)
    assert one == other
