"""A picture of a graph: the flow of data from top to bottom, each box in the colours of the groups that it carries."""

from __future__ import annotations

import colorsys
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import networkx as nx
from torch import fx

from fxwidth.analysis.result import Analysis
from fxwidth.axes.factors import Factor
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.graph_layout import Layout, Point, lay_out
from fxwidth.matplotlib_figures import figure_class, refuse_other_pictures
from fxwidth.recording.tape import Axes as TensorAxes
from fxwidth.runtime.pytrees import deep_tensors

if TYPE_CHECKING:
    from matplotlib.axes import Axes


Colour = tuple[float, float, float]

# All lengths are in inches.
_PITCH, _HEIGHT, _MARGIN = 0.66, 0.36, 0.35
_LETTER, _PADDING = 0.072, 0.26
_ENTRY, _LEGEND_ENTRIES = 0.24, 60
_DPI, _MOST_PIXELS = 144, 2**15
_INK, _FAINT, _GREY = (0.13, 0.14, 0.17), (0.42, 0.44, 0.48), (0.87, 0.88, 0.89)
_MOST_KINDS, _LONGEST = 4, 44
_BAR = 0.05


@dataclass(frozen=True)
class _Box:
    """Nodes in a row that carry the same groups: what is drawn as one."""

    title: str
    kinds: tuple[str, ...]
    groups: tuple[ChannelGroup, ...]
    inner: tuple[ChannelGroup, ...]

    @property
    def subtitle(self) -> str:
        if self.kinds == (self.title,):
            return ""
        told = list(self.kinds[:_MOST_KINDS]) + (["…"] if len(self.kinds) > _MOST_KINDS else [])
        return " · ".join(told)

    @property
    def width(self) -> float:
        return max(len(self.title) * _LETTER, len(self.subtitle) * _LETTER * 0.84) + _PADDING


def draw(analysis: Analysis, groups: Sequence[ChannelGroup], path: str | Path) -> None:
    """Draw a graph's channel groups to an SVG or PNG file, by the suffix of `path`.

    Boxes are nodes, or runs of nodes that hand on the same channels; arrows point down. A box has the colours of the
    free groups that its tensors carry, and is grey where all widths are pinned; a bar at its lower end has those of the
    groups inside of it.

    Raises:
        FxwidthError: the suffix is another, the folder does not exist, or matplotlib is not installed.
    """
    path = Path(path)
    refuse_other_pictures(path, "groups", (".svg", ".png"))
    new_figure = figure_class()
    from matplotlib import rc_context

    free = [group for group in groups if group.pinned is None]
    flow = _flow(analysis, free)
    layout = lay_out(flow, {vertex: flow.nodes[vertex]["box"].width for vertex in flow})
    colours = _colours(free)
    entries = _legend(len(groups), colours)
    left, right, bottom = _extent(flow, layout)
    legend_width = max(len(text) for _, text in entries) * _LETTER + 0.6
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
            _draw_box(axes, _centre(layout.places[vertex]), flow.nodes[vertex]["box"], colours)
        _draw_legend(axes, right + _MARGIN, entries)
        dpi = min(_DPI, _MOST_PIXELS / max(width, height))
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
        figure.savefig(path, format=path.suffix[1:].lower(), dpi=dpi, facecolor="white", metadata=metadata)


# -- what is drawn -----------------------------------------------------------------------------------------------------


def _flow(analysis: Analysis, free: Sequence[ChannelGroup]) -> nx.DiGraph:
    """Return the boxes and the flow of tensors between them."""
    by_factor = {group.factor: group for group in free}
    found = {node: _carried(analysis, node, by_factor) for node in analysis.module.graph.nodes}
    carried = {node: groups for node, groups in found.items() if groups is not None}
    sources = {node: [source for source in node.all_input_nodes if source in carried] for node in carried}
    readers: dict[fx.Node, list[fx.Node]] = {node: [] for node in carried}
    for node, own in sources.items():
        for source in own:
            readers[source].append(node)
    runs: dict[fx.Node, list[fx.Node]] = {}
    for node, own in sources.items():
        hands_on = len(own) == 1 and len(readers[own[0]]) == 1 and carried[own[0]] == carried[node]
        run = runs[own[0]] if hands_on and node.op != "output" and own[0].op != "placeholder" else []
        run.append(node)
        runs[node] = run
    flow = nx.DiGraph()
    for node, run in runs.items():
        if run[0] is node:
            kinds = tuple(_kind(analysis, part) for part in run)
            inner = [group for part in run for group in _inner(analysis, part, by_factor) if group not in carried[node]]
            flow.add_node(node, box=_Box(_title(node), kinds, carried[node], tuple(dict.fromkeys(inner))))
        flow.add_edges_from((runs[source][0], run[0]) for source in sources[node] if runs[source] is not run)
    return flow


