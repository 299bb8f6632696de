"""Normalisations: per channel over a batch (batch norm), or over the channels themselves (layer, group, RMS norm)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from fxwidth.axes.factors import ONE, Axis, axis_size
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.recording.tape import OpCall
from fxwidth.rules.registry import Prescribed, RuleContext, RuleDeclinedError, prescription, revised, rule


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
    "cudnn_batch_norm",
)
def _batch_norm(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal = c.axes("input")
    channels = signal[1] if len(signal) > 1 else signal[0]
    for name in ("weight", "bias", "running_mean", "running_var"):
        if name in c:
            c.unify(channels, c.axes(name)[0])
    uses_batch = c.call.arguments.get("training") or c.call.name == "_batch_norm_with_update"
    if uses_batch or "running_mean" not in c:
        for dim in range(len(signal)):
            if dim != 1:
                c.mix("input", dim, "batch norm over its own batch")
    size = axis_size(channels) if len(signal) > 1 else -1
    saved = [[channels] if tuple(out.shape) == (size,) else [c.fixed(n) for n in out.shape] for out in c.outputs[1:]]
    return [signal, *saved]


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


@rule("native_layer_norm")
def _layer_norm(c: RuleContext) -> Sequence[Sequence[Axis]]:
    return _over_trailing_dims(c, "layer norm")


@rule("_fused_rms_norm", "fxwidth::rms_norm")
def _rms_norm(c: RuleContext) -> Sequence[Sequence[Axis]]:
    return _over_trailing_dims(c, "RMS norm")


@prescription("native_layer_norm", "_fused_rms_norm", "fxwidth::rms_norm")
def _normalized_shape(call: OpCall, maps: IndexMaps) -> Prescribed:
    signal = call.axes[id(call.arguments["input"])]
    count = len(call.arguments["normalized_shape"])
    # The gain carries the square root of the ratio: together they leave gain * x / sqrt(variance + eps) as it was.
    eps = call.arguments["eps"] * maps.variance_ratio(call.index)
    return revised(call, normalized_shape=[maps.size(axis) for axis in signal[-count:]], eps=eps)


@rule("_weight_norm_interface", "fxwidth::weight_norm")
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


@rule("native_group_norm")
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


@prescription("native_group_norm")
def _group_norm_sizes(call: OpCall, maps: IndexMaps) -> Prescribed:
    signal = call.axes[id(call.arguments["input"])]
    return revised(
        call,
        N=maps.size(signal[0]),
        C=maps.size(signal[1]),
        HxW=prod(maps.size(axis) for axis in signal[2:]),
        group=maps.size(call.output_axes[1][1]),
    )
