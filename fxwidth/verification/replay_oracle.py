"""The replay oracle: the recorded tape run on real numbers, removed channels once zeroed and once cut out.

The two runs share nothing but the axes: the first keeps every size and literal and puts zeros where channels are
removed, the second runs the prescribed ops on sliced parameters. Wrong couplings, maps or literals set them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxwidth.analysis.replay import ResizedReplay, ZeroedReplay
from fxwidth.analysis.result import Analysis
from fxwidth.axes.index_maps import IndexMaps


def replay_difference(
    analysis: Analysis, maps: IndexMaps, inputs: Sequence[Any], dtype: torch.dtype | None = torch.float64
) -> float:
    """Return the largest difference of any model output between the zeroed and the resized run, relative to its size.

    Args:
        analysis: the recorded graph; its module's parameters are the real ones.
        maps: which channels are kept; only removals can be replayed.
        inputs: one real value per placeholder, of the recorded shapes.
        dtype: the precision all floating-point numbers are computed in; None for that of the model.

    Raises:
        FxwidthError: an op does not run, or its result has not the prescribed shape; the message names op and node.
    """
    expected = reference_outputs(analysis, maps, inputs, dtype)
    return largest_difference(resized_outputs(analysis, maps, inputs, dtype), expected)


def reference_outputs(
    analysis: Analysis, maps: IndexMaps, inputs: Sequence[Any], dtype: torch.dtype | None = torch.float64
) -> list[Tensor]:
    """Return the model's outputs at its old sizes with the removed channels zeroed wherever they occur.

    Raises:
        FxwidthError: an op does not run; the message names op and node.
    """
    return ZeroedReplay(analysis, maps, dtype).run(inputs)


def resized_outputs(
    analysis: Analysis, maps: IndexMaps, inputs: Sequence[Any], dtype: torch.dtype | None = torch.float64
) -> list[Tensor]:
    """Return the outputs of the prescribed ops on sliced parameters.

    Raises:
        FxwidthError: an op does not run, or its result has not the prescribed shape; the message names op and node.
    """
    return ResizedReplay(analysis, maps, dtype).run(inputs)


def largest_difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest absolute difference of two lists of tensors, each pair relative to its largest entry."""
    return max((_difference(one, other) for one, other in zip(actual, expected, strict=True)), default=0.0)


def _difference(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    wide = torch.complex128 if actual.is_complex() else torch.float64
    actual, expected = actual.detach().to(wide), expected.detach().to(wide)
    # Equal infinities are no difference; a NaN always is one.
    gap = torch.where(actual == expected, 0.0, (actual - expected).abs()).nan_to_num(nan=float("inf")).max().item()
    finite = expected[expected.isfinite()].abs()
    return gap / max(finite.max().item() if finite.numel() else 0.0, 1e-12)
