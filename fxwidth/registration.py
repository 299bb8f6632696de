"""What all tables of named functions have in common, ours and those of users in them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Any

from fxwidth.errors import FxwidthError


def refuse_name(table: Container[str], name: Any, decorator: str, *, identifier: bool = False) -> None:
    """Check that a name can be given to a function in a table.

    Args:
        table: the names that are taken.
        name: the new one.
        decorator: what registers the function.
        identifier: whether the name must be one.

    Raises:
        FxwidthError: it is no text, no identifier, or taken.
    """
    if not isinstance(name, str) or not name or (identifier and not name.isidentifier()):
        raise FxwidthError(f"{decorator}({name!r}): a name is {'an identifier' if identifier else 'a text'}.")
    if name in table:
        raise FxwidthError(f"{decorator}({name!r}): that name is taken; choose another.")


def refuse_unknown(table: Iterable[str], given: Any, option: str, form: str) -> None:
    """Check that an option is the name of a function in a table, or a function itself.

    Args:
        table: the names.
        given: what was given.
        option: its name.
        form: what a function takes and returns.

    Raises:
        FxwidthError: it is neither.
    """
    names = list(table)
    if not callable(given) and given not in names:
        raise FxwidthError(f"{option}={given!r} is none of {', '.join(map(repr, names))}, nor a function {form}.")


def name_of(given: str | Callable[..., Any]) -> str:
    """Return what a function of a table is called; for another that is its module and its name in there."""
    if isinstance(given, str):
        return given
    named = given if hasattr(given, "__qualname__") else type(given)
    return f"{named.__module__}.{named.__qualname__}"
