"""A picture of a graph: the flow of data from top to bottom, each box in the colours of the groups that it carries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import networkx as nx

from fxwidth.analysis.result import Analysis
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.flow_boxes import Box, Colour, colours_of, darker, flow_of, folded_flow, folded_groups
from fxwidth.groups.flow_geometry import BAR, GREY, HEIGHT, LETTER, arrow_stops, box_width, centre_of, extent
from fxwidth.groups.graph_layout import Layout, Point, lay_out
from fxwidth.matplotlib_figures import figure_class, refuse_other_pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# All lengths are in inches.
_MARGIN = 0.35
_ENTRY, _LEGEND_ENTRIES = 0.24, 60
_DPI, _MOST_PIXELS = 144, 2**15
_INK, _FAINT = (0.13, 0.14, 0.17), (0.42, 0.44, 0.48)


def draw(analysis: Analysis, groups: Sequence[ChannelGroup], path: str | Path) -> None:
    """Draw a graph's channel groups to an SVG or PNG file, by the suffix of `path`.

    Boxes are nodes, or runs of nodes that hand on the same channels; arrows point down. A box has the colours of the
    free groups that its tensors carry, and is grey where all widths are pinned; a bar at its lower end has those of the
    groups inside of it. Repeated blocks that are alike are drawn once.

    Raises:
        FxwidthError: the suffix is another, the folder does not exist, or matplotlib is not installed.
    """
    path = Path(path)
    refuse_other_pictures(path, "groups", (".svg", ".png"))
    new_figure = figure_class()
    from matplotlib import rc_context

    free = [group for group in groups if group.pinned is None]
    flow = folded_flow(flow_of(analysis, free))
    layout = lay_out(flow, {vertex: box_width(flow.nodes[vertex]["box"]) for vertex in flow})
    shown = folded_groups(free)
    colours = colours_of(shown)
    entries = _legend(groups, shown, colours)
    left, right, bottom = extent(flow, layout)
    legend_width = max(len(text) for _, text in entries) * LETTER + 0.6
    height = max(bottom, len(entries) * _ENTRY) + 2 * _MARGIN
    width = right - left + legend_width + 3 * _MARGIN
    # The texts of an SVG stay texts: they can be searched.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fxwidth", "font.family": "DejaVu Sans"}):
        figure = new_figure(figsize=(width, height))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(left - _MARGIN, left - _MARGIN + width)
        axes.set_ylim(height - _MARGIN, -_MARGIN)
        _draw_edges(axes, flow, layout, colours)
        for vertex in flow:
            _draw_box(axes, centre_of(layout.places[vertex]), flow.nodes[vertex]["box"], colours)
        _draw_legend(axes, right + _MARGIN, entries)
        dpi = min(_DPI, _MOST_PIXELS / max(width, height))
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
        figure.savefig(path, format=path.suffix[1:].lower(), dpi=dpi, facecolor="white", metadata=metadata)


# -- what is drawn -----------------------------------------------------------------------------------------------------


def _legend(
    groups: Sequence[ChannelGroup],
    shown: Sequence[tuple[str, tuple[ChannelGroup, ...]]],
    colours: Mapping[ChannelGroup, Colour],
) -> list[tuple[Colour | None, str]]:
    title = f"{len(colours)} free groups of {len(groups)}, with their widths"
    entries: list[tuple[Colour | None, str]] = [(None, title)]
    entries += [(colours[own[0]], f"{name}  {own[0].width}") for name, own in shown[:_LEGEND_ENTRIES]]
    if len(shown) > _LEGEND_ENTRIES:
        entries.append((None, f"and {len(shown) - _LEGEND_ENTRIES} more"))
    return [*entries, (GREY, "pinned")]


# -- drawing -----------------------------------------------------------------------------------------------------------


def _draw_box(axes: Axes, centre: Point, box: Box, colours: Mapping[ChannelGroup, Colour]) -> None:
    from matplotlib.patches import FancyBboxPatch, Rectangle

    width = box_width(box)
    left, top = centre[0] - width / 2, centre[1] - HEIGHT / 2
    fills = [colours[group] for group in box.groups] or [GREY]
    style = "round,pad=0,rounding_size=0.09"
    edge = darker(fills[0] if len(fills) == 1 else GREY)
    shape = FancyBboxPatch((left, top), width, HEIGHT, boxstyle=style, facecolor="none", edgecolor=edge)
    shape.set(linewidth=1.0, zorder=4)
    rows = [(fills, top, HEIGHT)]
    if box.inner:
        rows.append(([colours[group] for group in box.inner], top + HEIGHT - BAR, BAR))
    for row, upper, height in rows:
        stripe = width / len(row)
        for i, fill in enumerate(row):
            part = Rectangle((left + i * stripe, upper), stripe, height, facecolor=fill, edgecolor="none", zorder=3)
            axes.add_patch(part).set_gid(f"{box.title} at {upper:.2f}, {i}")
            part.set_clip_path(shape.get_path(), shape.get_transform() + axes.transData)
    axes.add_patch(shape)
    lift = 0.075 if box.subtitle else 0.0
    axes.text(centre[0], centre[1] - lift, box.shown, fontsize=8, color=_INK, ha="center", va="center", zorder=5)
    if box.subtitle:
        place = centre[0], centre[1] + 0.09
        axes.text(*place, box.subtitle, fontsize=6.2, color=darker(_FAINT), ha="center", va="center", zorder=5)


def _draw_edges(axes: Axes, flow: nx.DiGraph, layout: Layout, colours: Mapping[ChannelGroup, Colour]) -> None:
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Line

    for first, last in flow.edges:
        points = list(arrow_stops(layout, first, last))
        vertices, codes = [points[0]], [Line.MOVETO]
        for (x, y), (to_x, to_y) in nx.utils.pairwise(points):
            middle = (y + to_y) / 2
            vertices += [(x, middle), (to_x, middle), (to_x, to_y)]
            codes += [Line.CURVE4] * 3
        groups = flow.nodes[first]["box"].groups
        colour = darker(colours[groups[0]] if groups else GREY)
        line = Line(vertices, codes)
        axes.add_patch(
            FancyArrowPatch(
                path=line, arrowstyle="-|>,head_length=3,head_width=1.7", color=colour, linewidth=1.2, zorder=2
            )
        )


def _draw_legend(axes: Axes, left: float, entries: Sequence[tuple[Colour | None, str]]) -> None:
    from matplotlib.patches import FancyBboxPatch

    for i, (colour, text) in enumerate(entries):
        middle = i * _ENTRY + _ENTRY / 2
        if colour is not None:
            style = "round,pad=0,rounding_size=0.04"
            swatch = FancyBboxPatch((left, middle - 0.07), 0.22, 0.14, boxstyle=style, facecolor=colour)
            swatch.set(edgecolor=darker(colour), linewidth=0.8)
            axes.add_patch(swatch)
        place = left + (0.32 if colour is not None else 0.0)
        axes.text(place, middle, text, fontsize=8, color=_INK if colour is not None else _FAINT, va="center")
