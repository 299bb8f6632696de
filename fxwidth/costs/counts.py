"""What a network of given widths costs, as exact polynomials in the widths."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from fxwidth.axes.factors import Axis, Factor
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.axes.polynomials import Polynomial, entries_polynomial
from fxwidth.costs.registry import of_examples, register
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.memo import per_graph
from fxwidth.recording.tape import Axes, OpCall, unbind
from fxwidth.rules.family_table import family_of
from fxwidth.rules.op_families import Attention, Convolution, Family, Product, SampledConvolution
from fxwidth.rules.registry import resized_call

__all__ = ["Polynomial", "buffer_count", "entries_polynomial", "flop_polynomial", "parameter_polynomial"]


@register("params", unit="parameters")
@per_graph
def parameter_polynomial(width_graph: WidthGraph) -> Polynomial:
    """Return the number of entries of a graph's parameters, each distinct one counted once; buffers are left out."""
    entries = width_graph.analysis.parameters.values()
    tensors = [entry.axes for entry in entries if isinstance(entry.tensor, nn.Parameter)]
    return entries_polynomial(width_graph.analysis.space, tensors)


def parameter_count(width_graph: WidthGraph, widths: Mapping[Factor, int]) -> int:
    """Return how many parameters a graph has once its factors have the given widths; others stay as they are."""
    return int(parameter_polynomial(width_graph)(widths))


def buffer_count(width_graph: WidthGraph, widths: Mapping[Factor, int]) -> int:
    """Return how many entries a graph's buffers have once its factors have the given widths."""
    entries = width_graph.analysis.parameters.values()
    tensors = [entry.axes for entry in entries if not isinstance(entry.tensor, nn.Parameter)]
    return int(entries_polynomial(width_graph.analysis.space, tensors)(widths))


@register("flops", unit="flops")
@per_graph
def flop_polynomial(width_graph: WidthGraph) -> Polynomial:
    """Return the floating-point operations of one forward pass on the example inputs, their whole batch.

    They are those that `torch.utils.flop_counter` counts: two for each multiplication of matrix products, convolutions
    and attention, none for other ops. Attention is counted as its two matrix products, fused or not.
    """
    return Polynomial.sum((1, call_flops(width_graph, call)) for call in width_graph.analysis.calls)


def flops_before_and_after(width_graph: WidthGraph, widths: Mapping[Factor, int]) -> list[int] | None:
    """Return the flops of a graph now, and once its factors have the given widths; None where they are not known.

    They are not where a formula fails that torch, or the user, has registered for an op. Nothing is run.
    """
    try:
        polynomial = of_examples(width_graph, flop_polynomial(width_graph))
        return [round(polynomial({})), round(polynomial(widths))]
    except Exception:
        return None


def call_flops(width_graph: WidthGraph, call: OpCall) -> Polynomial:
    """Return the floating-point operations of one op of the tape."""
    products = _PRODUCT_TERMS.get(type(family_of(call.func)))
    has_formula = call.func.overloadpacket in flop_registry
    # Products of ATen that torch does not count, such as those with a vector, are none here either.
    if products is not None and (has_formula or call.func.namespace != "aten" or products is _attention):
        return Polynomial.sum([(2, entries_polynomial(width_graph.analysis.space, products(call)))])
    return _by_formula(width_graph, call) if has_formula else Polynomial({})


def _by_formula(width_graph: WidthGraph, call: OpCall) -> Polynomial:
    """Return the flops of an op for which torch, or a user, has registered a formula: a sum of products of its sizes.

    The coefficient of each product follows from the formula's values with the other sizes set to zero.
    """
    space = width_graph.analysis.space
    factors = list(dict.fromkeys(f for axes in call.axes.values() for axis in axes for f in space.factors(axis)))
    formula = flop_registry[call.func.overloadpacket]
    values: dict[frozenset[Factor], float] = {}
    terms: dict[tuple[Factor, ...], float] = {}
    for count in range(len(factors) + 1):
        for product in itertools.combinations(factors, count):
            absent = {factor: np.zeros(0, dtype=np.int64) for factor in factors if factor not in product}
            args, kwargs = _shaped(call, IndexMaps(space, absent))
            values[frozenset(product)] = formula(*args, **kwargs)
            subsets = (frozenset(part) for k in range(count + 1) for part in itertools.combinations(product, k))
            total = sum((-1) ** (count - len(subset)) * values[subset] for subset in subsets)
            terms[product] = total / math.prod(factor.size for factor in product)
    return Polynomial(terms)


def _shaped(call: OpCall, maps: IndexMaps) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of an op with tensors that have the new sizes and no values, its result among them."""

    def shaped(value: Any, axes: Axes) -> Tensor:
        return torch.empty([maps.size(axis) for axis in axes], dtype=value.dtype, device="meta")

    func, arguments = resized_call(call, maps)
    concrete = {
        name: pytree.tree_map(lambda leaf: shaped(leaf, call.axes[leaf]) if isinstance(leaf, Tensor) else leaf, old)
        for name, old in arguments.items()
    }
    args, kwargs = unbind(func, concrete)
    results = [shaped(output, axes) for output, axes in zip(call.outputs, call.output_axes, strict=True)]
    return args, {**kwargs, "out_val": results[0] if len(results) == 1 else tuple(results)}


def _product(call: OpCall) -> Iterator[Iterable[Axis]]:
    for contraction in call.contractions:
        left = call.axes[contraction.left]
        yield [*call.output_axes[0], *(left[dim] for dim in contraction.left_dims)]


def _convolution(call: OpCall) -> Iterator[Iterable[Axis]]:
    signal, weight = call.axes[call.arguments["input"]], call.axes[call.arguments["weight"]]
    positions = signal if call.arguments.get("transposed") else call.output_axes[0]
    yield [signal[0], *positions[2:], *weight]


def _attention(call: OpCall) -> Iterator[Iterable[Axis]]:
    query, key, value = (call.axes[call.arguments[name]] for name in ("query", "key", "value"))
    rows = call.output_axes[0][:-1]
    yield [*rows, query[-1], key[-2]]
    yield [*rows, key[-2], value[-1]]


_PRODUCT_TERMS: dict[type[Family | None], Callable[[OpCall], Iterator[Iterable[Axis]]]] = {
    Product: _product,
    Convolution: _convolution,
    SampledConvolution: _convolution,
    Attention: _attention,
}
