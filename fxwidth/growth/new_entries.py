"""Filling the new slots of parameters and buffers as the recipes of the growing groups say."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from fxwidth.analysis.result import Analysis
from fxwidth.axes.factor_space import FactorSpace
from fxwidth.axes.factors import Axis, Factor
from fxwidth.axes.index_maps import NEW, IndexMaps, Indices
from fxwidth.growth.directions import Direction, new_rows
from fxwidth.growth.recipes import Fill, Growth
from fxwidth.runtime.finiteness import accumulation_dtype


@dataclass(frozen=True)
class _Coordinates:
    """What each new position of a dim is made of, seen from one factor.

    Attributes:
        others: a number for the position's coordinates in everything but the factor.
        channels: its coordinate in the factor, in the new numbering; -1 where the factor does not occur.
        new: whether the position is new because of the factor.
    """

    others: Indices
    channels: Indices
    new: Indices


@dataclass(frozen=True)
class _Filling:
    """One growing factor in one dim of a tensor, and what to put there."""

    fill: Fill
    dim: int
    factor: Factor
    at: _Coordinates
    growth: Growth


def new_entries(
    analysis: Analysis,
    growths: Mapping[Factor, Growth],
    maps: IndexMaps,
    name: str,
    gathered: Tensor,
    directions: Direction = "orthogonal",
) -> Tensor:
    """Return a parameter or buffer with its new slots filled.

    Args:
        analysis: the analysis at the old sizes.
        growths: what growing does, by the groups that grow.
        maps: the new indices of each resized group.
        name: the parameter or buffer.
        gathered: the tensor at its new shape: old entries in place, zeros in the new slots.
        directions: the method by which new channels are made where they may be anything.

    Raises:
        FxwidthError: what the method gives cannot be used.
    """
    fillings = list(_fillings(analysis, growths, maps, name))
    if not fillings or gathered.is_meta:
        return gathered
    result = gathered.detach().clone()
    # Means come after what is put beside the old entries, zeros after all: that keeps every group's promise where
    # the new slots of two groups cross.
    for kind in (Fill.DIRECTIONS, Fill.ONE, Fill.WEIGHTED, Fill.MEAN, Fill.ZERO):
        for filling in fillings:
            if filling.fill is not kind:
                continue
            if kind is Fill.DIRECTIONS:
                _fill_directions(result, filling, _old_positions(analysis, maps, name), name, directions)
            elif kind in (Fill.MEAN, Fill.WEIGHTED):
                _fill_means(result, filling, _scale(analysis, maps, name, filling))
            else:
                places = torch.from_numpy(np.flatnonzero(filling.at.new)).to(result.device)
                result.index_fill_(filling.dim, places, 1 if kind is Fill.ONE else 0)
    return result


def _fillings(analysis: Analysis, growths: Mapping[Factor, Growth], maps: IndexMaps, name: str) -> Iterator[_Filling]:
    space = analysis.space
    for dim, axis in enumerate(analysis.parameters[name].axes):
        for factor in maps.changed_factors(axis):
            if (maps.of(factor) == NEW).any():
                fill = growths[factor].fills.get((name, dim), Fill.ZERO)
                yield _Filling(fill, dim, factor, _coordinates(space, maps, axis, factor), growths[factor])


def _old_positions(analysis: Analysis, maps: IndexMaps, name: str) -> list[Indices]:
    """Return the positions of each dim that are not new."""
    return [np.flatnonzero(maps.indices(axis) != NEW) for axis in analysis.parameters[name].axes]


# -- positions -----------------------------------------------------------------------------------------------------


def _coordinates(space: FactorSpace, maps: IndexMaps, axis: Axis, factor: Factor) -> _Coordinates:
    """Take the new positions of an axis apart."""
    return _axis_coordinates(space.normalise(axis), maps, factor)


def _axis_coordinates(axis: Axis, maps: IndexMaps, factor: Factor) -> _Coordinates:
    terms, offset = [], 0
    for term in axis:
        at = _Coordinates(np.zeros(1, np.int64), np.full(1, -1), np.zeros(1, bool))
        for element in term:
            at = _product(at, _element_coordinates(element, maps, factor))
        terms.append(_Coordinates(at.others + offset, at.channels, at.new))
        offset += int(at.others.max(initial=-1)) + 1
    return _Coordinates(*(np.concatenate(parts) for parts in zip(*map(_parts, terms), strict=True)))


def _parts(at: _Coordinates) -> tuple[Indices, Indices, Indices]:
    return at.others, at.channels, at.new


def _element_coordinates(element: int | Factor | Axis, maps: IndexMaps, factor: Factor) -> _Coordinates:
    if isinstance(element, tuple):
        return _axis_coordinates(element, maps, factor)
    if element is factor:
        kept = maps.of(factor)
        return _Coordinates(np.zeros(len(kept), np.int64), np.arange(len(kept)), kept == NEW)
    size = element if isinstance(element, int) else len(maps.of(element))
    return _Coordinates(np.arange(size), np.full(size, -1), np.zeros(size, bool))


def _product(major: _Coordinates, minor: _Coordinates) -> _Coordinates:
    span = int(minor.others.max(initial=-1)) + 1
    others = major.others[:, None] * span + minor.others[None, :]
    # Where the factor is multiplied with itself, the minor one stands for both.
    channels = np.where(minor.channels[None, :] >= 0, minor.channels[None, :], major.channels[:, None])
    new = major.new[:, None] | minor.new[None, :]
    return _Coordinates(others.reshape(-1), channels.reshape(-1), new.reshape(-1))


# -- means ---------------------------------------------------------------------------------------------------------


def _scale(analysis: Analysis, maps: IndexMaps, name: str, filling: _Filling) -> Tensor | None:
    """Return what weights the mean: one number per new channel of the factor, zero for those without an old one."""
    if filling.fill is not Fill.WEIGHTED:
        return None
    entry = analysis.parameters[filling.growth.weights[name, filling.dim]]
    kept = maps.of(filling.factor)
    scale = entry.tensor.detach().reshape(-1)
    weights = scale[torch.from_numpy(np.maximum(kept, 0)).to(scale.device)]
    return weights * torch.from_numpy(kept != NEW).to(scale.device)


def _fill_means(tensor: Tensor, filling: _Filling, scale: Tensor | None) -> None:
    """Put the mean over the old channels in the new slots, in place, each at its own other coordinates."""
    at, device = filling.at, tensor.device
    old = np.flatnonzero(~at.new & (at.channels >= 0))
    sources = torch.from_numpy(old).to(device)
    groups = torch.from_numpy(at.others).to(device)
    wide = torch.float32 if device.type == "mps" else torch.float64
    rows = tensor.movedim(filling.dim, 0)
    values = rows[sources].to(wide)
    if scale is not None:
        weights = scale.to(device, wide)[torch.from_numpy(at.channels[old]).to(device)]
        values = values * weights.reshape(-1, *[1] * (values.dim() - 1))
    count = int(at.others.max(initial=-1)) + 1
    sums = values.new_zeros(count, *values.shape[1:]).index_add_(0, groups[sources], values)
    counts = values.new_zeros(count).index_add_(0, groups[sources], values.new_ones(len(old)))
    places = torch.from_numpy(np.flatnonzero(at.new)).to(device)
    means = sums / counts.clamp_min(1).reshape(-1, *[1] * (values.dim() - 1))
    rows[places] = means[groups[places]].to(tensor.dtype)


# -- directions ----------------------------------------------------------------------------------------------------


def _fill_directions(tensor: Tensor, filling: _Filling, old: list[Indices], name: str, directions: Direction) -> None:
    """Put new directions in the new slots, in place.

    Rows are the positions of the dim, columns everything else. Columns that are new themselves stay zero.
    """
    dim, device = filling.dim, tensor.device
    places = [torch.from_numpy(positions).to(device) for positions in old]
    places.pop(dim)
    rows = tensor.movedim(dim, 0)
    block = rows
    for other, positions in enumerate(places, start=1):
        block = block.index_select(other, positions)
    present = torch.from_numpy(np.intersect1d(old[dim], np.flatnonzero(filling.at.channels >= 0))).to(device)
    fresh = torch.from_numpy(np.flatnonzero(filling.at.new)).to(device)
    precision = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    known = block[present].reshape(len(present), prod(block.shape[1:])).to(accumulation_dtype(tensor))
    # Squares of entries may be beyond the range of their dtype: lengths are taken in units of the largest.
    unit = known.abs().amax() if known.numel() else known.new_zeros(())
    unit = torch.where(unit > 0, unit, torch.ones_like(unit))
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}:{dim}:{len(present)}".encode()))
    made = new_rows(directions, (known / unit).to(precision), len(fresh), generator).to(known.dtype) * unit
    grid = torch.meshgrid(fresh, *places, indexing="ij")
    rows[grid] = _bounded(made, tensor.dtype).reshape(grid[0].shape).to(tensor.dtype)


def _bounded(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows no longer than the root of the largest number of a dtype: their products with inputs as long fit."""
    longest = torch.finfo(dtype).max ** 0.5
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    bounded: Tensor = rows * (longest / lengths.clamp_min(longest))
    return bounded
