"""Labels that are given with inputs, as a loader or a data set gives them, to a model that takes inputs alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fxwidth.runtime.pytrees import deep_tensors


def labels_told(model: str, names: Sequence[str], given: Sequence[Any]) -> str | None:
    """Return what to tell of positional inputs of which the last are labels; None where they are no more than taken.

    Args:
        model: what takes them.
        names: those of the arguments that it takes.
        given: the positional inputs.
    """
    count = len(names)
    if not 0 < count < len(given) or not all(_looks_like_labels(one, given[0]) for one in given[count:]):
        return None
    takes = "1 argument" if count == 1 else f"{count} arguments"
    last = f"the second, {_shown(given[1])}," if len(given) == 2 else f"the last, {_shown(given[-1])},"
    first = "images" if deep_tensors([given[0]])[0].dim() == 4 else "inputs"
    what = f"{'a pair' if len(given) == 2 else len(given)}, of which {last} looks like labels"
    remedy = f"the {first} alone, example_inputs={first}" if count == 1 else f"the first {count} alone"
    return f"{model} takes {takes} ({', '.join(names)}), but example_inputs is {what}: pass {remedy}."


def labels_in_list(values: Sequence[Any]) -> str | None:
    """Return what to tell where the one input is a list of inputs and labels, as a loader gives it; else None."""
    pair = values[0] if len(values) == 1 else None
    if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not _looks_like_labels(pair[1], pair[0]):
        return None
    return (
        f"example_inputs is a list, which is one argument, and its second entry, {_shown(pair[1])}, looks like labels: "
        "pass the inputs alone, example_inputs=batch[0]."
    )


def _looks_like_labels(value: Any, inputs: Any) -> bool:
    """Tell whether a value is one number or name, or has fewer numbers for each sample than the inputs beside it."""
    tensors = deep_tensors([inputs])
    if not tensors:
        return False
    if isinstance(value, (int, str)):
        return True
    if isinstance(value, (list, tuple)):
        return len(value) == tensors[0].shape[:1].numel() and all(isinstance(one, (int, str)) for one in value)
    if not isinstance(value, Tensor):
        return False
    return value.dim() == 0 or (value.dim() < tensors[0].dim() and value.shape[0] == tensors[0].shape[0])


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return f"a list of {len(value)}" if isinstance(value, (list, tuple)) else repr(value)
