"""The command starts without torch, and lists all that there is."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer
from typer.main import get_command

from fxwidth.commands import app as application
from fxwidth.training import command

HEAVY = ("torch", "numpy", "networkx", "rich.table", "transformers", "fxwidth.public")


def imported_by(*arguments: str) -> set[str]:
    """Return which modules a call of the command has imported in a process of its own."""
    code = (
        "import sys\n"
        f"sys.argv = ['fxwidth', *{list(arguments)!r}]\n"
        "from fxwidth import cli\n"
        "try:\n    cli.main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "print('\\n'.join(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "--help"], ["evolve", "--help"], ["--version"]])
def test_help_imports_no_torch(arguments: list[str]) -> None:
    assert not imported_by(*arguments).intersection(HEAVY[:3] + HEAVY[4:])


def test_importing_the_package_imports_no_torch_until_a_name_is_used() -> None:
    code = (
        "import sys, fxwidth\n"
        "assert 'plan' in dir(fxwidth) and 'torch' not in sys.modules\n"
        "assert not hasattr(fxwidth, 'no_such_name') and not hasattr(fxwidth, '_private')\n"
        "assert 'torch' not in sys.modules\n"
        "fxwidth.rules.registry\n"
        "from fxwidth import Budget, Evolver\n"
        "assert 'torch' in sys.modules and vars(fxwidth)['Budget'] is Budget"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_those_of_the_module_that_has_them() -> None:
    import fxwidth
    from fxwidth import public

    assert public.__all__ == fxwidth.__all__
    assert all(getattr(fxwidth, name) is getattr(public, name) for name in fxwidth.__all__)


def test_what_is_listed_of_a_late_command_is_what_it_says_itself() -> None:
    listed = get_command(application.app).get_command(typer.Context(get_command(application.app)), "train")
    assert listed.help == command.train.__doc__
