"""A picture of a graph in SVG: repeated blocks once, with a tooltip for each box."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from xml.etree.ElementTree import Element

import networkx as nx

from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.flow_boxes import Box, Colour, darker, flow_of, folded_flow
from fxwidth.groups.flow_geometry import BAR, GREY, HEIGHT, arrow_stops, box_width, centre_of, extent
from fxwidth.groups.graph_layout import lay_out
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.report_page.elements import element

_SCALE = 96.0  # pixels an inch
_MARGIN = 0.15
# How many names a tooltip lists.
_SHOWN = 12


def flow_picture(width_graph: WidthGraph, colours: Mapping[ChannelGroup, Colour]) -> Element:
    """Return the picture of a graph, as wide as it is: what holds it is scrolled."""
    flow = folded_flow(flow_of(width_graph.analysis, width_graph.free))
    layout = lay_out(flow, {node: box_width(box) for node, box in flow.nodes(data="box")})
    left, right, bottom = extent(flow, layout)
    parts: list[Element] = []
    for source, reader in flow.edges:
        groups = flow.nodes[source]["box"].groups
        colour = hex_of(darker(colours[groups[0]] if groups else GREY))
        parts += _arrow(list(arrow_stops(layout, source, reader)), colour)
    parts += [_box(box, centre_of(layout.places[node]), colours) for node, box in flow.nodes(data="box")]
    width, height = (right - left + 2 * _MARGIN) * _SCALE, (bottom + 2 * _MARGIN) * _SCALE
    view = f"{(left - _MARGIN) * _SCALE:.1f} {-_MARGIN * _SCALE:.1f} {width:.1f} {height:.1f}"
    return element("svg", *parts, viewBox=view, width=round(width), height=round(height), class_="flow", role="img")


def hex_of(colour: Colour) -> str:
    """Return a colour as text."""
    return "#" + "".join(f"{round(255 * part):02x}" for part in colour)


def _arrow(points: Sequence[tuple[float, float]], colour: str) -> Iterator[Element]:
    steps = [f"M{points[0][0] * _SCALE:.1f},{points[0][1] * _SCALE:.1f}"]
    for (x, y), (to_x, to_y) in nx.utils.pairwise(points):
        middle = (y + to_y) / 2
        ends = ((x, middle), (to_x, middle), (to_x, to_y))
        steps.append("C" + " ".join(f"{a * _SCALE:.1f},{b * _SCALE:.1f}" for a, b in ends))
    yield element("path", d=" ".join(steps), fill="none", stroke=colour, stroke_width=1.4)
    # All of them come down to a box from above.
    x, y = points[-1][0] * _SCALE, points[-1][1] * _SCALE
    yield element("path", d=f"M{x:.1f},{y:.1f} l-3,-6 l6,0 z", fill=colour)


def _box(box: Box, middle: tuple[float, float], colours: Mapping[ChannelGroup, Colour]) -> Element:
    width, height = box_width(box) * _SCALE, HEIGHT * _SCALE
    x, y = middle[0] * _SCALE - width / 2, middle[1] * _SCALE - height / 2
    fills = [colours[group] for group in box.groups] or [GREY]
    edge = darker(fills[0] if len(fills) == 1 else GREY)
    parts = [element("title", "\n".join(_told(box)))]
    parts += _stripes(fills, x, y, width, height)
    parts += _stripes([colours[group] for group in box.inner], x, y + height - BAR * _SCALE, width, BAR * _SCALE)
    parts.append(element("rect", x=x, y=y, width=width, height=height, rx=3, fill="none", stroke=hex_of(edge)))
    lift = 3.0 if box.subtitle else -4.0
    parts.append(
        element("text", box.shown, x=x + width / 2, y=y + height / 2 - lift, text_anchor="middle", font_size=11)
    )
    if box.subtitle:
        place = {"x": x + width / 2, "y": y + height / 2 + 10.5}
        parts.append(element("text", box.subtitle, **place, text_anchor="middle", font_size=9, class_="kinds"))
    return element("g", *parts, class_="box")


def _stripes(fills: Sequence[Colour], x: float, y: float, width: float, height: float) -> Iterator[Element]:
    part = width / max(1, len(fills))
    for place, fill in enumerate(fills):
        rounding = 3 if len(fills) == 1 and height > BAR * _SCALE else None
        yield element("rect", x=x + place * part, y=y, width=part, height=height, fill=hex_of(fill), rx=rounding)


def _told(box: Box) -> Iterator[str]:
    yield box.title
    yield " · ".join(box.kinds)
    for label, groups in (("carries", box.groups), ("has inside", box.inner)):
        if groups:
            yield f"{label}: " + ", ".join(f"{group.name} ({group.width})" for group in groups)
    if not box.groups:
        yield "its widths are pinned"
    if box.count > 1:
        more = ", …" if len(box.nodes) > _SHOWN else ""
        yield f"stands for {box.count} blocks, of nodes {', '.join(box.nodes[:_SHOWN])}{more}"
