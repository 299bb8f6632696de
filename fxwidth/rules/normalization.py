"""Normalisations: per channel over a batch (batch norm), or over the channels themselves (layer, group, RMS norm)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch

from fxwidth.axes.factors import ONE, Axis, axis_size
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.recording.tape import OpCall
from fxwidth.rules.family_table import as_family
from fxwidth.rules.op_families import Norm, NormKind, WeightNorm
from fxwidth.rules.registry import ResizedCall, RuleContext, RuleDeclinedError, literal_rule, revised, rule

aten = torch.ops.aten


def _batch_norm(c: RuleContext) -> Sequence[Sequence[Axis]]:
    family = as_family(c.call.func, Norm)
    assert family is not None
    signal = c.axes("input")
    channels = signal[1] if len(signal) > 1 else signal[0]
    for name in ("weight", family.bias, family.mean, family.variance):
        if name in c:
            c.unify(channels, c.axes(name)[0])
    if family.by_own_batch(c.call.arguments):
        for dim in range(len(signal)):
            if dim != 1:
                c.mix("input", dim, "batch norm over its own batch")
    size = axis_size(channels) if len(signal) > 1 else -1
    saved = [[channels] if tuple(out.shape) == (size,) else [c.fixed(n) for n in out.shape] for out in c.outputs[1:]]
    return [signal, *saved]


_RUNNING = Norm(NormKind.BATCH, mean="running_mean", variance="running_var", training="training")
for _norm, *_ops in (
    (_RUNNING, aten.native_batch_norm, aten._native_batch_norm_legit, aten._native_batch_norm_legit_functional),
    (replace(_RUNNING, training=False), aten._native_batch_norm_legit_no_training, aten._batch_norm_no_update),
    (replace(_RUNNING, training=True), aten._batch_norm_with_update, aten._batch_norm_with_update_functional),
    (replace(_RUNNING, eps="epsilon"), aten.cudnn_batch_norm, aten.miopen_batch_norm),
):
    rule(*_ops, family=_norm)(_batch_norm)


def _over_trailing_dims(c: RuleContext, kind: str) -> Sequence[Sequence[Axis]]:
    signal = c.axes("input")
    count = len(c["normalized_shape"])
    for name in ("weight", "bias"):
        if name in c:
            for own, other in zip(signal[-count:], c.axes(name), strict=True):
                c.unify(own, other)
    for dim in range(len(signal) - count, len(signal)):
        c.mix("input", dim, kind)
    statistics = [*signal[:-count], *([ONE] * count)]
    return [signal, *([statistics] * (len(c.outputs) - 1))]


@rule(aten.native_layer_norm, family=Norm(NormKind.LAYER))
def _layer_norm(c: RuleContext) -> Sequence[Sequence[Axis]]:
    return _over_trailing_dims(c, "layer norm")


@rule(aten._fused_rms_norm, torch.ops.fxwidth.rms_norm, family=Norm(NormKind.RMS, bias=""))
def _rms_norm(c: RuleContext) -> Sequence[Sequence[Axis]]:
    return _over_trailing_dims(c, "RMS norm")


@literal_rule(aten.native_layer_norm, aten._fused_rms_norm, torch.ops.fxwidth.rms_norm)
def _normalized_shape(call: OpCall, maps: IndexMaps) -> ResizedCall:
    signal = call.axes[call.arguments["input"]]
    count = len(call.arguments["normalized_shape"])
    # The gain carries the square root of the ratio: together they leave gain * x / sqrt(variance + eps) as it was.
    eps = call.arguments["eps"] * maps.eps_ratio(call.index)
    return revised(call, normalized_shape=[maps.size(axis) for axis in signal[-count:]], eps=eps)


@rule(aten._weight_norm_interface, torch.ops.fxwidth.weight_norm, family=WeightNorm())
def _weight_norm(c: RuleContext) -> Sequence[Sequence[Axis]]:
    """Scale each slice along `dim` of a weight to unit length, then by its gain; all of it as one slice for -1."""
    direction, gain = c.axes("v"), c.axes("g")
    kept = weight_norm_dim(c.call)
    if kept is not None:
        c.unify(direction[kept], gain[kept])
    elif any(axis_size(axis) != 1 for axis in gain):
        raise RuleDeclinedError("a weight norm over everything with several gains")
    for dim in range(len(direction)):
        if dim != kept:
            c.mix("v", dim, "vector norm")
    return [direction, gain][: len(c.outputs)]


def weight_norm_dim(call: OpCall) -> int | None:
    """Return the dim of a weight norm whose slices have a length each, or None where there is one for all."""
    dim: int = call.arguments["dim"]
    return None if dim == -1 else dim % call.arguments["v"].dim()


@rule(aten.native_group_norm, family=Norm(NormKind.GROUP))
def _group_norm(c: RuleContext) -> Sequence[Sequence[Axis]]:
    """Divide the channels into groups * channels per group; the statistics have one entry per sample and group."""
    signal = c.axes("input")
    for name in ("weight", "bias"):
        if name in c:
            c.unify(signal[1], c.axes(name)[0])
    groups, inner = c.factored(signal[1], c["group"], c.shape("input")[1] // c["group"])
    c.space.mix(inner, "group norm")
    c.mix_inside("input", 1, "group norm")
    for dim in range(2, len(signal)):
        c.mix("input", dim, "group norm")
    return [signal, *([[signal[0], groups]] * (len(c.outputs) - 1))]


@literal_rule(aten.native_group_norm)
def _group_norm_sizes(call: OpCall, maps: IndexMaps) -> ResizedCall:
    signal = call.axes[call.arguments["input"]]
    return revised(
        call,
        N=maps.size(signal[0]),
        C=maps.size(signal[1]),
        HxW=prod(maps.size(axis) for axis in signal[2:]),
        group=maps.size(call.output_axes[1][1]),
    )
