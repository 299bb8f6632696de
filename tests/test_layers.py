"""Each layer of the package imports only from those below it, and the check of that is not blind."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def checked(root: Path) -> subprocess.CompletedProcess[str]:
    # A process of its own: what is checked is found by its name on the search path.
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"]
    return subprocess.run(
        [*command, "--no-cache"],
        check=False,
        cwd=root,
        env={"PYTHONPATH": str(root), "PATH": ""},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "fxwidth", tmp_path / "fxwidth", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_layers_hold(copy: Path) -> None:
    pytest.importorskip("importlinter")
    done = checked(copy)
    assert done.returncode == 0, done.stdout
    assert "2 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("axes/factors.py", "from fxwidth.recording import tape", "A layer imports only from below BROKEN"),
        ("rules/pointwise.py", "import fxwidth.planning.planner", "A layer imports only from below BROKEN"),
        ("frontends/symbolic.py", "from fxwidth.rules import registry", "A layer imports only from below BROKEN"),
        ("new_room/__init__.py", "", "A layer imports only from below BROKEN"),
        ("axes/factors.py", "from fxwidth.axes import polynomials", "Nothing imports itself by a detour BROKEN"),
    ],
)
def test_a_planted_import_is_caught(copy: Path, file: str, line: str, contract: str) -> None:
    pytest.importorskip("importlinter")
    path = copy / "fxwidth" / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{path.read_text() if path.exists() else ''}\n{line}\n")
    done = checked(copy)
    assert done.returncode != 0
    assert contract in done.stdout + done.stderr or "new_room" in done.stdout + done.stderr


def test_every_package_is_installed() -> None:
    listed = (ROOT / "setup.cfg").read_text(encoding="utf-8").split("packages =\n")[1].split("package_dir")[0].split()
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "fxwidth").glob("**/__init__.py")}
    assert set(listed) == found | {"fxwidth.passes"}


def test_every_package_says_what_it_is_for() -> None:
    for path in (ROOT / "fxwidth").glob("*/__init__.py"):
        charter = path.read_text(encoding="utf-8").split('"""')[1]
        assert 20 < len(charter.split("\n")[0]) <= 117, path
