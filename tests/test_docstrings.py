"""Every public name has an example in its docstring, and it runs."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch

import fxwidth
from fxwidth import passes

PUBLIC = {
    **{name: getattr(fxwidth, name) for name in fxwidth.__all__},
    **{n: getattr(passes, n) for n in passes.__all__},
}


@pytest.mark.parametrize("name", PUBLIC)
def test_an_example_runs(name: str) -> None:
    run_example(name, PUBLIC[name].__doc__)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", ["lightning", "transformers"])
def test_the_example_of_a_callback_runs(library: str) -> None:
    pytest.importorskip(library)
    module = importlib.import_module(f"fxwidth.integrations.{library}")
    run_example(f"{library} callback", module.EvolverCallback.__doc__)


def run_example(name: str, text: str | None) -> None:
    torch.manual_seed(0)
    assert text is not None
    example = doctest.DocTestParser().get_doctest(text, {"torch": torch, "fxwidth": fxwidth}, name, None, None)
    assert example.examples, f"the docstring of {name} has no example"
    told: list[str] = []
    results = doctest.DocTestRunner(verbose=False).run(example, out=told.append)
    assert results.failed == 0, "".join(told)
