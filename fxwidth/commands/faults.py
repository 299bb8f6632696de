"""What a user sees of faults: one message without a traceback, and an exit status that tells of what kind it is."""

from __future__ import annotations

import difflib
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec

import typer

from fxwidth.errors import FxwidthError

FAILED, WRONG_INPUT = 1, 2
STATUSES = (
    f"Exit status: 0 when done, {FAILED} for a model or a budget that cannot be worked with, {WRONG_INPUT} for wrong "
    "input, such as an unknown model or a missing file, 130 after Ctrl-C."
)
# What messages of the package say to call, and what is typed for it.
AS_TYPED = {
    "print(fxwidth.analyze(gm)) lists": "fxwidth inspect lists",
    "print(width_graph) lists": "fxwidth inspect lists",
    "Pass trusted=True": "Pass --trusted",
    "pass trusted=True": "pass --trusted",
}
_Arguments = ParamSpec("_Arguments")


class InputError(FxwidthError):
    """What was typed names something that is not there, or is in no form that is known."""


def telling(function: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """Return a command that tells of faults, warnings and, off a terminal, progress in lines on standard error."""

    @wraps(function)
    def told(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        try:
            with _plain_warnings(), _progress_in_lines():
                function(*args, **kwargs)
        except FxwidthError as error:
            told = str(error)
            for called, typed in AS_TYPED.items():
                told = told.replace(called, typed)
            typer.echo(f"Error: {told}", err=True)
            raise typer.Exit(WRONG_INPUT if isinstance(error, InputError) else FAILED) from error

    return told


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show warnings without the line of code that led to them, which is one of ours."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"Warning: {message}", file=sys.stderr)  # noqa: T201
        yield


@contextmanager
def _progress_in_lines() -> Iterator[None]:
    """Write to standard error what is logged of how far long work has come; where a bar shows it nothing is logged."""
    logger = logging.getLogger("fxwidth.work_progress")
    handler, level = logging.StreamHandler(), logger.level
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question that proposes the nearest of some names, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {', '.join(near)}?" if near else "."


@contextmanager
def needing(package: str, install: str | None = None) -> Iterator[None]:
    """Import in here what a package holds.

    Args:
        package: its name in Python.
        install: what pip calls it, where that differs.

    Raises:
        InputError: it is not installed; the message has the line that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise InputError(f"this needs {package}, which is not installed: pip install {install or package}") from error
