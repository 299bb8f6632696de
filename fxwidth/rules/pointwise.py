"""Ops that act on each element alone; most carry ATen's pointwise tag and need no line here."""

from __future__ import annotations

from fxwidth.rules.registry import pointwise

# Copies, casts and constants of an operand's shape.
pointwise("clone", "detach", "_to_copy", "alias", "lift_fresh", "lift_fresh_copy", "copy")
pointwise("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "bernoulli")
pointwise("fill", "zero", "uniform", "normal", "native_dropout", "_assert_tensor_metadata")

# Pointwise in meaning, but not tagged in every release.
pointwise("masked_fill", "where", "nan_to_num", "isnan", "bitwise_not", "logical_not", "threshold")
pointwise("silu", "mish", "elu", "celu", "gelu", "softplus", "leaky_relu", "hardtanh", "hardswish", "hardsigmoid")
pointwise("log_sigmoid_forward", "rrelu_with_noise", "_prelu_kernel")
