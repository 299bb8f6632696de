"""Every public name has an example in its docstring, and it runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re

import pytest
import torch

import fxwidth
from fxwidth import passes

PUBLIC = {
    **{name: getattr(fxwidth, name) for name in fxwidth.__all__},
    **{n: getattr(passes, n) for n in passes.__all__},
}


@pytest.mark.usefixtures("tables_as_before")
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


def untold(name: str, value: object) -> list[str]:
    """Return what the docstring of a public name leaves out: its parameters, what it raises, what it returns."""
    text = inspect.getdoc(value) or ""
    found = re.split(r"^(Args|Attributes|Returns|Yields|Raises|Example|Source):", text, flags=re.MULTILINE)
    sections = dict(zip(found[1::2], found[2::2], strict=True))
    entries = f"{sections.get('Args', '')}\n{sections.get('Attributes', '')}"
    told = set(re.findall(r"^    (\w+)(?: \([^)]*\))?:", entries, re.MULTILINE))
    if isinstance(value, type) and issubclass(value, (Exception, dict)):
        return []  # made by the package alone
    wanted = [one for one in inspect.signature(value).parameters if not one.startswith("_") and one != "self"]  # type: ignore[arg-type]
    missing = [] if "options" in told else [f"{name}({one})" for one in wanted if one not in told]
    source = inspect.getsource(value)  # type: ignore[arg-type]
    if inspect.isfunction(value) and "Raises" not in sections and "FxwidthError" in source:
        missing.append(f"{name}: Raises")
    return missing


@pytest.mark.parametrize("name", PUBLIC)
def test_parameters_and_what_is_raised_are_told(name: str) -> None:
    assert not untold(name, PUBLIC[name])


def test_a_parameter_that_is_not_told_is_seen() -> None:
    def widened(width_graph: object, factor: float) -> None:
        """Widen all groups.

        Args:
            width_graph: the groups.
        """
        if factor < 1:
            raise fxwidth.FxwidthError("factor= must be at least 1.")

    assert untold("widened", widened) == ["widened(factor)", "widened: Raises"]


METHODS = [
    (f"{name}.{part}", getattr(value, part))
    for name, value in PUBLIC.items()
    if isinstance(value, type)
    for part in vars(value)
    if not part.startswith("_") and inspect.isfunction(getattr(value, part))
]


@pytest.mark.parametrize(("name", "method"), METHODS, ids=[name for name, _ in METHODS])
def test_methods_tell_their_parameters(name: str, method: object) -> None:
    assert inspect.getdoc(method)
    assert not untold(name, method)
