"""Fused attention kernels, for graphs that call them directly; analysis itself sees attention as matrix products."""

from __future__ import annotations

from collections.abc import Sequence

from fxwidth.factors import Axis, axis_size
from fxwidth.rules.registry import RuleContext, rule


@rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
def _attention(c: RuleContext) -> Sequence[Sequence[Axis]]:
    query, key, value = c.axes("query"), c.axes("key"), c.axes("value")
    for dim in (0, 1):
        c.unify(query[dim], key[dim])
        c.unify(key[dim], value[dim])
    c.unify(query[3], key[3])
    c.unify(key[2], value[2])
    if "flash" in c.call.name:
        c.unify(query[3], value[3])  # one tile size serves all three
    c.contract("query", (3,), "key", (3,))
    # The kernels' default scale is computed from head_dim, which must therefore stay.
    if c.call.arguments.get("scale") is None:
        c.pin([query[3]], "the attention scale is computed from it")
    for name in ("attn_mask", "attn_bias"):
        if name in c:
            c.broadcast([[query[0], query[1], query[2], key[2]], c.axes(name)])
    result = [query[0], query[1], query[2], value[3]]
    return [result, *(_statistics(c, query, tuple(output.shape)) for output in c.outputs[1:])]


def _statistics(c: RuleContext, query: Sequence[Axis], shape: tuple[int, ...]) -> Sequence[Axis]:
    """Return the axes of a log-sum-exp: batch, heads, queries (rounded up by some kernels); random states are fixed."""
    known = query[:3] if len(shape) >= 3 else []
    own = [axis if axis_size(axis) == size else c.fixed(size) for axis, size in zip(known, shape, strict=False)]
    return [*own, *map(c.fixed, shape[len(own) :])]
