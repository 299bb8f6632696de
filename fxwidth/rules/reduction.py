"""Reductions over dims, and ops that normalise or order along one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from fxwidth.axes.factors import ONE, Axis
from fxwidth.axes.pins import LARGEST, ORDER, POSITIONS_RETURNED
from fxwidth.rules.op_families import Reduction
from fxwidth.rules.registry import Rule, RuleContext, rule

aten = torch.ops.aten

_MAXIMUM = Reduction("maximum", zero_of_zeros=True, extremum=True)


def _reduced_dims(c: RuleContext, rank: int) -> list[int]:
    dims = c.call.arguments.get("dim")
    if dims is None or (not isinstance(dims, int) and len(dims) == 0):
        return list(range(rank))
    chosen: Iterable[int] = [dims] if isinstance(dims, int) else dims
    return [c.dim(dim, rank) for dim in chosen]


def _without(c: RuleContext, signal: list[Axis], dims: list[int]) -> Sequence[Sequence[Axis]]:
    keeps_dims = len(c.outputs[0].shape) == len(signal)
    kept = [ONE if dim in dims else axis for dim, axis in enumerate(signal) if keeps_dims or dim not in dims]
    return [kept] * len(c.outputs)


def _reduction(kind: str) -> Rule:
    def apply(c: RuleContext) -> Sequence[Sequence[Axis]]:
        signal = c.axes("self")
        dims = _reduced_dims(c, len(signal))
        for dim in dims:
            c.mix("self", dim, kind)
        return _without(c, signal, dims)

    return apply


for _family, *_ops in (
    (Reduction("sum", linear=True), aten.sum, aten.nansum),
    (Reduction("mean", linear=True), aten.mean),
    (Reduction("variance", zero_of_zeros=True), aten.var, aten.std),
    # Of two results one would have to be told from the other.
    (Reduction("variance"), aten.var_mean, aten.std_mean),
    (_MAXIMUM, aten.amax, aten.amin),
    (Reduction("maximum"), aten.any, aten.all, aten._is_all_true, aten._is_any_true, aten.logsumexp),
    (Reduction("vector norm", zero_of_zeros=True), aten.linalg_vector_norm, aten.norm),
    (Reduction("product", zero_of_zeros=True), aten.prod),
):
    rule(*_ops, family=_family)(_reduction(_family.kind))


@rule(aten.argmax, aten.argmin)
def _arg(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal = c.axes("self")
    dims = _reduced_dims(c, len(signal))
    c.pin([signal[dim] for dim in dims], POSITIONS_RETURNED)
    return _without(c, signal, dims)


@rule(aten.max, aten.min, family=_MAXIMUM)
def _extremum(c: RuleContext) -> Sequence[Sequence[Axis]]:
    if "other" in c:
        return [c.broadcast([c.axes("self"), c.axes("other")])]
    if len(c.outputs) > 1:
        signal = c.axes("self")
        for dim in _reduced_dims(c, len(signal)):
            c.pin_if_used(c.outputs[1], signal[dim], POSITIONS_RETURNED)
    return _reduction("maximum")(c)


rule(aten.aminmax, family=_MAXIMUM)(_reduction("maximum"))


@rule(aten.histc, family=Reduction("histogram"))
def _histogram(c: RuleContext) -> Sequence[Sequence[Axis]]:
    for dim in range(len(c.axes("self"))):
        c.mix("self", dim, "histogram")
    return [[c.fixed(c["bins"])]]


@rule(aten._softmax, aten._log_softmax, aten._safe_softmax)
def _softmax(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal = c.axes("self")
    c.mix("self", c.dim(c["dim"], len(signal)), "softmax")
    return [signal]


@rule(aten.cumsum, aten.cumprod, aten.logcumsumexp, aten.sort, aten.cummax, aten.cummin)
def _ordered(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal = c.axes("self")
    c.pin([signal[c.dim(c["dim"], len(signal))]], ORDER)
    return [signal] * len(c.outputs)


@rule(aten.topk)
def _topk(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal = c.axes("self")
    dim = c.dim(c["dim"], len(signal))
    c.pin([signal[dim]], LARGEST)
    signal[dim] = c.fixed(c.outputs[0].shape[dim], LARGEST)
    return [signal] * len(c.outputs)