def _carried(
    analysis: Analysis, node: fx.Node, by_factor: Mapping[Factor, ChannelGroup]
) -> tuple[ChannelGroup, ...] | None:
    """Return the free groups in a node's tensors, or None where the node is not drawn."""
    if node.op == "get_attr" or not deep_tensors(analysis.node_values.get(node.name)):
        return None
    return _groups_in(analysis, analysis.node_axes[node.name], by_factor)


def _inner(analysis: Analysis, node: fx.Node, by_factor: Mapping[Factor, ChannelGroup]) -> tuple[ChannelGroup, ...]:
    """Return the free groups in what the ops of a module make."""
    if node.op != "call_module":
        return ()
    made = (axes for call in analysis.calls_of(node.name) if call.contractions for axes in call.output_axes)
    return _groups_in(analysis, made, by_factor)


def _groups_in(
    analysis: Analysis, tensors: Iterable[TensorAxes], by_factor: Mapping[Factor, ChannelGroup]
) -> tuple[ChannelGroup, ...]:
    factors = (factor for axes in tensors for axis in axes for factor in analysis.space.factors(axis))
    return tuple(by_factor[factor] for factor in dict.fromkeys(factors) if factor in by_factor)


def _title(node: fx.Node) -> str:
    return _shortened(str(node.target) if node.op == "call_module" else node.name)


