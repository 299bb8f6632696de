"""Ops over positions: pooling, resampling, sampling, patches, pixel shuffles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

from fxwidth.axes.factors import Axis
from fxwidth.axes.pins import KERNEL, POSITION, WINDOWS
from fxwidth.rules.registry import Rule, RuleContext, rule

_BY_RANK = {
    1: ("upsample_nearest1d", "_upsample_nearest_exact1d", "upsample_linear1d")
    + ("reflection_pad1d", "replication_pad1d"),
    2: ("max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d")
    + ("upsample_nearest2d", "_upsample_nearest_exact2d")
    + ("upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_bicubic2d", "_upsample_bicubic2d_aa")
    + ("reflection_pad2d", "replication_pad2d"),
    3: ("max_pool3d_with_indices", "avg_pool3d", "_adaptive_avg_pool3d", "adaptive_max_pool3d")
    + ("upsample_nearest3d", "_upsample_nearest_exact3d", "upsample_trilinear3d")
    + ("reflection_pad3d", "replication_pad3d"),
}


def _over_positions(rank: int) -> Rule:
    def judge(c: RuleContext) -> Sequence[Sequence[Axis]]:
        (signal,) = [c.axes(tensor) for tensor in c.call.inputs]
        c.pin(signal[-rank:], POSITION)
        return [[*signal[:-rank], *_positions(c, output.shape[-rank:])] for output in c.outputs]

    return judge


for _rank, _names in _BY_RANK.items():
    rule(*_names)(_over_positions(_rank))


@rule("grid_sampler_2d", "grid_sampler_3d")
def _grid_sampler(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal, grid = (c.axes(tensor) for tensor in c.call.inputs)
    c.pin([*signal[2:], *grid[1:]], POSITION)
    c.unify(signal[0], grid[0])
    return [[*signal[:2], *_positions(c, c.outputs[0].shape[2:])]]


@rule("pixel_shuffle")
def _pixel_shuffle(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal, factor = c.axes("self"), c["upscale_factor"]
    c.pin(signal[-2:], POSITION)
    channels = c.fresh(c.outputs[0].shape[-3])
    c.unify(signal[-3], ((channels, factor, factor),))
    return [[*signal[:-3], c.space.normalise(channels), *_positions(c, c.outputs[0].shape[-2:])]]


@rule("pixel_unshuffle")
def _pixel_unshuffle(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal, factor = c.axes("self"), c["downscale_factor"]
    c.pin(signal[-2:], POSITION)
    channels = c.space.product(signal[-3], c.fixed(factor), c.fixed(factor))
    return [[*signal[:-3], channels, *_positions(c, c.outputs[0].shape[-2:])]]


@rule("im2col")
def _im2col(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal = c.axes("self")
    c.pin(signal[-2:], POSITION)
    patches = c.space.product(signal[-3], c.fixed(prod(c["kernel_size"]), KERNEL))
    return [[*signal[:-3], patches, *_positions(c, c.outputs[0].shape[-1:])]]


@rule("col2im")
def _col2im(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal = c.axes("self")
    c.pin(signal[-1:], POSITION)
    channels = c.fresh(c.outputs[0].shape[-3])
    c.unify(signal[-2], ((channels, prod(c["kernel_size"])),))
    return [[*signal[:-2], c.space.normalise(channels), *_positions(c, c.outputs[0].shape[-2:])]]


@rule("unfold")
def _unfold(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal = c.axes("self")
    dim = c.dim(c["dimension"], len(signal))
    c.pin([signal[dim]], WINDOWS)
    signal[dim] = c.fixed(c.outputs[0].shape[dim], WINDOWS)
    return [[*signal, c.fixed(c["size"], KERNEL)]]


def _positions(c: RuleContext, sizes: Iterable[int]) -> list[Axis]:
    return [c.fixed(size, POSITION) for size in sizes]
