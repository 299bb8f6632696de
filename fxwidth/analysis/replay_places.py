"""Which positions of a dim stay in a resize, and where they lie."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fxwidth.analysis.result import Analysis
from fxwidth.axes.factors import Axis, axis_size
from fxwidth.axes.index_maps import NEW, IndexMaps
from fxwidth.errors import FxwidthError
from fxwidth.recording.tape import Axes


class Places:
    """The kept and removed positions of axes, as index tensors."""

    def __init__(self, analysis: Analysis, maps: IndexMaps) -> None:
        self._space = analysis.space
        self._maps = maps
        self._known: dict[tuple[Axis, torch.device], tuple[Tensor, Tensor]] = {}

    def changed(self, axes: Axes) -> list[int]:
        """Return the dims that are resized."""
        return [dim for dim, axis in enumerate(axes) if self._maps.changes(axis)]

    def of(self, axis: Axis, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the kept and the removed positions of an axis.

        Raises:
            FxwidthError: the axis has new positions.
        """
        key = self._space.normalise(axis), device
        if key not in self._known:
            kept = self._maps.indices(axis)
            if (kept == NEW).any():
                raise FxwidthError("a replay compares removed channels; the plan adds some: replay without the growth.")
            removed = np.setdiff1d(np.arange(axis_size(key[0])), kept)
            self._known[key] = torch.from_numpy(kept).to(device), torch.from_numpy(removed).to(device)
        return self._known[key]

    def gather(self, tensor: Tensor, axes: Axes) -> Tensor:
        """Return a tensor without its removed positions."""
        for dim in self.changed(axes):
            tensor = tensor.index_select(dim, self.of(axes[dim], tensor.device)[0])
        return tensor

    def scatter(self, tensor: Tensor, axes: Axes) -> Tensor:
        """Return a tensor with zeros at its removed positions."""
        for dim in self.changed(axes):
            kept, removed = self.of(axes[dim], tensor.device)
            shape = [*tensor.shape[:dim], len(kept) + len(removed), *tensor.shape[dim + 1 :]]
            tensor = tensor.new_zeros(shape).index_copy(dim, kept, tensor)
        return tensor

    def erase(self, tensor: Tensor, axes: Axes) -> None:
        """Write zeros to the removed positions of a tensor."""
        for dim in self.changed(axes):
            tensor.index_fill_(dim, self.of(axes[dim], tensor.device)[1], 0)
