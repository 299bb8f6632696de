"""Parameters and buffers that are several objects on one memory: a resize would part them, and training with them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fxwidth.analysis.result import Analysis
from fxwidth.errors import FxwidthError


def refuse_shared_memory(analysis: Analysis, changed: Iterable[str]) -> None:
    """Check that no tensor that a resize replaces or writes has its entries in common with another one.

    Raises:
        FxwidthError: one has; parts of one buffer that do not overlap may be resized.
    """
    by_storage: dict[int, list[str]] = {}
    for name, entry in analysis.parameters.items():
        if entry.tensor.layout is torch.strided and not entry.tensor.is_meta and entry.tensor.numel():
            by_storage.setdefault(entry.tensor.untyped_storage()._cdata, []).append(name)
    of = {name: names for names in by_storage.values() if len(names) > 1 for name in names}
    for name in changed:
        for other in of.get(name, ()):
            if other != name and _overlap(analysis.parameters[name].tensor, analysis.parameters[other].tensor):
                raise FxwidthError(
                    f"{name} and {other} are two tensors in one memory, and a resize would give {name} a memory of "
                    f"its own. Make them one object before the model is traced, as in a.weight = b.weight, or keep "
                    "their groups with keep=."
                )


def _overlap(one: Tensor, other: Tensor) -> bool:
    if not (one.is_contiguous() and other.is_contiguous()):
        # Parts that are interleaved, as the columns of a matrix, have nothing in common for all that.
        return int(one.storage_offset()) == int(other.storage_offset())
    return _first_byte(one) < _end(other) and _first_byte(other) < _end(one)


def _first_byte(tensor: Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.element_size()


def _end(tensor: Tensor) -> int:
    return _first_byte(tensor) + tensor.numel() * tensor.element_size()
