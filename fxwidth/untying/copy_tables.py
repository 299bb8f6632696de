"""What a run of moving nodes does with channels, found by letting it move the positions themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxwidth.analysis.result import Analysis
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.recording.channel_copies import NOTHING, copied_channels
from fxwidth.runtime.contexts import evaluating, quiet
from fxwidth.untying.moving_nodes import Moving

# Positions are counted from here on, twice: what is filled in is zero in both, or no zero.
_FIRST = (1, 2**40 + 7)


@dataclass(frozen=True)
class CopyTable:
    """A node whose value is that of another with the entries of one dim copied to other places.

    Attributes:
        source: the other node.
        node: the node.
        dim: the dim.
        table: which entry each entry of the result is, `NOTHING` for zeros.
        between: the nodes that do it, the last one included.
    """

    source: fx.Node
    node: fx.Node
    dim: int
    table: tuple[int, ...]
    between: frozenset[fx.Node]


def copy_tables(analysis: Analysis, moving: Moving, node: fx.Node) -> Iterator[CopyTable]:
    """Yield as what copies a moving node can be taken: of sources from the furthest on, each dim by which that goes."""
    for source in _sources(analysis, moving, node):
        runs = [_PositionRun(analysis, moving, source, larger, first) for larger in (False, True) for first in _FIRST]
        results = [run.of(node) for run in runs]
        if any(result is None or result.dtype != torch.int64 for result in results):
            continue
        for dim in range(analysis.node_values[source.name].dim()):
            tables = {_table(run.positions, result, run.first, dim) for run, result in zip(runs, results, strict=True)}
            if len(tables) == 1 and (table := tables.pop()) is not None:
                yield CopyTable(source, node, dim, table, frozenset(runs[0].moved))


def _sources(analysis: Analysis, moving: Moving, node: fx.Node) -> list[fx.Node]:
    """Return the nodes that a moving node may be a copy of, in the order of the graph."""
    found, waiting = set[fx.Node](), [node]
    while waiting:
        for before in waiting.pop().all_input_nodes:
            if before in found or before in moving.constants:
                continue
            if isinstance(analysis.node_values.get(before.name), Tensor):
                found.add(before)
            if before in moving.nodes:
                waiting.append(before)
    return [one for one in analysis.module.graph.nodes if one in found]


class _PositionRun:
    """Runs moving nodes on the positions of a source: integers from `first` on, row by row.

    Of tensors that do not come from the source alone the shapes are known, so that sizes can be read from them.
    """

    def __init__(self, analysis: Analysis, moving: Moving, source: fx.Node, larger_batch: bool, first: int) -> None:
        self._analysis = analysis
        self._moving = moving
        maps = IndexMaps(analysis.space, {})
        self._maps = maps.with_larger_batch() if larger_batch else maps
        shape = self._shapes(source)[0]
        self.first = first
        self.positions = torch.arange(first, first + prod(shape), device="cpu").reshape(shape)
        self._values: dict[fx.Node, Any] = {source: self.positions}
        self.moved: list[fx.Node] = []

    def of(self, node: fx.Node) -> Tensor | None:
        """Return the positions that a node's entries have come from; None where that cannot be told."""
        try:
            with torch.no_grad(), quiet(), evaluating(self._analysis.module):
                result = self._value(node)
        except Exception:
            # Other tensors among the operands, kernels that want other dtypes, sizes that are written in.
            return None
        return result if isinstance(result, Tensor) and not result.is_meta else None

    def _shapes(self, node: fx.Node) -> list[tuple[int, ...]]:
        return [tuple(map(self._maps.size, axes)) for axes in self._analysis.node_axes[node.name]]

    def _value(self, node: fx.Node) -> Any:
        if node not in self._values:
            self._values[node] = self._run(node)
        return self._values[node]

    def _run(self, node: fx.Node) -> Any:
        known = self._analysis.node_values.get(node.name)
        has_tensors = any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(known))
        if has_tensors and node not in self._moving.nodes and node not in self._moving.constants:
            shapes = iter(self._shapes(node))
            return pytree.tree_map(
                lambda leaf: torch.empty(next(shapes), device="meta") if isinstance(leaf, Tensor) else leaf, known
            )
        if node.op == "placeholder":
            return known
        module = self._analysis.module
        if node.op == "get_attr":
            found = fx.Interpreter(module).fetch_attr(str(node.target))
            return found.detach().to("cpu") if isinstance(found, Tensor) else found
        args: Any = fx.node.map_arg(node.args, self._value)
        kwargs: Any = fx.node.map_arg(node.kwargs, self._value)
        if node in self._moving.nodes:
            self.moved.append(node)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": "cpu"}
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        target: Any = module.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        return target(*args, **kwargs)


def _table(positions: Tensor, result: Tensor | None, first: int, dim: int) -> tuple[int, ...] | None:
    """Return which entries of a dim a result consists of, if all other dims are as they were."""
    if result is None or result.dim() != positions.dim() or result.numel() == 0:
        return None
    if [n for k, n in enumerate(result.shape) if k != dim] != [n for k, n in enumerate(positions.shape) if k != dim]:
        return None
    line = result.movedim(dim, 0).flatten(1)[:, 0] if result.dim() > 1 else result
    step = prod(positions.shape[dim + 1 :])
    table = [NOTHING if found == 0 else (found - first) // step for found in line.tolist()]
    if any(not NOTHING <= source < positions.shape[dim] for source in table):
        return None
    return tuple(table) if torch.equal(copied_channels(positions, table, dim), result) else None