def _kind(analysis: Analysis, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(analysis.module.get_submodule(str(node.target))).__name__
    if node.op in ("placeholder", "output"):
        return {"placeholder": "input", "output": "output"}[node.op]
    return str(getattr(node.target, "__name__", node.target)).removesuffix(".default")


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"…{text[1 - _LONGEST :]}"


def _colours(groups: Sequence[ChannelGroup]) -> dict[ChannelGroup, Colour]:
    """Return a colour for each group; neighbours in the list, which are neighbours in the network, differ most."""
    golden = 0.6180339887
    result = {}
    for i, group in enumerate(groups):
        lightness, saturation = ((0.76, 0.74), (0.83, 0.66), (0.70, 0.50))[i % 3]
        result[group] = colorsys.hls_to_rgb((0.58 + i * golden) % 1.0, lightness, saturation)
    return result


def _legend(count: int, colours: Mapping[ChannelGroup, Colour]) -> list[tuple[Colour | None, str]]:
    title = f"{len(colours)} free groups of {count}, with their widths"
    entries: list[tuple[Colour | None, str]] = [(None, title)]
    entries += [(colour, f"{group.name}  {group.width}") for group, colour in colours.items()][:_LEGEND_ENTRIES]
    if len(colours) > _LEGEND_ENTRIES:
        entries.append((None, f"and {len(colours) - _LEGEND_ENTRIES} more"))
    return [*entries, (_GREY, "pinned")]


# -- drawing -----------------------------------------------------------------------------------------------------------


def _centre(place: Point) -> Point:
    return place[0], place[1] * _PITCH + _HEIGHT / 2


def _extent(flow: nx.DiGraph, layout: Layout) -> tuple[float, float, float]:
    """Return the left, the right and the lower end of what is drawn."""
    sides = [(layout.places[vertex][0], flow.nodes[vertex]["box"].width / 2) for vertex in flow]
    sides += [(x, 0.0) for bends in layout.bends.values() for x, _ in bends]
    last = max((row for _, row in layout.places.values()), default=0.0)
    left, right = min(x - half for x, half in sides), max(x + half for x, half in sides)
    return left, right, last * _PITCH + _HEIGHT


def _draw_box(axes: Axes, centre: Point, box: _Box, colours: Mapping[ChannelGroup, Colour]) -> None:
    from matplotlib.patches import FancyBboxPatch, Rectangle

    left, top = centre[0] - box.width / 2, centre[1] - _HEIGHT / 2
    fills = [colours[group] for group in box.groups] or [_GREY]
    style = "round,pad=0,rounding_size=0.09"
    edge = _darker(fills[0] if len(fills) == 1 else _GREY)
    shape = FancyBboxPatch((left, top), box.width, _HEIGHT, boxstyle=style, facecolor="none", edgecolor=edge)
    shape.set(linewidth=1.0, zorder=4)
    rows = [(fills, top, _HEIGHT)]
    if box.inner:
        rows.append(([colours[group] for group in box.inner], top + _HEIGHT - _BAR, _BAR))
    for row, upper, height in rows:
        stripe = box.width / len(row)
        for i, fill in enumerate(row):
            part = Rectangle((left + i * stripe, upper), stripe, height, facecolor=fill, edgecolor="none", zorder=3)
            axes.add_patch(part).set_gid(f"{box.title} at {upper:.2f}, {i}")
            part.set_clip_path(shape.get_path(), shape.get_transform() + axes.transData)
    axes.add_patch(shape)
    lift = 0.075 if box.subtitle else 0.0
    axes.text(centre[0], centre[1] - lift, box.title, fontsize=8, color=_INK, ha="center", va="center", zorder=5)
    if box.subtitle:
        place = centre[0], centre[1] + 0.09
        axes.text(*place, box.subtitle, fontsize=6.2, color=_darker(_FAINT), ha="center", va="center", zorder=5)


def _draw_edges(axes: Axes, flow: nx.DiGraph, layout: Layout, colours: Mapping[ChannelGroup, Colour]) -> None:
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Line

    for first, last in flow.edges:
        points = list(_stops(layout, first, last))
        vertices, codes = [points[0]], [Line.MOVETO]
        for (x, y), (to_x, to_y) in nx.utils.pairwise(points):
            middle = (y + to_y) / 2
            vertices += [(x, middle), (to_x, middle), (to_x, to_y)]
            codes += [Line.CURVE4] * 3
        groups = flow.nodes[first]["box"].groups
        colour = _darker(colours[groups[0]] if groups else _GREY)
        line = Line(vertices, codes)
        axes.add_patch(
            FancyArrowPatch(
                path=line, arrowstyle="-|>,head_length=3,head_width=1.7", color=colour, linewidth=1.2, zorder=2
            )
        )


def _stops(layout: Layout, first: Hashable, last: Hashable) -> Iterator[Point]:
    """Yield the points of an edge: down from a box, straight past the rows that it crosses, down to a box."""
    x, y = _centre(layout.places[first])
    yield x, y + _HEIGHT / 2
    for bend in layout.bends[first, last]:
        x, y = _centre(bend)
        yield x, y - _HEIGHT / 2
        yield x, y + _HEIGHT / 2
    x, y = _centre(layout.places[last])
    yield x, y - _HEIGHT / 2


def _draw_legend(axes: Axes, left: float, entries: Sequence[tuple[Colour | None, str]]) -> None:
    from matplotlib.patches import FancyBboxPatch

    for i, (colour, text) in enumerate(entries):
        middle = i * _ENTRY + _ENTRY / 2
        if colour is not None:
            style = "round,pad=0,rounding_size=0.04"
            swatch = FancyBboxPatch((left, middle - 0.07), 0.22, 0.14, boxstyle=style, facecolor=colour)
            swatch.set(edgecolor=_darker(colour), linewidth=0.8)
            axes.add_patch(swatch)
        place = left + (0.32 if colour is not None else 0.0)
        axes.text(place, middle, text, fontsize=8, color=_INK if colour is not None else _FAINT, va="center")


def _darker(colour: Colour) -> Colour:
    return colour[0] * 0.68, colour[1] * 0.68, colour[2] * 0.68
