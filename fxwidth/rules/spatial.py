"""Ops over positions: pooling, resampling, sampling, patches, pixel shuffles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod

import torch

from fxwidth.axes.factors import Axis
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.axes.pins import KERNEL, POSITION, WINDOWS
from fxwidth.recording.tape import OpCall
from fxwidth.rules.op_families import Move, Movement, Positions
from fxwidth.rules.registry import ResizedCall, Rule, RuleContext, literal_rule, revised, rule

aten = torch.ops.aten

_MEANS = Positions(linear=True, within=True)
_SUMS = Positions(linear=True)
_MAXIMA = Positions(linear=False)
_BY_RANK = {
    1: (
        (_SUMS, aten.upsample_nearest1d, aten._upsample_nearest_exact1d, aten.upsample_linear1d),
        (_SUMS, aten.reflection_pad1d, aten.replication_pad1d),
    ),
    2: (
        (_MEANS, aten.avg_pool2d, aten._adaptive_avg_pool2d, aten.upsample_nearest2d),
        (_MAXIMA, aten.max_pool2d_with_indices),
        (replace(_MAXIMA, within=True), aten.adaptive_max_pool2d),
        (_SUMS, aten._upsample_nearest_exact2d, aten.upsample_bilinear2d, aten._upsample_bilinear2d_aa),
        (_SUMS, aten.upsample_bicubic2d, aten._upsample_bicubic2d_aa, aten.reflection_pad2d, aten.replication_pad2d),
    ),
    3: (
        (_SUMS, aten.avg_pool3d, aten._adaptive_avg_pool3d, aten.upsample_nearest3d),
        (_MAXIMA, aten.max_pool3d_with_indices, aten.adaptive_max_pool3d),
        (_SUMS, aten._upsample_nearest_exact3d, aten.upsample_trilinear3d),
        (_SUMS, aten.reflection_pad3d, aten.replication_pad3d),
    ),
}


def _over_positions(rank: int) -> Rule:
    def apply(c: RuleContext) -> Sequence[Sequence[Axis]]:
        (signal,) = [c.axes(tensor) for tensor in c.call.inputs]
        c.pin(signal[-rank:], POSITION)
        return [[*signal[:-rank], *_positions(c, output.shape[-rank:])] for output in c.outputs]

    return apply


for _rank, _rows in _BY_RANK.items():
    for _family, *_ops in _rows:
        rule(*_ops, family=_family)(_over_positions(_rank))


@rule(aten.grid_sampler_2d, aten.grid_sampler_3d)
def _grid_sampler(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal, grid = (c.axes(tensor) for tensor in c.call.inputs)
    c.pin([*signal[2:], *grid[1:]], POSITION)
    c.unify(signal[0], grid[0])
    return [[*signal[:2], *_positions(c, c.outputs[0].shape[2:])]]


@rule(aten.affine_grid_generator)
def _affine_grid(c: RuleContext) -> Sequence[Sequence[Axis]]:
    """Make places for all positions, [N, H, W, 2] or [N, D, H, W, 3], from one matrix for each sample."""
    theta = c.axes("theta")
    c.pin(theta[1:], POSITION)
    return [[theta[0], *_positions(c, c.outputs[0].shape[1:])]]


@literal_rule(aten.affine_grid_generator)
def _grid_size(call: OpCall, maps: IndexMaps) -> ResizedCall:
    # The channels that are told are of no effect: whatever they become, the grid is the same.
    _, *rest = call.arguments["size"]
    return revised(call, size=[maps.size(call.output_axes[0][0]), *rest])


@rule(aten.pixel_shuffle, family=_SUMS)
def _pixel_shuffle(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal, factor = c.axes("self"), c["upscale_factor"]
    c.pin(signal[-2:], POSITION)
    channels = c.fresh(c.outputs[0].shape[-3])
    c.unify(signal[-3], ((channels, factor, factor),))
    return [[*signal[:-3], c.space.normalise(channels), *_positions(c, c.outputs[0].shape[-2:])]]


@rule(aten.pixel_unshuffle, family=_SUMS)
def _pixel_unshuffle(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal, factor = c.axes("self"), c["downscale_factor"]
    c.pin(signal[-2:], POSITION)
    channels = c.space.product(signal[-3], c.fixed(factor), c.fixed(factor))
    return [[*signal[:-3], channels, *_positions(c, c.outputs[0].shape[-2:])]]


@rule(aten.im2col, family=_SUMS)
def _im2col(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal = c.axes("self")
    c.pin(signal[-2:], POSITION)
    patches = c.space.product(signal[-3], c.fixed(prod(c["kernel_size"]), KERNEL))
    return [[*signal[:-3], patches, *_positions(c, c.outputs[0].shape[-1:])]]


@rule(aten.col2im, family=_SUMS)
def _col2im(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal = c.axes("self")
    c.pin(signal[-1:], POSITION)
    channels = c.fresh(c.outputs[0].shape[-3])
    c.unify(signal[-2], ((channels, prod(c["kernel_size"])),))
    return [[*signal[:-2], c.space.normalise(channels), *_positions(c, c.outputs[0].shape[-2:])]]


@rule(aten.unfold, family=Movement(Move.WINDOWS))
def _unfold(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal = c.axes("self")
    dim = c.dim(c["dimension"], len(signal))
    c.pin([signal[dim]], WINDOWS)
    signal[dim] = c.fixed(c.outputs[0].shape[dim], WINDOWS)
    return [[*signal, c.fixed(c["size"], KERNEL)]]


def _positions(c: RuleContext, sizes: Iterable[int]) -> list[Axis]:
    return [c.fixed(size, POSITION) for size in sizes]
