"""Two models beside each other: sizes, times, and how far apart their outputs are."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.benchmark import Timer

import fxwidth
from fxwidth.commands.models import Opened
from fxwidth.tables import Table

# Seconds that each model runs for, at least.
_SECONDS = 0.3
_UNITS = {"params": "parameters", "flops": "flops", "activation_memory": "bytes for backward", "seconds": "seconds"}


def compared(a: Opened, b: Opened, *, runs: bool) -> dict[str, Any]:
    """Return what each of two models costs, and how far apart their outputs are, as plain data.

    Args:
        a: one model.
        b: another.
        runs: whether to run both, on the same inputs, for times, and, of models with weights, for outputs.
    """
    graphs = [one.trace() for one in (a, b)]
    found: dict[str, Any] = {"models": [a.name, b.name]}
    for name in ("params", "flops", "activation_memory"):
        found[name] = [_cost(graph, name) for graph in graphs]
    if runs:
        inputs = [_inputs(one, graph) for one, graph in zip((a, b), graphs, strict=True)]
        found["seconds"] = [_seconds(graph, own) for graph, own in zip(graphs, inputs, strict=True)]
        if a.has_values and b.has_values:
            found["output_difference"] = _difference(graphs, inputs)
    return found


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
        return "outputs: not compared, their inputs or shapes differ"
    return f"outputs: differ by {difference:.3g} of the norm of the first"


def _cost(graph: torch.fx.GraphModule, name: str) -> int | None:
    try:
        return int(fxwidth.cost_polynomial(fxwidth.analyze(graph), name)({}))
    except fxwidth.FxwidthError:
        # Nothing is kept where nothing is trained, or where the graph does not train.
        return None


def _inputs(opened: Opened, graph: torch.fx.GraphModule) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what to call a model with: its example, or numbers of the shapes that the graph carries."""
    torch.manual_seed(0)
    if opened.inputs is None:
        nodes = [node for node in graph.graph.nodes if node.op == "placeholder" and "tensor_meta" in node.meta]
        return tuple(_like(node.meta["tensor_meta"]) for node in nodes), {}
    leaves, structure = pytree.tree_flatten(opened.inputs)
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


def _seconds(graph: torch.fx.GraphModule, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> float:
    args, kwargs = inputs
    with torch.no_grad():
        timer = Timer("graph(*args, **kwargs)", globals={"graph": graph, "args": args, "kwargs": kwargs})
        return float(timer.blocked_autorange(min_run_time=_SECONDS).median)


def _difference(
    graphs: list[torch.fx.GraphModule], inputs: list[tuple[tuple[Any, ...], dict[str, Any]]]
) -> float | None:
    shapes = [[getattr(leaf, "shape", leaf) for leaf in pytree.tree_leaves(own)] for own in inputs]
    if shapes[0] != shapes[1]:
        return None
    with torch.no_grad():
        answers = [pytree.tree_leaves(graph(*own[0], **own[1])) for graph, own in zip(graphs, inputs, strict=True)]
    tensors = [[leaf for leaf in own if isinstance(leaf, torch.Tensor)] for own in answers]
    if [tensor.shape for tensor in tensors[0]] != [tensor.shape for tensor in tensors[1]]:
        return None
    first, second = (torch.cat([tensor.double().flatten() for tensor in own]) for own in tensors)
    return float((first - second).norm() / first.norm().clamp(min=torch.finfo(torch.float64).tiny))
