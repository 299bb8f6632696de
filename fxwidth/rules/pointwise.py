"""Ops that act on each element alone; most carry ATen's pointwise tag and need no line here."""

from __future__ import annotations

import torch

from fxwidth.rules.family_table import declare
from fxwidth.rules.op_families import Arithmetic, Elementwise, Move, Movement
from fxwidth.rules.registry import pointwise

aten = torch.ops.aten

# Copies, casts and constants of an operand's shape.
pointwise(aten.clone, aten.detach, aten.alias, aten.lift_fresh, aten.lift_fresh_copy, family=Movement(Move.COPY))
pointwise(aten._to_copy, family=Movement(Move.CAST))
pointwise(aten.copy, family=Elementwise(Arithmetic.WRITE))
pointwise(aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like, aten.fill, aten.zero)
pointwise(aten.rand_like, aten.randn_like, aten.bernoulli, aten.uniform, aten.normal, aten.native_dropout)
pointwise(aten._assert_tensor_metadata)

# Pointwise in meaning, but not tagged in every release.
pointwise(aten.where, family=Elementwise(Arithmetic.CHOICE))
pointwise(aten.masked_fill, aten.nan_to_num, aten.isnan, aten.bitwise_not, aten.logical_not, aten.threshold)
pointwise(aten.silu, aten.mish, aten.elu, aten.celu, aten.gelu, aten.softplus, aten.leaky_relu, aten.hardtanh)
pointwise(aten.hardswish, aten.hardsigmoid, aten.log_sigmoid_forward, aten.rrelu_with_noise, aten._prelu_kernel)

# Tagged; what they make of their operands is asked for elsewhere.
declare(Elementwise(Arithmetic.SUM), aten.add)
declare(Elementwise(Arithmetic.DIFFERENCE), aten.sub, aten.rsub)
declare(Elementwise(Arithmetic.PRODUCT), aten.mul)
declare(Elementwise(Arithmetic.QUOTIENT), aten.div)
