"""Saving and loading under what a caller has switched on: defaults of dtype and device, modes of gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch

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


@pytest.mark.parametrize("form", files.FORMS)
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_what_is_saved_and_loaded_there_is_equal(name: str, form: str, tmp_path: Path) -> None:
    saved, path = files.graph(), tmp_path / f"a{form}"
    given = (files.network(), files.inputs()) if form == ".safetensors" else ()
    with SURROUNDINGS[name]():
        fxwidth.save(saved, path)
        inside = fxwidth.load(path, *given)
    for gm in (inside, files.load(path)):
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
