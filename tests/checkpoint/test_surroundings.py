"""Saving and loading under what a caller has switched on: defaults of dtype and device, modes of gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import fxwidth
from tests.oracles import files


@contextmanager
def _doubles() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "meta device": lambda: torch.device("meta"),
    "doubles": _doubles,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


def _single() -> nn.Module:
    # Under other defaults too.
    with torch.device("cpu"):
        return files.network().to(torch.float32)


def _example() -> Tensor:
    with torch.device("cpu"):
        return files.inputs().to(torch.float32)


@pytest.mark.parametrize("form", files.FORMS)
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_what_is_saved_and_loaded_there_is_equal(name: str, form: str, tmp_path: Path) -> None:
    saved = files.graph()
    around, path = SURROUNDINGS[name], tmp_path / f"a{form}"

    def loaded() -> fx.GraphModule:
        return fxwidth.load(path, _single(), _example()) if form == ".safetensors" else fxwidth.load(path)

    with around():
        fxwidth.save(saved, path)
        inside = loaded()
    for gm in (inside, loaded()):
        assert files.is_equal(gm, saved)
        assert {str(tensor.device) for tensor in gm.state_dict().values()} == {"cpu"}
        gm(files.inputs()).sum().backward()
        assert all(parameter.grad is not None for parameter in gm.parameters())


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_a_function_makes_the_model_there(name: str, tmp_path: Path) -> None:
    """On the meta device, or of doubles: the values and the dtypes are those of the file."""
    saved = files.graph()
    fxwidth.save(saved, tmp_path / "a.safetensors")
    with SURROUNDINGS[name]():
        gm = fxwidth.load(tmp_path / "a.safetensors", files.network, files.inputs())
    assert files.is_equal(gm, saved)
