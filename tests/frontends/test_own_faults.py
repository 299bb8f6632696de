"""What is wrong in a model, or passed in the wrong place, is told as what it is, and nothing has changed after it."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxwidth
from fxwidth.errors import FxwidthError

X = torch.randn(2, 8)


class Misspelt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.calls = nn.Linear(8, 16), nn.BatchNorm1d(16), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.norm(self.a(x)) + torch.rand(()))  # the line that fails


class WrongSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).view(3, 7)


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def test_a_fault_of_the_model_is_told_with_its_line_and_changes_nothing() -> None:
    model = Misspelt()
    lines = Path(__file__).read_text().splitlines()
    line = next(i for i, text in enumerate(lines, 1) if "# the line that fails" in text)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    expected = (
        r"Misspelt itself fails on example_inputs of shapes \[\(2, 8\)\], before any tracing: AttributeError: "
        rf"'Misspelt' object has no attribute 'head' \({re.escape(__file__)}, line {line}, in forward\)\. Mend it there"
    )
    with pytest.raises(FxwidthError, match=expected) as caught:
        fxwidth.trace(model, X)
    assert isinstance(caught.value.__cause__, AttributeError)
    assert model.calls == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_size_that_does_not_fit_is_told_with_its_line() -> None:
    with pytest.raises(FxwidthError, match=rf"shape '\[3, 7\]'.*itself fails so: {re.escape(__file__)}, line"):
        fxwidth.trace(WrongSize(), X)


KINDS: dict[str, tuple[Any, str]] = {
    "array": (X.numpy(), r"holds a ndarray, where the model takes tensors; pass torch\.from_numpy\(array\)"),
    "array in a dict": ({"input": X.numpy()}, r"holds a ndarray"),
    "loader": (DataLoader(TensorDataset(X)), r"holds a DataLoader.*as in batch = next\(iter\(loader\)\)"),
    "data set": (TensorDataset(X), r"holds a TensorDataset.*next\(iter\(loader\)\)"),
    "shape": ((2, 8), r"These are whole numbers: for an input of that shape, pass torch\.randn\(2, 8\)"),
    "module": (plain(), r"holds a Sequential, where the model takes tensors; pass a tensor"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", [fxwidth.trace, fxwidth.evolve])
def test_a_wrong_kind_of_inputs_is_named(kind: str, function: Any) -> None:
    given, message = KINDS[kind]
    with pytest.raises(FxwidthError, match=message):
        function(plain(), given)


MODELS: dict[str, tuple[Any, str]] = {
    "class": (lambda: nn.Identity, r"received the class Identity\. Make one: Identity\(\.\.\.\)"),
    "path": (lambda: "model.pt2", r"received str\. A file is read by fxwidth\.load\(path\)"),
    "state": (lambda: plain().state_dict(), r"received OrderedDict\. A state dict belongs into a model"),
    "array": (lambda: np.zeros(3), r"received ndarray\.$"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_no_model_is_told_what_it_is(kind: str) -> None:
    make, message = MODELS[kind]
    with pytest.raises(FxwidthError, match=message):
        fxwidth.trace(make(), X)


@pytest.mark.filterwarnings("ignore")
def test_a_quantized_model_is_refused_and_not_only_pinned() -> None:
    if "x86" not in torch.backends.quantized.supported_engines:
        pytest.skip("no kernels for quantized layers")
    model = torch.ao.quantization.quantize_dynamic(plain(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(FxwidthError, match=r"'0' is quantized, as all layers with weights are.*resize the float model"):
        fxwidth.trace(model, X)


def test_a_sharded_parameter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class DTensor(nn.Parameter):
        """Named as what torch.distributed makes; a group of processes is not needed to be refused."""

    model = plain()
    model[0]._parameters["weight"] = DTensor(torch.zeros(16, 8))
    with pytest.raises(FxwidthError, match=r"0\.weight is sharded over processes \(DTensor\)"):
        fxwidth.trace(model, X)


@pytest.mark.usefixtures("tables_as_before")
def test_a_target_by_another_name_is_told_how_it_is_given() -> None:
    fxwidth.cost("watts", unit="watts")(lambda graph: fxwidth.cost_polynomial(graph, "params"))
    graph = fxwidth.analyze(fxwidth.trace(plain(), X))
    with pytest.raises(FxwidthError, match=r"watts= is no option.*budget=fxwidth\.Budget\(costs={'watts': \.\.\.}\)"):
        fxwidth.plan(graph, watts=0.5)  # type: ignore[call-arg]
    with pytest.raises(FxwidthError, match=r"amount= is no option of fxwidth\.plan; for a part.*give params=0\.5"):
        fxwidth.evolve(plain(), X, amount=0.5)  # type: ignore[call-overload]


@pytest.mark.parametrize("name", ["no/small.safetensors", "no/small.pt2", "no/small.pt"])
def test_a_missing_folder_is_named(name: str, tmp_path: Any) -> None:
    with pytest.raises(FxwidthError, match="folder"):
        fxwidth.save(fxwidth.trace(plain(), X), tmp_path / name)
