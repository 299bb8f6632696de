"""Every public name has an example in its docstring, and it runs."""

from __future__ import annotations

import doctest

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
    torch.manual_seed(0)
    text = PUBLIC[name].__doc__
    assert text is not None
    example = doctest.DocTestParser().get_doctest(text, {"torch": torch, "fxwidth": fxwidth}, name, None, None)
    assert example.examples, f"the docstring of {name} has no example"
    told: list[str] = []
    results = doctest.DocTestRunner(verbose=False).run(example, out=told.append)
    assert results.failed == 0, "".join(told)
