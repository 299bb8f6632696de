"""Docstrings and signatures as the site reads them: examples are code, and keywords those that `help` shows."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from operator import attrgetter
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^(\s*)Example:$", re.MULTILINE)
_OPTIONS = re.compile(r"^\s+options: ", re.MULTILINE)


class AsUsersSeeIt(griffe.Extension):
    """Gives the section of examples the name that the Google style knows, and options the names that they have."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """See a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = _EXAMPLE.sub(r"\1Examples:", obj.docstring.value)

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """See a function; one that unpacks a `TypedDict` has a signature of its own when it runs.

        Where the docstring tells of the options as a whole, that is left.
        """
        if func.docstring is None or _OPTIONS.search(func.docstring.value):
            return
        if not any("Unpack" in str(parameter.annotation) for parameter in func.parameters):
            return
        within = func.path.removeprefix(f"{func.module.path}.")
        found = attrgetter(within)(import_module(func.module.path))
        parameters = inspect.signature(found).parameters.values()
        func.parameters = griffe.Parameters(*map(_as_read, parameters))


def _as_read(parameter: inspect.Parameter) -> griffe.Parameter:
    is_given = parameter.default is not inspect.Parameter.empty
    is_told = parameter.annotation is not inspect.Parameter.empty
    return griffe.Parameter(
        parameter.name,
        annotation=str(parameter.annotation) if is_told else None,
        kind=griffe.ParameterKind[parameter.kind.name.lower()],
        default=repr(parameter.default) if is_given else None,
    )
