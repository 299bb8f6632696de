"""Reductions over dims, and ops that normalise or order along one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fxwidth.axes.factors import ONE, Axis
from fxwidth.axes.pins import LARGEST, ORDER, POSITIONS_RETURNED
from fxwidth.rules.registry import Rule, RuleContext, rule

_KINDS = {
    "sum": ("sum", "nansum"),
    "mean": ("mean",),
    "variance": ("var", "std", "var_mean", "std_mean"),
    "maximum": ("amax", "amin", "any", "all", "logsumexp"),
    "vector norm": ("linalg_vector_norm", "norm"),
    "product": ("prod",),
}


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
    def judge(c: RuleContext) -> Sequence[Sequence[Axis]]:
        signal = c.axes("self")
        dims = _reduced_dims(c, len(signal))
        for dim in dims:
            c.mix("self", dim, kind)
        return _without(c, signal, dims)

    return judge


for _kind, _names in _KINDS.items():
    rule(*_names)(_reduction(_kind))


@rule("argmax", "argmin")
def _arg(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal = c.axes("self")
    dims = _reduced_dims(c, len(signal))
    c.pin([signal[dim] for dim in dims], POSITIONS_RETURNED)
    return _without(c, signal, dims)


@rule("max", "min")
def _extremum(c: RuleContext) -> Sequence[Sequence[Axis]]:
    if "other" in c:
        return [c.broadcast([c.axes("self"), c.axes("other")])]
    if len(c.outputs) > 1:
        signal = c.axes("self")
        for dim in _reduced_dims(c, len(signal)):
            c.pin_if_used(c.outputs[1], signal[dim], POSITIONS_RETURNED)
    return _reduction("maximum")(c)


@rule("_softmax", "_log_softmax", "_safe_softmax")
def _softmax(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal = c.axes("self")
    c.mix("self", c.dim(c["dim"], len(signal)), "softmax")
    return [signal]


@rule("cumsum", "cumprod", "sort", "cummax", "cummin")
def _ordered(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal = c.axes("self")
    c.pin([signal[c.dim(c["dim"], len(signal))]], ORDER)
    return [signal] * len(c.outputs)


@rule("topk")
def _topk(c: RuleContext) -> Sequence[Sequence[Axis]]:
    signal = c.axes("self")
    dim = c.dim(c["dim"], len(signal))
    c.pin([signal[dim]], LARGEST)
    signal[dim] = c.fixed(c.outputs[0].shape[dim], LARGEST)
    return [signal] * len(c.outputs)
