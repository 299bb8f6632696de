"""Attention: softmax(query key^T * scale + mask) value, as one op and as the kernels that graphs call directly."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxwidth.axes.factors import Axis, axis_size
from fxwidth.axes.pins import ORDER, SCALE
from fxwidth.rules.op_families import Attention
from fxwidth.rules.registry import RuleContext, rule

aten = torch.ops.aten

_KERNELS = (
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
)
_ONE_TILE = _KERNELS[:2]


@rule(torch.ops.fxwidth.attention, family=Attention())
def _attention(c: RuleContext) -> Sequence[Sequence[Axis]]:
    """Couple [*lead, L, E] with [*lead, S, E] to weights [*lead, L, S], and these with [*lead, S, V]."""
    query, key, value = c.axes("query"), c.axes("key"), c.axes("value")
    if c["enable_gqa"]:
        for own in (key, value):
            _group_heads(c, query, own)
        leading = [*c.broadcast([query[:-3], key[:-3], value[:-3]]), query[-3]]
    else:
        leading = c.broadcast([query[:-2], key[:-2], value[:-2]])
    _match(c, query, key, value, leading)
    return [[*leading, query[-2], value[-1]]]


def _group_heads(c: RuleContext, query: list[Axis], shared: list[Axis]) -> None:
    """Say that each head of keys or values serves as many neighbouring query heads."""
    groups = c.fresh(axis_size(query[-3]) // axis_size(shared[-3]), "query heads per group")
    c.unify(query[-3], c.space.product(shared[-3], groups))


def _match(
    c: RuleContext, query: list[Axis], key: list[Axis], value: list[Axis], leading: list[Axis], mask: str = "attn_mask"
) -> None:
    c.unify(query[-1], key[-1])
    c.unify(key[-2], value[-2])
    c.contract("query", (len(query) - 1,), "key", (len(key) - 1,))
    c.mix("key", len(key) - 2, "softmax")
    if c["is_causal"]:
        c.pin([query[-2], key[-2]], ORDER)
    if mask in c:
        c.broadcast([[*leading, query[-2], key[-2]], c.axes(mask)])


@rule(*_KERNELS, family=Attention())
def _kernel(c: RuleContext) -> Sequence[Sequence[Axis]]:
    query, key, value = c.axes("query"), c.axes("key"), c.axes("value")
    for dim in (0, 1):
        c.unify(query[dim], key[dim])
        c.unify(key[dim], value[dim])
    if c.call.func.overloadpacket in _ONE_TILE:
        c.unify(query[3], value[3])  # one tile size serves all three
    _match(c, query, key, value, query[:2], "attn_mask" if "attn_mask" in c.call.arguments else "attn_bias")
    # The kernels' default scale is computed from head_dim, which must therefore stay.
    if c.call.arguments.get("scale") is None:
        c.pin([query[3]], SCALE)
    result = [query[0], query[1], query[2], value[3]]
    return [result, *(_statistics(c, query, tuple(output.shape)) for output in c.outputs[1:])]


def _statistics(c: RuleContext, query: Sequence[Axis], shape: tuple[int, ...]) -> Sequence[Axis]:
    """Return the axes of a log-sum-exp: batch, heads, queries (rounded up by some kernels); random states are fixed."""
    known = query[:3] if len(shape) >= 3 else []
    own = [axis if axis_size(axis) == size else c.fixed(size) for axis, size in zip(known, shape, strict=False)]
    return [*own, *map(c.fixed, shape[len(own) :])]
