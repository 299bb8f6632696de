"""What the coverage sweeps compare: the tensors in a model's answer, in which precision, and how far apart they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks.coverage_cases import Call
from fxwidth.verification.replay_oracle import largest_difference

# In float64 an index map that is wrong anywhere stands far above rounding; the giants are run in float32.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3}


def cast(call: Call, dtype: torch.dtype) -> Call:
    """Return a call with its floating-point tensors in a precision."""

    def converted(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return Call(pytree.tree_map(converted, call.args), pytree.tree_map(converted, call.kwargs))


def runs_in_float64(model: nn.Module, call: Call) -> bool:
    """Tell whether a model makes no float32 tensors of its own; it is left in float64."""
    wide = cast(call, torch.float64)
    try:
        with torch.no_grad():
            model.double()(*wide.args, **wide.kwargs)
    except RuntimeError:
        return False
    return True


def leaves_of(output: Any) -> list[Tensor]:
    """Return the tensors of a model's output, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [leaf for value in output.values() for leaf in leaves_of(value)]
    if isinstance(output, (list, tuple)):
        return [leaf for value in output for leaf in leaves_of(value)]
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def of_the_signal(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference relative to what of an output depends on the input: a bias must hide nothing."""
    if [t.shape for t in actual] != [t.shape for t in expected]:
        return float("inf")
    pairs = zip(actual, expected, strict=True)
    return max((largest_difference([own], [other]) * _size_per_signal(other) for own, other in pairs), default=0.0)


def rounding_of(expected: list[Tensor], dtype: torch.dtype) -> float:
    """Return what rounding makes of an output at most, relative to what of it depends on the input."""
    return 100 * torch.finfo(dtype).eps * max(map(_size_per_signal, expected), default=1.0)


def _size_per_signal(output: Tensor) -> float:
    if not output.is_floating_point() or output.dim() == 0 or output.shape[0] < 2 or not output.isfinite().all():
        return 1.0
    signal = (output - output.mean(0, keepdim=True)).abs().max().item()
    return output.abs().max().item() / signal if signal else 1.0


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    """Return the largest difference of two outputs relative to their size; infinity where they are of other forms."""
    return largest_difference(one, other) if len(one) == len(other) else float("inf")
