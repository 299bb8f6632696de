"""Remembered outcomes of ops: the tensors that torch's own fake mode makes, strides and shared storage included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxwidth.analysis.result import Analysis
from fxwidth.recording import tape
from fxwidth.runtime import fake_tensors
from fxwidth.runtime.fake_tensors import fake_like, fake_mode
from tests.oracles.judges import analysed, as_one_node
from tests.zoo.networks import CASES


def metadata(analysis: Analysis) -> list[Any]:
    """Return all that is known of each op's results: metadata, and which earlier tensors share their memory."""
    storages: dict[int, int] = {}
    identities: dict[int, int] = {}
    told = []
    for call in analysis.calls:
        for tensor in (*call.inputs, *call.outputs):
            storage = storages.setdefault(tensor.untyped_storage()._cdata, len(storages))
            identity = identities.setdefault(id(tensor), len(identities))
            known = tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device
            told.append((str(call.func), *known, tensor.requires_grad, storage, identity))
    return told


class Traps(nn.Module):
    """Calls that differ only in what a careless key would leave out."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        whole = x.to(torch.int64)
        y = x.relu_()
        y[:, 1:3].add_(1)
        first, second = x.split(2, 1)
        literals = (whole + 1, whole + 1.0, whole * True, whole / 2, whole.sum(), x.sum(), x.double().sum())
        views = (x.t(), x.t().contiguous().t(), x[:, 1:], x[1:], x.transpose(0, 1).reshape(-1), x.view(-1)[2:])
        count = torch.tensor(3).item()  # a constant: the fake mode knows its value
        lists = torch.cat([first, second, first], 1), torch.stack([first, second]), x.expand(count, 2, 4)
        return (y, *literals, *views, *lists, torch.max(x, 1)[0], torch.var_mean(x, 1)[0])


def _analysed(name: str) -> Analysis:
    if name == "traps":
        return analysed(as_one_node(Traps()), [torch.randn(2, 4)])
    return analysed(CASES[name].build(), CASES[name].inputs())


@pytest.mark.parametrize("name", ["traps", *CASES])
def test_remembered_outcomes_are_those_of_the_fake_mode(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_tensors, "_known", {})
    cold = metadata(_analysed(name))
    entries = len(fake_tensors._known)
    warm = metadata(_analysed(name))
    assert len(fake_tensors._known) == entries > 0
    monkeypatch.setattr(tape, "run_op", lambda func, args, kwargs: func(*args, **kwargs))
    assert cold == metadata(_analysed(name)) == warm


def test_remembered_outcomes_depend_on_the_default_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = as_one_node(Traps())
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            halves = [call for call in analysed(graph, [torch.randn(2, 4)]).calls if call.name == "div"]
        finally:
            torch.set_default_dtype(torch.float32)
        assert halves[0].outputs[0].dtype == dtype


def test_a_wrong_memory_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_tensors, "_known", {})
    right = metadata(_analysed("traps"))
    plain = fake_tensors._describe
    # A key without the types of literals: whole + 1 and whole + 1.0 become one.
    monkeypatch.setattr(fake_tensors, "_LITERALS", frozenset())
    monkeypatch.setattr(fake_tensors, "_describe", lambda values, mode, parts: plain([*_tensors(values)], mode, parts))
    monkeypatch.setattr(fake_tensors, "_known", {})
    assert metadata(_analysed("traps")) != right


def _tensors(values: Any) -> list[Any]:
    return [value for value in values if isinstance(value, (Tensor, list))]


@pytest.mark.parametrize(
    "tensor",
    [
        nn.Parameter(torch.zeros(3, 4)),
        nn.Parameter(torch.zeros(3, 4, dtype=torch.float16), requires_grad=False),
        nn.Parameter(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)),
        torch.zeros((), dtype=torch.int64),
        torch.zeros(6)[2:4],
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(3, device="meta"),
    ],
    ids=["parameter", "frozen half", "channels last", "counter", "view", "complex", "meta"],
)
def test_fakes_of_parameters_are_those_of_the_fake_mode(tensor: Tensor) -> None:
    own_mode, other_mode = fake_mode(), FakeTensorMode(allow_non_fake_inputs=True)
    fake_like(own_mode, torch.zeros(1))  # later ones are copied from the first
    own, other = fake_like(own_mode, tensor), other_mode.from_tensor(tensor)
    for name in ("shape", "dtype", "device", "layout", "requires_grad", "is_leaf"):
        assert getattr(own, name) == getattr(other, name)
    assert (own.stride(), own.storage_offset()) == (other.stride(), other.storage_offset())
    assert isinstance(own, nn.Parameter) == isinstance(tensor, nn.Parameter)
    assert _attributes(own) == _attributes(other)
    assert own_mode.from_tensor(tensor) is own


def _attributes(fake: Tensor) -> dict[str, Any]:
    # Its mode, and of which classes the real tensor was, are its own; the rest must not be missing.
    own = {"fake_mode", "pytype", "dispatch_keys", "_fxwidth_is_plain"}
    return {name: value for name, value in vars(fake).items() if name not in own and "item_memo" not in name}


def test_the_value_of_a_counter_is_known() -> None:
    counter = torch.tensor(3)
    assert fake_like(fake_mode(), counter).item() == 3
