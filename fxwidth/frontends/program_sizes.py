"""The sizes that the inputs of an `ExportedProgram` may have, as `torch.export` is told them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import sympy
import torch
from torch import Tensor
from torch.export import Dim

from fxwidth.errors import FxwidthError

Kind = Literal["dims", "hints"]
# Named dims say how sizes hang together, and must hold as they are; hints leave that to the graph.
DIMS: Kind = "dims"
HINTS: Kind = "hints"
# By how much sizes are other than those that a program was exported with, when it is tried which ones it takes.
_STEPS = (0, 1, 2, 3, 4, 11, 12, -2)


def dynamic_shapes(values: Sequence[Any], ranges: Mapping[sympy.Symbol, Any], kind: Kind) -> list[Any]:
    """Return for each input what `torch.export` is told of its sizes: None where they are fixed.

    Args:
        values: what stands for the inputs, with symbols in the place of sizes that may differ.
        ranges: the least and the largest value of each symbol.
        kind: "dims" or "hints".

    Raises:
        FxwidthError: a size hangs together with others in a way that no dim can say.
    """
    dims: dict[sympy.Symbol, Any] = {}

    def told(size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return None
        expression = size.node.expr
        if kind == HINTS:
            return Dim.AUTO(*_bounds(ranges, expression))
        return _dim(expression, ranges, dims)

    result: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            sizes = {dim: told(size) for dim, size in enumerate(value.shape)}
            result.append({dim: size for dim, size in sizes.items() if size is not None} or None)
        else:
            # torch has no dim for a number among the inputs.
            result.append(Dim.DYNAMIC if isinstance(value, torch.SymInt) else None)
    return result


def size_of(size: Any) -> int:
    """Return a size, or for a symbol the one that it was exported with."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    hint = getattr(size.node, "hint", None)
    return int(hint) if hint is not None else 2


def symbolic_sizes(values: Sequence[Any], ranges: Mapping[sympy.Symbol, Any]) -> list[Any]:
    """Return the sizes of inputs in terms that do not depend on the names of symbols, with the range of each."""
    names: dict[sympy.Symbol, sympy.Symbol] = {}

    def plain(size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        expression = sympy.sympify(size.node.expr)
        for symbol in sorted(expression.free_symbols, key=str):
            names.setdefault(symbol, sympy.Symbol(f"size_{len(names)}"))
        bounds = [_bounds(ranges, symbol) for symbol in sorted(expression.free_symbols, key=str)]
        return str(expression.xreplace(names)), bounds

    return [
        tuple(map(plain, value.shape)) if isinstance(value, Tensor) else plain(value)
        for value in values
        if isinstance(value, (Tensor, torch.SymInt))
    ]


def trial_inputs(values: Sequence[Any], ranges: Mapping[sympy.Symbol, Any]) -> Iterator[list[Any]]:
    """Yield inputs, without values, of some sizes that a program takes: those that it was exported with, and others."""
    sizes = [size for value in values for size in (value.shape if isinstance(value, Tensor) else (value,))]
    own = {size.node.expr: size_of(size) for size in sizes if isinstance(size, torch.SymInt)}
    symbols = sorted({symbol for expression in own for symbol in expression.free_symbols}, key=str)
    for step in _STEPS:
        chosen = {}
        for number, symbol in enumerate(symbols, 1):
            least, largest = _bounds(ranges, symbol)
            chosen[symbol] = min(max(own.get(symbol, 2) + step * number, least or 0), largest or sys.maxsize)

        def plain(size: Any) -> Any:
            return int(size.node.expr.subs(chosen)) if isinstance(size, torch.SymInt) else size  # noqa: B023

        yield [
            torch.empty([plain(size) for size in value.shape], dtype=value.dtype, device="meta")
            if isinstance(value, Tensor)
            else plain(value)
            for value in values
        ]


def _dim(expression: sympy.Expr, ranges: Mapping[sympy.Symbol, Any], dims: dict[sympy.Symbol, Any]) -> Any:
    """Return the dim of a size: a symbol, or a whole multiple of one with a whole number added."""
    symbols = list(expression.free_symbols)
    if len(symbols) != 1:
        raise FxwidthError(f"the size {expression} of an input hangs together with others; no dim can say how.")
    (symbol,) = symbols
    if symbol not in dims:
        least, largest = _bounds(ranges, symbol)
        dims[symbol] = Dim(str(symbol), min=least, max=largest)
    slope, offset = expression.coeff(symbol), expression.subs(symbol, 0)
    if sympy.expand(slope * symbol + offset - expression) != 0:
        raise FxwidthError(f"the size {expression} of an input is no multiple of another one; no dim can say it.")
    dim = dims[symbol] if slope == 1 else int(slope) * dims[symbol]
    return dim + int(offset) if offset > 0 else dim - int(-offset) if offset < 0 else dim


def _bounds(ranges: Mapping[sympy.Symbol, Any], expression: sympy.Expr) -> tuple[int | None, int | None]:
    """Return the least and the largest value of a size, None where it has no such bound."""
    found = ranges.get(expression)
    if found is None:
        return None, None
    return tuple(int(bound) if bound.is_Integer else None for bound in (found.lower, found.upper))  # type: ignore[return-value]
