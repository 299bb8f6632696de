"""Fake quantization: entries rounded as if they were stored in a few bits, by scales that are told or observed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxwidth.axes.factors import Axis
from fxwidth.rules.op_families import FakeQuantization
from fxwidth.rules.registry import RuleContext, RuleDeclinedError, broadcast_all, rule

aten = torch.ops.aten

rule(
    aten.fake_quantize_per_tensor_affine_cachemask,
    aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams,
    aten._fake_quantize_learnable_per_tensor_affine,
    family=FakeQuantization(),
)(broadcast_all)

OBSERVED = ("running_min", "running_max", "scale", "zero_point")


@rule(
    aten.fake_quantize_per_channel_affine_cachemask,
    aten._fake_quantize_learnable_per_channel_affine,
    family=FakeQuantization("axis"),
)
def _per_channel(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal = c.axes("self")
    for name in ("scale", "zero_point"):
        c.unify(signal[c["axis"]], c.axes(name)[0])
    return [signal] * len(c.outputs)


@rule(aten._fused_moving_avg_obs_fq_helper, family=FakeQuantization("ch_axis"))
def _observed(c: RuleContext) -> Sequence[Sequence[Axis]]:
    """Follow the least and the largest entry of each channel, or of all, and round by these."""
    signal, axis = c.axes("self"), c["ch_axis"] if c["per_row_fake_quant"] else None
    for name in OBSERVED:
        own = c.axes(name)
        if axis is not None:
            c.unify(signal[axis], own[0])
        elif c[name].numel() != 1:
            raise RuleDeclinedError("scales of channels for all of a tensor")
    for dim in range(len(signal)):
        if dim != axis:
            c.mix("self", dim, "maximum")
    return [signal] * len(c.outputs)
