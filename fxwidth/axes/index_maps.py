"""From the indices kept of each factor to those kept of whole dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fxwidth.axes.factor_space import FactorSpace
from fxwidth.axes.factors import Axis, Factor, axis_size, element_size, term_size
from fxwidth.axes.unification import split

Indices = npt.NDArray[np.int64]

NEW = -1


class IndexMaps:
    """New sizes and index maps of every axis, given the old index of each new position of the resized factors.

    A new position without an old one is `NEW`. Factors that are not mentioned keep their size.
    """

    def __init__(
        self,
        space: FactorSpace,
        kept: Mapping[Factor, Indices],
        *,
        variance_ratios: Mapping[int, float] | None = None,
        tables: Mapping[int, list[int]] | None = None,
        batch_growth: int = 0,
        keeps_eps: bool = False,
    ) -> None:
        self._space = space
        self._kept = dict(kept)
        self._variance_ratios = dict(variance_ratios or {})
        self._tables = dict(tables or {})
        self._batch_growth = batch_growth
        self._keeps_eps = keeps_eps
        self._found: dict[Axis, Indices] = {}

    @property
    def space(self) -> FactorSpace:
        """The space of the factors."""
        return self._space

    def with_variance_ratios(self, ratios: Mapping[int, float]) -> IndexMaps:
        """Return the same maps with what becomes of the variance that each norm sees, by the index of its call."""
        return self._changed(variance_ratios=ratios)

    def with_tables(self, tables: Mapping[int, list[int]]) -> IndexMaps:
        """Return the same maps with what the new channels of copies read, by the index of the call."""
        return self._changed(tables=tables)

    def with_same_eps(self) -> IndexMaps:
        """Return the same maps, by which norms keep their eps whatever becomes of the variance that they see."""
        return self._changed(keeps_eps=True)

    def with_larger_batch(self) -> IndexMaps:
        """Return the same maps for a batch that is larger by one."""
        return self._changed(batch_growth=1)

    def _changed(self, **changed: Any) -> IndexMaps:
        own = {"variance_ratios": self._variance_ratios, "tables": self._tables, "keeps_eps": self._keeps_eps}
        return IndexMaps(self._space, self._kept, **{**own, **changed})

    def variance_ratio(self, call_index: int) -> float:
        """Return the variance (or mean square) that a norm sees after the resize, relative to before."""
        return self._variance_ratios.get(call_index, 1.0)

    def eps_ratio(self, call_index: int) -> float:
        """Return by what the eps of a norm is multiplied."""
        return 1.0 if self._keeps_eps else self.variance_ratio(call_index)

    def table(self, call_index: int) -> list[int] | None:
        """Return what the new channels of copies read, where that is known; else the maps of both sides tell."""
        return self._tables.get(call_index)

    def tells_variance(self, call_index: int) -> bool:
        """Tell whether it is known what becomes of the variance that a norm sees, if only that it stays."""
        return call_index in self._variance_ratios

    def size(self, axis: Axis) -> int:
        """Return the new length of a dimension."""
        return self._size(self._space.normalise(axis))

    def prefix(self, axis: Axis, position: int) -> int:
        """Return where an old position of a dimension lies in the new one (a factor is never cut by an old bound)."""
        left, _ = split(self._space, axis, position)
        return self._size(left)

    def indices(self, axis: Axis) -> Indices:
        """Return, for each new position of a dimension, its old position or `NEW`."""
        axis = self._space.normalise(axis)
        if axis not in self._found:
            self._found[axis] = self._indices(axis)
        return self._found[axis]

    def changes(self, axis: Axis) -> bool:
        """Tell whether a dimension is different after the resize, or in the larger batch that the maps are for."""
        grown = self._batch_growth != 0
        return any(factor in self._kept or (grown and factor.is_batch) for factor in self._space.factors(axis))

    def changed_factors(self, axis: Axis) -> list[Factor]:
        """Return the resized factors of an axis."""
        return [factor for factor in dict.fromkeys(self._space.factors(axis)) if factor in self._kept]

    def of(self, factor: Factor) -> Indices:
        """Return the index map of one factor."""
        kept = self._kept.get(factor)
        return np.arange(factor.size) if kept is None else kept

    def _size(self, axis: Axis) -> int:
        total = 0
        for term in axis:
            size = 1
            for element in term:
                if isinstance(element, Factor):
                    kept = self._kept.get(element)
                    size *= element.size + self._batch_growth * element.is_batch if kept is None else len(kept)
                else:
                    size *= element if isinstance(element, int) else self._size(element)
            total += size
        return total

    def _indices(self, axis: Axis) -> Indices:
        parts, offset = [], 0
        for term in axis:
            part: Indices = np.zeros(1, dtype=np.int64)
            for element in term:
                if isinstance(element, tuple):
                    inner = self._indices(element)
                else:
                    inner = np.arange(element) if isinstance(element, int) else self.of(element)
                outer_new = (part == NEW)[:, None] | (inner == NEW)[None, :]
                part = np.where(outer_new, NEW, part[:, None] * element_size(element) + inner[None, :]).reshape(-1)
            parts.append(np.where(part == NEW, NEW, part + offset))
            offset += term_size(term)
        assert offset == axis_size(axis)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
