"""Fused attention kernels, for graphs that call them directly; analysis itself sees attention as matrix products."""

from __future__ import annotations

from collections.abc import Sequence

from fxwidth.factors import Axis
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
    c.contract("query", (3,), "key", (3,))
    # The kernels' default scale is computed from head_dim, which must therefore stay.
    if c.call.arguments.get("scale") is None:
        c.pin([query[3]], "the attention scale is computed from it")
    for name in ("attn_mask", "attn_bias"):
        if name in c:
            c.broadcast([[query[0], query[1], query[2], key[2]], c.axes(name)])
    result = [query[0], query[1], query[2], value[3]]
    return [result, *([[c.fixed(size) for size in output.shape] for output in c.outputs[1:]])]
