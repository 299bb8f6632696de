"""The state of optimizers and an Evolver in the file of their graph: a training goes on as it would have."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

import fxwidth
from fxwidth import FxwidthError
from fxwidth.serialization.plain_trees import TensorsBeside, decoded, encoded
from tests.oracles import files

Make = Callable[[Iterable[nn.Parameter]], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "Adafactor": torch.optim.Adafactor,
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, centered=True),
    "groups": lambda parameters: torch.optim.Adam(_in_groups(list(parameters))),
    "Muon": lambda parameters: torch.optim.Muon([one for one in parameters if one.dim() == 2]),
}


def _in_groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": parameters[::2], "lr": 1e-3}, {"params": parameters[1::2], "lr": 1e-2, "betas": (0.8, 0.9)}]


def training(make: Make) -> tuple[fx.GraphModule, Optimizer, fxwidth.Evolver]:
    gm = fxwidth.trace(files.network().train(), files.inputs())
    return evolving(gm, make)


def evolving(gm: fx.GraphModule, make: Make) -> tuple[fx.GraphModule, Optimizer, fxwidth.Evolver]:
    optimizer = make(gm.parameters())
    return gm, optimizer, fxwidth.Evolver(gm, optimizer, every=3, params=0.6, rounds=3)


def trained(gm: fx.GraphModule, optimizer: Optimizer, evolver: fxwidth.Evolver, steps: range) -> None:
    for step in steps:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        gm(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        evolver.step(x)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_goes_on_to_the_same_result(name: str, tmp_path: Path) -> None:
    make, path = OPTIMIZERS[name], tmp_path / "a.safetensors"
    whole = training(make)
    trained(*whole, range(7))
    gm, optimizer, evolver = whole
    fxwidth.save(gm, path, optimizer=optimizer, evolver=evolver)
    trained(*whole, range(7, 13))
    # Into a fresh graph with its optimizer, and into one that was loaded without.
    fresh = training(make)
    fxwidth.load(path, fresh[0], optimizer=fresh[1], evolver=fresh[2])
    loaded = evolving(fxwidth.load(path, lambda: files.network().train(), files.inputs()), make)
    fxwidth.load(path, loaded[0], optimizer=loaded[1], evolver=loaded[2])
    for again in (fresh, loaded):
        trained(*again, range(7, 13))
        assert again[2].history == evolver.history
        assert all(torch.equal(*pair) for pair in zip(again[0].parameters(), gm.parameters(), strict=True))
    assert len(evolver.history) == 3


def test_without_the_state_it_would_go_another_way(tmp_path: Path) -> None:
    """Planted fault."""
    make, path = OPTIMIZERS["AdamW"], tmp_path / "a.safetensors"
    whole = training(make)
    trained(*whole, range(7))
    fxwidth.save(whole[0], path)
    trained(*whole, range(7, 9))
    again = training(make)
    fxwidth.load(path, again[0])
    trained(*again, range(7, 9))
    assert not torch.equal(again[0].get_parameter("0.weight"), whole[0].get_parameter("0.weight"))


def test_a_state_keeps_its_dtypes(tmp_path: Path) -> None:
    """torch would convert what is of another dtype than its parameter."""
    gm, path = files.graph().bfloat16(), tmp_path / "a.safetensors"
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1, momentum=0.9)
    optimizer.state[gm.get_parameter("0.weight")]["momentum_buffer"] = torch.randn(13, 6) / 3
    fxwidth.save(gm, path, optimizer=optimizer)
    again = torch.optim.SGD(gm.parameters(), lr=0.1, momentum=0.9)
    fxwidth.load(path, gm, optimizer=again)
    saved, found = (one.state[gm.get_parameter("0.weight")]["momentum_buffer"] for one in (optimizer, again))
    assert found.dtype == torch.float32
    assert torch.equal(found, saved)


class Keeping(torch.optim.SGD):
    """Keeps what no file of plain data holds."""


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    gm, path = files.graph(), tmp_path / "a.safetensors"
    optimizer = Keeping(gm.parameters(), lr=0.1)
    optimizer.state[gm.get_parameter("0.weight")]["path"] = random.Random(0)
    with pytest.raises(
        FxwidthError, match=r"the state of Keeping for 0\.weight\['path'\] is a random\.Random, which a"
    ):
        fxwidth.save(gm, path, optimizer=optimizer)
    optimizer.state.clear()
    optimizer.param_groups[0]["schedule"] = print
    with pytest.raises(FxwidthError, match=r"an option of Keeping\[0\]\['schedule'\] is a builtins\.builtin_function"):
        fxwidth.save(gm, path, optimizer=optimizer)
    with_another = torch.optim.SGD([*gm.parameters(), nn.Parameter(torch.ones(3))], lr=0.1)
    with pytest.raises(
        FxwidthError, match=r"SGD trains parameter 10 of its group 0, of shape \(3,\), which is not in the"
    ):
        fxwidth.save(gm, path, optimizer=with_another)
    with pytest.raises(FxwidthError, match="evolves no graph or another one"):
        fxwidth.save(gm, path, evolver=fxwidth.Evolver(files.graph(), params=0.9))
    for other in ("a.pt", "a.pt2"):
        with pytest.raises(
            FxwidthError, match=r"go into a file of tensors, and .* is none; save to a path that ends in"
        ):
            fxwidth.save(gm, tmp_path / other, optimizer=torch.optim.SGD(gm.parameters(), lr=0.1))
    assert not list(tmp_path.iterdir())


def test_another_optimizer_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    gm, optimizer, evolver = training(OPTIMIZERS["AdamW"])
    trained(gm, optimizer, evolver, range(4))
    fxwidth.save(gm, path, optimizer=optimizer)
    fresh = fxwidth.trace(files.network(), files.inputs())
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    parameters = list(fresh.parameters())
    refused: dict[str, dict[str, Any]] = {
        r"the file holds the state of AdamW, but received SGD": {"optimizer": torch.optim.SGD(parameters, lr=0.1)},
        r"AdamW has other parameters in its groups than the file: .* is in only one": {
            "optimizer": torch.optim.AdamW(parameters[1:])
        },
        r"they are in other groups": {"optimizer": torch.optim.AdamW(_in_groups(parameters))},
        r"holds no state for evolver=": {"evolver": fxwidth.Evolver(fresh, params=0.5)},
        r"holds the state of 1 optimizers, but received 2": {
            "optimizer": [torch.optim.AdamW(parameters), torch.optim.AdamW(parameters)]
        },
    }
    for told, options in refused.items():
        with pytest.raises(FxwidthError, match=told):
            fxwidth.load(path, fresh, **options)
        assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())
    with pytest.raises(FxwidthError, match=r"load the graph first, make them for it, and load the same file into that"):
        fxwidth.load(path, files.network, files.inputs(), optimizer=optimizer)


VALUES: list[Any] = [
    None, True, 3, -(10**30), 0.1, float("inf"), "a", 1 + 2j, torch.float16, torch.device("cpu"), slice(1, None, 2),
    [1, (2, [3.5])], {1: "a", (2, 3): {"b": None}}, torch.channels_last, torch.strided, {"float": "nan"}, {"tensor": 1},
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_plain_values_come_back(value: Any) -> None:
    data = encoded(value, "it")
    again = decoded(data)
    assert again == value
    assert type(again) is type(value)


@pytest.mark.parametrize("number", [np.float64(0.1), np.float32(0.1), np.int64(3), np.bool_(True)], ids=repr)
def test_numbers_of_numpy_become_those_of_python(number: Any) -> None:
    """As a schedule of learning rates has them."""
    again = decoded(encoded(number, "it"))
    assert again == number
    assert type(again) in (float, int, bool)


def test_tensors_are_written_once_each() -> None:
    beside, one = TensorsBeside("state."), torch.ones(2)
    data = encoded({"a": one, "b": [one, torch.zeros(1)]}, "it", beside.leaf)
    assert list(beside.tensors) == ["state.0", "state.1"]

    def found(_: str, name: Any) -> Tensor:
        return beside.tensors[name]

    again = decoded(data, found)
    assert again["a"] is again["b"][0] is one


@pytest.mark.parametrize("is_named", [True, False])
def test_names_in_groups_go_with_their_parameters(is_named: bool, tmp_path: Path) -> None:
    def made(order: int) -> tuple[fx.GraphModule, Optimizer]:
        gm = fxwidth.trace(files.network().double(), files.inputs().double())
        named = list(gm.named_parameters())
        groups: list[Any] = [named[:3][::order], named[3:][::order]]
        if order < 0 and not is_named:
            groups = [[parameter for _, parameter in group] for group in groups]
        return gm, torch.optim.Adam([{"params": group} for group in groups])

    (gm, optimizer), (again, other) = made(1), made(-1)
    gm(files.inputs().double()).square().sum().backward()
    optimizer.step()
    fxwidth.save(gm, tmp_path / "a.safetensors", optimizer=optimizer)
    fxwidth.load(tmp_path / "a.safetensors", again, optimizer=other)
    names = {id(parameter): name for name, parameter in again.named_parameters()}
    for group in other.param_groups:
        assert group["param_names"] == [names[id(parameter)] for parameter in group["params"]]
    for name, parameter in again.named_parameters():
        assert torch.equal(other.state[parameter]["exp_avg"], optimizer.state[gm.get_parameter(name)]["exp_avg"])
