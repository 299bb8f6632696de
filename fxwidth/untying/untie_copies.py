"""The rewrite: copies of channels become tables that follow the kept channels on both sides."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import Tensor, fx

from fxwidth.analysis.result import Analysis
from fxwidth.analysis.roles import find_roles
from fxwidth.axes.factors import Axis, Factor, find, nested_factors
from fxwidth.axes.pins import STRUCTURAL
from fxwidth.recording.channel_copies import NOTHING, copied_channels
from fxwidth.recording.graph_meta import (
    HISTORY,
    UNTIED,
    drop_notes_of_passes,
    note_original,
    notes_of,
    refuse_groups_of_one,
)
from fxwidth.recording.tape import storage_of
from fxwidth.rewriting.transaction import Transaction
from fxwidth.rules.family_table import is_move
from fxwidth.rules.op_families import Move
from fxwidth.runtime.pytrees import deep_tensors
from fxwidth.tracing.analyze import analyze_module, refuse_other_than_graph
from fxwidth.untying.copy_tables import CopyTable, copy_tables
from fxwidth.untying.moving_nodes import Moving, moving_nodes, reads_by_number


def untie_copies(gm: fx.GraphModule) -> fx.GraphModule:
    """Give streams that are joined only by copies of channels widths of their own, in place.

    Where channels are copied (repeat, tile, cat of a tensor with itself, a look-up by constant numbers, zeros beside
    them), all widths on both sides are tied together: a tile must go on to fit. Each such place becomes one call with a
    table of numbers, which computes the same. At a resize the table follows both sides: new channels read nothing, so
    that growth stays exact, and a copy whose source goes reads the kept channel that is nearest to it, or nothing.

    Parameters stay the same objects, so that an optimizer goes on. The model that was traced keeps its own code, and
    stays as it is when the graph is resized.

    Args:
        gm: a graph from `fxwidth.trace`, or any GraphModule that carries shapes; without such places it stays as it is.

    Raises:
        FxwidthError: no shapes are known, the graph does not run on them, or a group has been given width one, of which
            only the record of the graph as it is tells where its channels are.

    Example:
        >>> class Tiled(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b, self.c = torch.nn.Linear(4, 6), torch.nn.Linear(6, 12), torch.nn.Linear(12, 2)
        ...     def forward(self, x):
        ...         x = self.a(x)
        ...         return self.c(self.b(x) + x.repeat(1, 2))
        >>> gm = fxwidth.trace(Tiled(), torch.randn(2, 4))
        >>> [(group.name, group.width) for group in fxwidth.analyze(gm).free]
        [('a', 6), ('b#0', 2)]
        >>> gm = fxwidth.untie_copies(gm)
        >>> [(group.name, group.width) for group in fxwidth.analyze(gm).free]
        [('a', 6), ('b', 12)]
    """
    refuse_other_than_graph(gm)
    Transaction(gm).run(lambda: _untie(gm))
    return gm


def _untie(gm: fx.GraphModule) -> None:
    analysis = analyze_module(gm)
    refuse_groups_of_one(gm, "fxwidth.untie_copies")
    moving = moving_nodes(analysis)
    tables = list(_worthwhile(analysis, moving))
    if tables:
        _rewrite(gm, tables, _serving(analysis, moving, tables))


def _worthwhile(analysis: Analysis, moving: Moving) -> Iterator[CopyTable]:
    """Yield the copies to rewrite, from the last node to the first; nodes that nobody needs after that are left out."""
    channels = _channel_factors(analysis)
    needless, sources = set[fx.Node](), set[fx.Node]()
    for node in reversed(analysis.module.graph.nodes):
        is_tensor = node in moving.nodes and isinstance(analysis.node_values[node.name], Tensor)
        if not is_tensor or node.target is copied_channels:
            continue
        if node not in sources and node.users and needless.issuperset(node.users):
            needless.add(node)
            continue
        found = (one for one in copy_tables(analysis, moving, node) if _is_worthwhile(analysis, one, channels))
        if (copies := next(found, None)) is not None:
            needless.add(node)
            sources.add(copies.source)
            yield copies


def _is_worthwhile(analysis: Analysis, copies: CopyTable, channels: set[Factor]) -> bool:
    source, result = analysis.node_values[copies.source.name], analysis.node_values[copies.node.name]
    axes = analysis.node_axes[copies.source.name][0][copies.dim], analysis.node_axes[copies.node.name][0][copies.dim]
    # One entry that is shown several times has as many channels as it meets anyway; and zero is a number among others.
    if source.shape[copies.dim] == 1 or not (source.is_floating_point() or source.is_complex()):
        return False
    if source.dtype != result.dtype:
        return False  # a view of its bits
    if any(map(analysis.space.reaches_batch, axes)):
        return False
    if source in find_roles(analysis).provenance or channels.isdisjoint(f for axis in axes for f in _roots(axis)):
        return False
    calls = [call for node in copies.between for call in analysis.calls_of(node.name)]
    read = [one for one in copies.table if one != NOTHING]
    ties = len(set(read)) < len(copies.table) or any(
        is_move(call.func, Move.REPETITION) or reads_by_number(call) for call in calls
    )
    return ties and not _is_written_to(analysis, copies, source, result)


def _roots(axis: Axis) -> Iterator[Factor]:
    """Yield what an axis is made of in the end, pinned factors included."""
    for factor in nested_factors(axis):
        root = find(factor)
        if root.refined_to is None:
            yield root
        else:
            yield from _roots(root.refined_to)


def _channel_factors(analysis: Analysis) -> set[Factor]:
    """Return the factors of dims of parameters that hold channels."""
    origins = (origin for entry in analysis.parameters.values() for origin in entry.origins if origin is not None)
    leaves = {leaf for origin in origins for leaf in analysis.space.leaves(origin)}
    return {leaf for leaf in leaves if leaf.pinned is None or leaf.pinned.reason not in STRUCTURAL}


def _is_written_to(analysis: Analysis, copies: CopyTable, source: Tensor, result: Tensor) -> bool:
    """Tell whether the source, or what is between, is written to in place before the copy, or after it for a view."""
    order = {node: place for place, node in enumerate(analysis.module.graph.nodes)}
    made = [tensor for node in copies.between for tensor in deep_tensors(analysis.node_values[node.name])]
    memory = {storage_of(tensor) for tensor in (source, *made)}
    shared = storage_of(source) == storage_of(result)
    for node, place in order.items():
        if place <= order[copies.source] or (place > order[copies.node] and not shared):
            continue
        if memory & _written(analysis, node):
            return True
    return False


def _written(analysis: Analysis, node: fx.Node) -> set[int]:
    """Return the memory that a node writes to in place, in evaluation or in training."""
    calls = [*analysis.calls_of(node.name), *analysis.training_calls.get(node.name, ())]
    written = {storage_of(tensor) for call in calls if call.func._schema.is_mutable for tensor in call.outputs}
    module = analysis.module.get_submodule(str(node.target)) if node.op == "call_module" else None
    if getattr(module, "inplace", False) or node.kwargs.get("inplace"):
        taken = (analysis.node_values.get(one.name) for one in node.all_input_nodes)
        written |= {storage_of(tensor) for value in taken for tensor in deep_tensors(value)}
    return written


def _serving(analysis: Analysis, moving: Moving, tables: list[CopyTable]) -> set[fx.Node]:
    """Return the nodes that make the copies, and those of sizes and constants behind them."""
    found = set[fx.Node]().union(*(copies.between for copies in tables))
    waiting = list(found)
    while waiting:
        for before in waiting.pop().all_input_nodes:
            is_number = before.op != "placeholder" and not deep_tensors(analysis.node_values.get(before.name))
            if before not in found and (is_number or before in moving.constants):
                found.add(before)
                waiting.append(before)
    return found


def _rewrite(gm: fx.GraphModule, tables: list[CopyTable], serving: set[fx.Node]) -> None:
    graph = copy.deepcopy(gm.graph)
    by_name = {node.name: node for node in graph.nodes}
    for copies in tables:
        old, source = by_name[copies.node.name], by_name[copies.source.name]
        with graph.inserting_before(old):
            new = graph.call_function(copied_channels, (source, list(copies.table), copies.dim))
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new)
    for node in reversed(gm.graph.nodes):
        if node in serving and not by_name[node.name].users:
            graph.erase_node(by_name[node.name])
    graph.lint()
    note_original(gm)
    notes = notes_of(gm)
    gm.graph = graph
    notes |= {UNTIED: [*notes.get(UNTIED, ()), len(notes.get(HISTORY, ()))]}
    drop_notes_of_passes(notes)
