"""Two models beside each other: sizes, times, and how far apart their outputs are."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.benchmark import Timer

import fxwidth
from fxwidth.commands.faults import InputError
from fxwidth.commands.models import Opened
from fxwidth.tables import Table

_Inputs = tuple[tuple[Any, ...], dict[str, Any]]

# Seconds that each model runs for, at least.
_SECONDS = 0.3
_UNITS = {"params": "parameters", "flops": "flops", "activation_memory": "bytes for backward", "seconds": "seconds"}


def compared(a: Opened, b: Opened, *, runs: bool) -> dict[str, Any]:
    """Return what each of two models costs for the same inputs, and how far apart their outputs are, as plain data.

    Args:
        a: one model.
        b: another.
        runs: whether to run both, on the same inputs, for times, and, of models with weights, for outputs.

    Raises:
        InputError: they take different inputs.
    """
    a, b = _alike(a, b)
    graphs = [one.trace() for one in (a, b)]
    found: dict[str, Any] = {"models": [a.name, b.name]}
    for name in ("params", "flops", "activation_memory"):
        found[name] = [_cost(graph, name) for graph in graphs]
    if runs:
        inputs = _drawn(a.inputs)
        found["seconds"] = [_seconds(graph, inputs) for graph in graphs]
        if a.has_values and b.has_values:
            found["output_difference"] = _difference(graphs, inputs)
    return found


def _alike(a: Opened, b: Opened) -> tuple[Opened, Opened]:
    """Return two models with the same example of inputs: where none was typed, one that both take."""
    known = [_carried(one) for one in (a, b)]
    if _shapes(known[0]) == _shapes(known[1]):
        return replace(a, inputs=known[0]), replace(b, inputs=known[0])
    # A graph from a file carries the inputs that it was traced with, and often takes others.
    for inputs, other in ((known[0], b), (known[1], a)):
        with suppress(fxwidth.FxwidthError):
            replace(other, inputs=inputs).trace()
            return replace(a, inputs=inputs), replace(b, inputs=inputs)
    taken = " and ".join(f"{one.name} {_told_shapes(own)}" for one, own in zip((a, b), known, strict=True))
    raise InputError(f"the models are compared on the same inputs, but {taken}; give --input that both take.")


def _carried(opened: Opened) -> Any:
    """Return an example of what a model takes: its own, or of the shapes that its graph carries."""
    if opened.inputs is not None:
        return opened.inputs
    nodes = opened.trace().graph.find_nodes(op="placeholder")
    return tuple(_like(node.meta["tensor_meta"]) for node in nodes if "tensor_meta" in node.meta)


def _shapes(inputs: Any) -> list[Any]:
    return [getattr(leaf, "shape", leaf) for leaf in pytree.tree_leaves(inputs)]


def _told_shapes(inputs: Any) -> str:
    shapes = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    return f"was given {', '.join('x'.join(map(str, leaf.shape)) for leaf in shapes)}"


def table(found: dict[str, Any]) -> Table:
    """Return what was found as a table."""
    rows = []
    for name, unit in _UNITS.items():
        values = found.get(name)
        if values is not None:
            shown = ["" if value is None else f"{value:.4g}" if name == "seconds" else f"{value:,}" for value in values]
            ratio = f"{values[1] / values[0]:.1%}" if all(values) else ""
            rows.append((unit, *shown, ratio))
    difference = found.get("output_difference")
    below = () if "output_difference" not in found else (_told(difference),)
    return Table(("", *found["models"], "second of first"), tuple(rows), (), below)


def _told(difference: float | None) -> str:
    if difference is None:
        return "outputs: not compared, their shapes differ"
    return f"outputs: differ by {difference:.3g} of the norm of the first"


def _cost(graph: torch.fx.GraphModule, name: str) -> int | None:
    try:
        return int(fxwidth.cost_polynomial(fxwidth.analyze(graph), name)({}))
    except fxwidth.FxwidthError:
        # Nothing is kept where nothing is trained, or where the graph does not train.
        return None


def _drawn(inputs: Any) -> _Inputs:
    """Return what to call a model with: random numbers of the shapes of an example."""
    torch.manual_seed(0)
    leaves, structure = pytree.tree_flatten(inputs)
    drawn = pytree.tree_unflatten(
        [_like(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], structure
    )
    if isinstance(drawn, dict):
        return (), drawn
    return (drawn if isinstance(drawn, tuple) else (drawn,)), {}


def _like(tensor: Any) -> torch.Tensor:
    if tensor.dtype.is_floating_point:
        return torch.randn(tuple(tensor.shape)).to(tensor.dtype)
    return torch.ones(tuple(tensor.shape), dtype=tensor.dtype)


def _seconds(graph: torch.fx.GraphModule, inputs: _Inputs) -> float:
    args, kwargs = inputs
    with torch.no_grad():
        timer = Timer("graph(*args, **kwargs)", globals={"graph": graph, "args": args, "kwargs": kwargs})
        return float(timer.blocked_autorange(min_run_time=_SECONDS).median)


def _difference(graphs: list[torch.fx.GraphModule], inputs: _Inputs) -> float | None:
    args, kwargs = inputs
    with torch.no_grad():
        answers = [pytree.tree_leaves(graph(*args, **kwargs)) for graph in graphs]
    tensors = [[leaf for leaf in own if isinstance(leaf, torch.Tensor)] for own in answers]
    if [tensor.shape for tensor in tensors[0]] != [tensor.shape for tensor in tensors[1]]:
        return None
    first, second = (torch.cat([tensor.double().flatten() for tensor in own]) for own in tensors)
    return float((first - second).norm() / first.norm().clamp(min=torch.finfo(torch.float64).tiny))
