"""Values in JSON: numbers, texts, containers, dtypes and devices; tensors go beside, by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxwidth.errors import FxwidthError

_SIMPLE: Mapping[str, Callable[[Any], Any]] = {
    "float": {str(one): one for one in (math.nan, math.inf, -math.inf)}.__getitem__,
    "complex": lambda content: complex(*map(decoded, content)),
    "dtype": {str(one): one for one in vars(torch).values() if isinstance(one, torch.dtype)}.__getitem__,
    "device": torch.device,
    "layout": {
        str(one): one for one in vars(torch).values() if isinstance(one, (torch.memory_format, torch.layout))
    }.__getitem__,
}

Leaf = Callable[[Any, str], Any]
"""What stands for a value of another kind: a function of the value and its place."""


def encoded(value: Any, place: str, leaf: Leaf | None = None) -> Any:
    """Return a value as JSON can hold it: numbers to the bit, tuples and the keys of dicts as what they are.

    Args:
        value: what to write.
        place: where it is, for the error.
        leaf: what to write for values of other kinds, tensors among them; by default they are refused.

    Raises:
        FxwidthError: a part of it is of no such kind.
    """
    # Those of numpy come from schedules of learning rates, and are none of Python's.
    value = value.item() if isinstance(value, (np.number, np.bool_)) else value
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if kind is complex:
        return {"complex": [encoded(value.real, place), encoded(value.imag, place)]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, (torch.memory_format, torch.layout)):
        return {"layout": str(value)}
    if kind is slice:
        return {"slice": [encoded(part, place, leaf) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, list):
        return [encoded(part, f"{place}[{i}]", leaf) for i, part in enumerate(value)]
    # Named tuples are of kinds that a file does not name.
    if kind is tuple or isinstance(value, torch.Size):
        return {"tuple": [encoded(part, f"{place}[{i}]", leaf) for i, part in enumerate(value)]}
    if isinstance(value, Mapping):
        pairs = [[encoded(key, place, leaf), encoded(part, f"{place}[{key!r}]", leaf)] for key, part in value.items()]
        return {"dict": pairs}
    if leaf is not None:
        return leaf(value, place)
    raise FxwidthError(
        f"{place} is a {kind.__module__}.{kind.__qualname__}, which a file of plain data does not hold; make it "
        "numbers, texts, tensors, or lists, tuples and dicts of them."
    )


def decoded(data: Any, leaf: Callable[[str, Any], Any] | None = None) -> Any:
    """Return the value that `encoded` has been given.

    Args:
        data: what it returned.
        leaf: what a value of another kind is, by the name and the content that stand for it.

    Raises:
        ValueError: it is no such data.
    """
    if isinstance(data, list):
        return [decoded(part, leaf) for part in data]
    if not isinstance(data, dict):
        return data
    if len(data) != 1:
        raise ValueError(f"{sorted(data)[:3]} stand for no value")
    ((kind, content),) = data.items()
    if kind in _SIMPLE:
        return _SIMPLE[kind](content)
    if kind == "slice":
        return slice(*decoded(content, leaf))
    if kind == "tuple":
        return tuple(decoded(content, leaf))
    if kind == "dict":
        return {decoded(key, leaf): decoded(part, leaf) for key, part in content}
    if leaf is None:
        raise ValueError(f"{kind!r} is no kind of value")
    return leaf(kind, content)


class TensorsBeside:
    """Tensors that are written beside a tree, by numbered names, each object once.

    Args:
        prefix: with which their names begin.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._names: dict[int, str] = {}
        self.tensors: dict[str, Tensor] = {}

    def leaf(self, value: Any, place: str) -> Any:
        """Return what stands for a tensor.

        Raises:
            FxwidthError: it is something else.
        """
        if not isinstance(value, Tensor):
            return encoded(value, place)
        if id(value) not in self._names:
            self._names[id(value)] = f"{self._prefix}{len(self._names)}"
            self.tensors[self._names[id(value)]] = value
        return {"tensor": self._names[id(value)]}
