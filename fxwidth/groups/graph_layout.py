"""Where to draw the vertices of a directed graph: in rows by depth, with few crossings and straight lines.

Source: Sugiyama, Tagawa and Toda, Methods for visual understanding of hierarchical system structures, 1981: rows by
longest paths, long edges cut by points that take part in the ordering, barycentres for the order in a row.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx

Point = tuple[float, float]

_ORDER_SWEEPS, _PLACE_SWEEPS = 12, 40
_MOST_PLACED = 100_000  # points times sweeps: large drawings are less tidy
_GAP = 0.35
# How much an edge insists on being straight: between two points of a long edge, between two vertices, else.
_WEIGHTS = {2: 40.0, 0: 4.0, 1: 1.0}
_SPINE_WEIGHT = 400.0  # the longest path is a straight line


@dataclass(frozen=True)
class Layout:
    """Centres of the vertices, as (x, row), and for each edge the points that it passes on its way."""

    places: dict[Hashable, Point]
    bends: dict[tuple[Hashable, Hashable], list[Point]]


@dataclass(frozen=True)
class _Bend:
    """A point of a long edge in one of the rows that it crosses."""

    edge: tuple[Hashable, Hashable]
    row: int


def lay_out(graph: nx.DiGraph, widths: Mapping[Hashable, float]) -> Layout:
    """Place the vertices of an acyclic graph in rows.

    Args:
        graph: the graph.
        widths: how wide each vertex is, in the unit of the result's x.
    """
    if not graph:
        return Layout({}, {})
    rows = _rows(graph)
    paths = {edge: _path(edge, rows) for edge in graph.edges}
    fine = nx.DiGraph()
    fine.add_nodes_from(graph)
    for path in paths.values():
        fine.add_edges_from(nx.utils.pairwise(path))
    order = _ordered(fine, rows)
    x = _placed(fine, order, widths, set(nx.dag_longest_path(graph)))
    places = {vertex: (x[vertex], float(rows[vertex])) for vertex in graph}
    bends = {edge: [(x[point], float(point.row)) for point in path[1:-1]] for edge, path in paths.items()}
    return Layout(places, bends)


def _rows(graph: nx.DiGraph) -> dict[Any, int]:
    rows = {vertex: row for row, vertices in enumerate(nx.topological_generations(graph)) for vertex in vertices}
    for vertex in graph:
        if graph.in_degree(vertex) == 0 and graph.out_degree(vertex) > 0:
            # What is read late is drawn late.
            rows[vertex] = min(rows[reader] for reader in graph.successors(vertex)) - 1
    return rows


def _path(edge: tuple[Any, Any], rows: Mapping[Any, int]) -> list[Any]:
    first, last = edge
    return [first, *(_Bend(edge, row) for row in range(rows[first] + 1, rows[last])), last]


def _ordered(fine: nx.DiGraph, rows: Mapping[Any, int]) -> list[list[Any]]:
    order: list[list[Any]] = [[] for _ in range(1 + max(rows.values(), default=-1))]
    for vertex in fine:
        order[vertex.row if isinstance(vertex, _Bend) else rows[vertex]].append(vertex)
    places: dict[Any, float] = {}
    for row in order:
        places.update(_relative_places(row))

    def barycentre(vertex: Any, neighbours: Mapping[Any, Any]) -> float:
        near = [places[neighbour] for neighbour in neighbours]
        return sum(near) / len(near) if near else places[vertex]

    for sweep in range(_ORDER_SWEEPS):
        down = sweep % 2 == 0
        neighbours = fine.pred if down else fine.succ
        for row in order if down else reversed(order):
            keys = {vertex: barycentre(vertex, neighbours[vertex]) for vertex in row}
            row.sort(key=keys.__getitem__)
            places.update(_relative_places(row))
    return order


def _relative_places(row: Sequence[Any]) -> dict[Any, float]:
    return {vertex: (i + 0.5) / len(row) for i, vertex in enumerate(row)}


def _placed(
    fine: nx.DiGraph, order: Sequence[Sequence[Any]], widths: Mapping[Any, float], spine: Container[Any]
) -> dict[Any, float]:
    """Minimise the weighted squares of the edges' widths, row by row, without changing the order."""
    x: dict[Any, float] = {}
    for row in order:
        offsets = _offsets(row, widths)
        x.update({vertex: offset - offsets[-1] / 2 for vertex, offset in zip(row, offsets, strict=True)})
    pulls = {vertex: list(_pulls(fine, vertex)) for vertex in fine}
    for sweep in range(min(_PLACE_SWEEPS, max(10, _MOST_PLACED // len(pulls)))):
        for row in order if sweep % 2 == 0 else reversed(order):
            offsets = _offsets(row, widths)
            wanted = []
            for vertex, offset in zip(row, offsets, strict=True):
                weight = sum(own for _, own in pulls[vertex]) + _SPINE_WEIGHT * (vertex in spine)
                place = sum(x[near] * own for near, own in pulls[vertex]) / weight if weight else x[vertex]
                wanted.append((place - offset, weight or 1.0))
            for vertex, offset, place in zip(row, offsets, _rising(wanted), strict=True):
                x[vertex] = place + offset
    return x


def _offsets(row: Sequence[Any], widths: Mapping[Any, float]) -> list[float]:
    offsets = [0.0]
    for left, right in nx.utils.pairwise(row):
        offsets.append(offsets[-1] + (widths.get(left, 0.0) + widths.get(right, 0.0)) / 2 + _GAP)
    return offsets[: len(row)]


def _pulls(fine: nx.DiGraph, vertex: Any) -> Iterable[tuple[Any, float]]:
    for near in (*fine.predecessors(vertex), *fine.successors(vertex)):
        yield near, _WEIGHTS[isinstance(near, _Bend) + isinstance(vertex, _Bend)]


def _rising(wanted: Iterable[tuple[float, float]]) -> list[float]:
    """Return the values nearest to those wanted, in weighted squares, that nowhere fall (pool adjacent violators)."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in wanted:
        pool = (value, weight, 1)
        while pools and pools[-1][0] > pool[0]:
            before = pools.pop()
            weights = before[1] + pool[1]
            pool = ((before[0] * before[1] + pool[0] * pool[1]) / weights, weights, before[2] + pool[2])
        pools.append(pool)
    return [value for value, _, count in pools for _ in range(count)]
