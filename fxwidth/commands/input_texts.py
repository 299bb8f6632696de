"""Inputs and budgets as text: `1x3x224x224`, `input_ids=1x16:int64`, `0.5`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fxwidth.commands.faults import InputError

_FORM = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<sizes>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")
_FORMS = "such as 1x3x224x224, 1x16:int64 or input_ids=1x16:int64"
_NUMBER = "a whole number for a count, such as 1000000, or one with a point for a part of the present cost, such as 0.5"


def example_inputs(texts: Sequence[str], *, on_meta: bool) -> Any:
    """Return the inputs that texts describe: a tuple, or a dict where they have names.

    Args:
        texts: a shape each, with a name before and a dtype behind where that matters.
        on_meta: whether shapes are all that is needed; otherwise numbers are drawn, and integers are zero.

    Raises:
        InputError: a text is in another form, or only some inputs have names.
    """
    import torch

    found: list[tuple[str | None, Any]] = []
    for text in texts:
        match = _FORM.fullmatch(text)
        dtype = getattr(torch, match["dtype"] or "float32", None) if match else None
        if match is None or not isinstance(dtype, torch.dtype) or "0" in match["sizes"].split("x"):
            raise InputError(f"--input {text}: an input is a shape of sizes from one, {_FORMS}.")
        shape = [int(size) for size in match["sizes"].split("x")]
        if on_meta:
            value = torch.empty(shape, dtype=dtype, device="meta")
        else:
            value = torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
        found.append((match["name"], value))
    names = [name for name, _ in found if name is not None]
    if names and (len(names) < len(found) or len(set(names)) < len(names)):
        raise InputError(f"--input {' --input '.join(texts)}: give every input a name of its own, or none.")
    return dict(found) if names else tuple(value for _, value in found)


def bound(option: str, text: str | None) -> int | float | None:
    """Return what a bound of a budget says: an int is a count, a float a ratio.

    Raises:
        InputError: it is no number.
    """
    return None if text is None else number(option, text, f"a bound is {_NUMBER}")


def number(option: str, text: str, form: str) -> int | float:
    """Return the number that a text is, a whole one as an int.

    Args:
        option: what it was typed for.
        text: what was typed.
        form: what it should be, for the error.

    Raises:
        InputError: it is none.
    """
    for kind in (int, float):
        try:
            found: int | float = kind(text)
        except ValueError:
            continue
        # 1e6 is a count that was written as a float.
        return int(found) if "e" in text.lower() and found == int(found) >= 1 else found
    raise InputError(f"{option} {text}: {form}.")
