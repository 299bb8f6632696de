"""torch.distributed.checkpoint writes an evolved network and its optimizer, and reads it on other numbers of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import fxwidth
from fxwidth import FxwidthError
from fxwidth.checkpoint.resizes import resize_again, resizes_of
from tests.distributed.networks import inputs, mlp
from tests.distributed.processes import Processes
from tests.distributed.test_sharded import state_of

OPTIONS: dict[str, Any] = {"every": 2, "params": 0.5, "rounds": 3}


def begun(is_sharded: bool, resizes: str | None = None) -> Any:
    gm = fxwidth.trace(mlp(), inputs(0, 2, 6))
    if resizes is not None:
        resize_again(gm, resizes)
    options = dict(OPTIONS)
    if is_sharded:
        fully_shard(gm)
        options["shard"] = fully_shard
    optimizer = torch.optim.Adam(gm.parameters(), lr=0.01)
    return gm, optimizer, fxwidth.Evolver(gm, optimizer, **options)


def go_on(gm: Any, optimizer: Any, evolver: fxwidth.Evolver, steps: range, rank: int, size: int) -> None:
    for step in steps:
        x = inputs(step, 8, 6)[rank * 8 // size :][: 8 // size]
        optimizer.zero_grad()
        F.mse_loss(gm(x), x[:, :3].sin()).backward()
        optimizer.step()
        evolver.step(x)


def saved(rank: int, size: int, folder: str) -> Any:
    gm, optimizer, evolver = begun(size > 1)
    go_on(gm, optimizer, evolver, range(5), rank, size)
    model_state, optimizer_state = get_state_dict(gm, optimizer)
    told = json.dumps({"resizes": resizes_of(gm), "progress": evolver.state_dict()["progress"]})
    dcp.save({"told": told, "model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    return state_of(gm, optimizer), evolver.history


def loaded(rank: int, size: int, folder: str) -> Any:
    state: dict[str, Any] = {"told": ""}
    dcp.load(state, checkpoint_id=folder)
    told = json.loads(state["told"])
    gm, optimizer, evolver = begun(size > 1, told["resizes"])
    evolver.load_state_dict({**evolver.state_dict(), "progress": told["progress"]})
    model_state, optimizer_state = get_state_dict(gm, optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(gm, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    found = state_of(gm, optimizer), evolver.history
    go_on(gm, optimizer, evolver, range(5, 8), rank, size)
    return found, state_of(gm, optimizer), len(evolver.history)


# torch tells so, where there is no process group.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)], ids=["from two to one", "from one to two"])
def test_a_run_goes_on_with_other_ranks(two: Processes, tmp_path: Path, sizes: tuple[int, int]) -> None:
    before, after = sizes
    state, history = two.run(saved, str(tmp_path))[0] if before == 2 else saved(0, 1, str(tmp_path))
    results = two.run(loaded, str(tmp_path)) if after == 2 else [loaded(0, 1, str(tmp_path))]
    for (own, told), ended, events in results:
        torch.testing.assert_close(own, state, rtol=0, atol=0)
        assert told == history
        assert events == 3
        torch.testing.assert_close(ended, results[0][1], rtol=0, atol=0)


def test_records_of_other_models_are_refused() -> None:
    text = resizes_of(fxwidth.resize(fxwidth.trace(mlp(), inputs(0, 2, 6)), {"0": [0, 3, 5]}))
    other = fxwidth.trace(torch.nn.Sequential(torch.nn.Linear(6, 24), torch.nn.Linear(24, 3)).double(), inputs(0, 2, 6))
    for given, told in (
        (text, "the record of resizes does not fit this model"),
        ("[]", "this is no record of resizes"),
    ):
        before = {name: one.clone() for name, one in other.state_dict().items()}
        with pytest.raises(FxwidthError, match=told):
            resize_again(other, given)
        torch.testing.assert_close(dict(other.state_dict()), before, rtol=0, atol=0)
    with pytest.raises(FxwidthError, match="resizes_of takes a torch"):
        resizes_of(3)  # type: ignore[arg-type]
