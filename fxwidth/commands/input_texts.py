"""Inputs and budgets as text: `1x3x224x224`, `input_ids=1x16:int64`, `0.5`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fxwidth.commands.faults import InputError, did_you_mean

_FORM = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<sizes>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")
_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64")
# Sizes as Python, or other habits, write them.
_SEPARATED = re.compile(r"[\[(]?\s*\d+(?:\s*[,;*X×]\s*\d+)*\s*,?\s*[\])]?")
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
        if match is None or not isinstance(dtype, torch.dtype) or not all(map(int, match["sizes"].split("x"))):
            raise InputError(f"--input {text}: {_fault(text, match)}")
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


def as_typed(shape: Sequence[int], dtype: Any) -> str:
    """Return the text that describes an input.

    Example:
        >>> as_typed((1, 16), torch.int64)
        '1x16:int64'
    """
    sizes, name = "x".join(map(str, shape)), str(dtype).removeprefix("torch.")
    return sizes if name == "float32" else f"{sizes}:{name}"


def _fault(text: str, match: re.Match[str] | None) -> str:
    """Return what is amiss with the text of an input, and what to type."""
    form = f"an input is a shape of sizes from one, batch first, {_FORMS}."
    if match is not None and not all(map(int, match["sizes"].split("x"))):
        return f"a size is 0; {form}"
    if match is not None:
        return f"torch has no dtype {match['dtype']!r}{did_you_mean(match['dtype'], _DTYPES)}"
    name, equals, sizes = text.rpartition("=")
    meant = "x".join(re.findall(r"\d+", sizes))
    if meant and _SEPARATED.fullmatch(sizes):
        return f"sizes are joined by x: type --input {name}{equals}{meant}. In all, {form}"
    odd = next((part for part in sizes.split(":")[0].split("x") if not part.isdigit()), None)
    return f"{odd!r} is no size; {form}" if odd else form


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
