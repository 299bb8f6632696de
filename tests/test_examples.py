"""The examples run, and train what they evolve."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
# How long each is run, and what it must reach then.
CASES: dict[str, tuple[int, Any]] = {
    "plain_loop": (3, lambda accuracy: accuracy > 0.6),
    "lightning_loop": (3, lambda accuracy: accuracy > 0.6),
    "transformers_trainer": (60, lambda loss: loss < 1.5),
}


def test_every_example_has_a_case() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(CASES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_it_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("lightning", "transformers"):
        if name.startswith(package):
            pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    length, good = CASES[name]
    assert good(module.main(length))
    assert "parameters" in capsys.readouterr().out
