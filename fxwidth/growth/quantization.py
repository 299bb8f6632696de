"""How new channels pass fake quantization: zero stays zero, other numbers are rounded."""

from __future__ import annotations

import torch

from fxwidth.growth.call_view import CallView
from fxwidth.growth.states import State, meet, passed
from fxwidth.growth.transfers import Result, transfer
from fxwidth.rules.family_table import as_family
from fxwidth.rules.op_families import FakeQuantization

aten = torch.ops.aten


@transfer(
    aten.fake_quantize_per_tensor_affine_cachemask,
    aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams,
    aten._fake_quantize_learnable_per_tensor_affine,
    aten.fake_quantize_per_channel_affine_cachemask,
    aten._fake_quantize_learnable_per_channel_affine,
)
def _quantized(c: CallView) -> Result:
    family = as_family(c.call.func, FakeQuantization)
    return _rounded(c, c[family.axis] if family is not None and family.axis else None)


def _rounded(c: CallView, axis: int | None) -> Result:
    """Return what holds for multiples of scales; which entries were cut off is of no effect on results."""
    row = []
    for dim, state in enumerate(c.states("self")):
        own = axis is not None and dim == axis % len(c.axes("self"))
        scales = [c.states(name)[0] for name in ("scale", "zero_point")] if own else []
        if scales and scales[0] & State.ZERO:
            c.refuse("it divides by scales of new channels that are zero")
        alike = meet([state, *scales]) & State.UNIFORM
        row.append(passed(state, State.ZERO) if alike else state & State.ZERO)
    return [row, *c.everywhere(State.ANY)[1:]]


@transfer(aten._fused_moving_avg_obs_fq_helper)
def _observed(c: CallView) -> Result:
    for reduction in c.call.reductions:
        if c.facts.carries(c.axes("self")[reduction.dim]):
            c.refuse("it may look for the least and the largest entry among new channels")
    # Each channel has a scale by what it holds itself, never zero.
    return [[state & State.ZERO for state in c.states("self")], *c.everywhere(State.ANY)[1:]]
