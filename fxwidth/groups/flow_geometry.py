"""How large boxes are and where they stand, in inches, in whatever form they are drawn."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import networkx as nx

from fxwidth.groups.flow_boxes import Box, Colour
from fxwidth.groups.graph_layout import Layout, Point

# A row, a box in it, the bar of the groups inside of that, and a letter of its title.
_PITCH, HEIGHT, BAR, LETTER = 0.66, 0.36, 0.05, 0.072
_PADDING = 0.26
GREY: Colour = (0.87, 0.88, 0.89)


def box_width(box: Box) -> float:
    """Return how wide a box is for its texts, in inches."""
    return max(len(box.shown) * LETTER, len(box.subtitle) * LETTER * 0.84) + _PADDING


def centre_of(place: Point) -> Point:
    """Return where the middle of a box is that is laid out at a place, as (x, row)."""
    return place[0], place[1] * _PITCH + HEIGHT / 2


def extent(flow: nx.DiGraph, layout: Layout) -> tuple[float, float, float]:
    """Return the left, the right and the lower end of what is drawn."""
    sides = [(layout.places[vertex][0], box_width(flow.nodes[vertex]["box"]) / 2) for vertex in flow]
    sides += [(x, 0.0) for bends in layout.bends.values() for x, _ in bends]
    last = max((row for _, row in layout.places.values()), default=0.0)
    left, right = min(x - half for x, half in sides), max(x + half for x, half in sides)
    return left, right, last * _PITCH + HEIGHT


def arrow_stops(layout: Layout, first: Hashable, last: Hashable) -> Iterator[Point]:
    """Yield the points of an edge: down from a box, straight past the rows that it crosses, down to a box."""
    x, y = centre_of(layout.places[first])
    yield x, y + HEIGHT / 2
    for bend in layout.bends[first, last]:
        x, y = centre_of(bend)
        yield x, y - HEIGHT / 2
        yield x, y + HEIGHT / 2
    x, y = centre_of(layout.places[last])
    yield x, y - HEIGHT / 2
