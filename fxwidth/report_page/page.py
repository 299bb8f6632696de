"""The page, section by section."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from torch import fx

from fxwidth.costs.layers import cost
from fxwidth.costs.registry import cost_polynomial, cost_unit
from fxwidth.errors import FxwidthError
from fxwidth.group_spectra import GroupSpectrum, spectra_of_weights
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.flow_boxes import Colour, colours_of, folded_groups
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.recording.width_history import courses, resizes_of
from fxwidth.report_page.charts import course_chart, spectrum_chart
from fxwidth.report_page.elements import as_html, element, html_table
from fxwidth.report_page.flow_picture import flow_picture, hex_of
from fxwidth.report_page.style import STYLE
from fxwidth.rewriting.looks import looking_at
from fxwidth.statistics.moments import has_values
from fxwidth.tables import Table
from fxwidth.tracing.analyze import analyze_module
from fxwidth.version import __version__

_COSTS = ("params", "flops", "activation_memory")
# Groups beyond these are shown where they are asked for.
_OPEN = 24


def report_page(
    gm: fx.GraphModule, title: str, paragraphs: Sequence[str], spectra: Mapping[str, GroupSpectrum] | None
) -> str:
    """Return the page as text.

    Args:
        gm: the graph.
        title: what the page is of.
        paragraphs: what is told of each resize.
        spectra: those to show, such as of the graph before it was resized; None for those of the graph as it is.

    Raises:
        FxwidthError: the graph cannot be analysed.
    """
    graph, resizes = WidthGraph(analyze_module(gm)), resizes_of(gm)
    colours = colours_of(folded_groups(graph.free))
    shown = spectra if spectra is not None else _present_spectra(graph)
    sections = [
        _section("Cost", _costs(graph, resizes)),
        _section("Widths over time", _history(resizes, colours)),
        _section("Spectra", _spectra(shown, courses(resizes), graph, is_present=spectra is None)),
        _section("Groups", _groups(graph)),
        _section("Pinned groups", _pinned(graph)),
        _section("Flow", _flow(graph, colours)),
        _section("Layers", _layers(graph)),
        _section("What was done", [element("pre", text) for text in paragraphs] or [_faint("Nothing was resized.")]),
    ]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", STYLE),
    )
    told = f"{len(graph.groups)} channel groups, {len(graph.free)} of them free; resized {_times(len(resizes))}."
    foot = element("footer", _faint(f"Made by fxwidth {__version__}."))
    body = element("body", element("h1", title), _faint(told), *sections, foot)
    return f"<!DOCTYPE html>\n{as_html(element('html', head, body, lang='en'))}\n"


def _times(count: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(count, f"{count} times")


def _section(title: str, parts: Sequence[Element]) -> Element:
    return element("section", element("h2", title), *parts)


def _faint(text: str) -> Element:
    return element("p", text, class_="faint")


def _costs(graph: WidthGraph, resizes: Sequence[Mapping[str, Any]]) -> list[Element]:
    """Return a table of what the graph costs, and of what it cost before all resizes, where that can be known."""
    before = _first_widths(graph, resizes)
    noted = {} if before is not None else _noted_costs(resizes)
    rows = []
    for name in _COSTS:
        try:
            polynomial = cost_polynomial(graph, name)
        except FxwidthError:
            # Nothing is kept where nothing is trained, or where the graph does not train.
            continue
        now = round(polynomial({}))
        first = noted.get(name) if before is None else round(polynomial(before))
        share = f"{now / first:.1%}" if first else ""
        label = cost_unit(name) if name != "activation_memory" else "bytes kept for backward"
        rows.append((label, "" if first is None else f"{first:,}", f"{now:,}", share))
    table = html_table(("", "before", "now", "share"), rows, numeric=(1, 2, 3))
    is_known = before is not None or len(noted) == len(rows)
    return [table] if is_known else [table, _faint("What else it cost before the resizes cannot be told any more.")]


def _noted_costs(resizes: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return what the first resize has noted of the costs before it."""
    first = resizes[0]
    flops = first.get("flops")
    return {"params": first["parameters"][0]} | ({} if flops is None else {"flops": flops[0]})


def _first_widths(graph: WidthGraph, resizes: Sequence[Mapping[str, Any]]) -> dict[Any, int] | None:
    """Return the widths before all resizes by factor, or None where groups are others by now."""
    first = {name: widths[0] for name, widths in courses(resizes).items()}
    if not all(name in graph for name in first):
        return None
    by_factor = {graph[name].factor: width for name, width in first.items()}
    is_same = not resizes or round(cost_polynomial(graph, "params")(by_factor)) == resizes[0]["parameters"][0]
    return by_factor if is_same else None


def _history(resizes: Sequence[Mapping[str, Any]], colours: Mapping[ChannelGroup, Colour]) -> list[Element]:
    if not resizes:
        return [_faint("Nothing was resized.")]
    found = courses(resizes)
    counts = [resizes[0]["parameters"][0], *(record["parameters"][1] for record in resizes)]
    by_name = {group.name: hex_of(colour) for group, colour in colours.items()}
    charts = [
        element("figure", course_chart({"parameters": counts}, {}, "parameters"), element("figcaption", "parameters")),
        element("figure", course_chart(found, by_name, "widths"), element("figcaption", "widths of the groups")),
    ]
    columns = ("group", "first", *(str(number) for number in range(1, len(resizes) + 1)))
    rows = [(name, *map(str, widths)) for name, widths in found.items()]
    table = html_table(columns, rows, numeric=range(1, len(columns)))
    return [
        element("div", *charts, class_="grid wide"),
        element("details", element("summary", "all of them in a table"), table),
    ]


def _present_spectra(graph: WidthGraph) -> Mapping[str, GroupSpectrum]:
    if not has_values(graph.analysis):
        return {}
    return looking_at(graph.analysis.module, lambda: spectra_of_weights(graph, graph.free))


def _spectra(
    spectra: Mapping[str, GroupSpectrum], history: Mapping[str, Sequence[int]], graph: WidthGraph, *, is_present: bool
) -> list[Element]:
    known = {name: found for name, found in spectra.items() if found.singular_values}
    if not known:
        return [_faint("There are no values to take spectra of.")]
    what = (
        "as they are now; what resizes have removed is shaded"
        if is_present
        else "as they were given; what is gone is shaded"
    )
    told = _faint(
        f"Singular values of the weights that write each group, {what}. The solid line is the cut, the dashed one how "
        "many are worth keeping by the rule of Gavish and Donoho."
    )
    figures = [_spectrum(name, found, history.get(name), graph) for name, found in known.items()]
    grids = [element("div", *figures[:_OPEN], class_="grid")]
    if figures[_OPEN:]:
        rest = element("div", *figures[_OPEN:], class_="grid")
        grids.append(element("details", element("summary", f"{len(figures) - _OPEN} more"), rest))
    return [told, *grids]


def _spectrum(name: str, found: GroupSpectrum, course: Sequence[int] | None, graph: WidthGraph) -> Element:
    now = graph[name].width if name in graph else found.width
    first = max(course[0] if course else now, found.width)
    widths = f"{first} → {now}" if first != now else str(now)
    rank = "" if found.effective_rank is None else f", effective rank {found.effective_rank:.1f}"
    told = f"{name}: {widths} channels{rank}"
    values = found.singular_values or ()
    cut = now if now < first else None
    chart = spectrum_chart(values, first, cut, found.gavish_donoho_rank, told)
    return element("figure", chart, element("figcaption", element("b", name), f" {widths}{rank}"))


def _groups(graph: WidthGraph) -> list[Element]:
    table = graph.table()
    parts = [_named(name, names, cells) for name, cells, names in graph.folded_rows()]
    return [html_table(table.columns, parts, numeric=(1, 3, 4)), *map(_faint, table.below)]


def _named(name: str, names: Sequence[str], cells: Sequence[str]) -> list[Element | str]:
    """Return a row of groups that are alike, whose names are all there to be looked at."""
    if len(names) == 1:
        return [name, *cells]
    summary = element("summary", f"{name} ({len(names)})")
    return [element("details", summary, *(element("div", one) for one in names)), *cells]


def _pinned(graph: WidthGraph) -> list[Element]:
    rows = [
        _named(name, names, (str(graph[names[0]].width), str(graph[names[0]].pinned)))
        for name, _, names in graph.folded_rows()
        if graph[names[0]].pinned
    ]
    if not rows:
        return [_faint("All groups are free.")]
    return [html_table(("group", "width", "why it keeps its width"), rows, numeric=(1,))]


def _flow(graph: WidthGraph, colours: Mapping[ChannelGroup, Colour]) -> list[Element]:
    told = _faint(
        "Data go down; a box has the colours of the groups that it carries, and is grey where all widths are pinned; "
        "a bar at its lower end has those of the groups inside of it. Repeated blocks are drawn once."
    )
    legend = element("ul", *_legend(graph, colours), class_="legend")
    return [told, element("div", flow_picture(graph, colours), class_="scroll"), legend]


def _legend(graph: WidthGraph, colours: Mapping[ChannelGroup, Colour]) -> Iterator[Element]:
    for name, groups in folded_groups(graph.free):
        swatch = element("span", class_="swatch", style=f"background: {hex_of(colours[groups[0]])}")
        yield element("li", swatch, f"{name}  {groups[0].width}", title=", ".join(group.name for group in groups))


def _layers(graph: WidthGraph) -> list[Element]:
    table: Table = cost(graph).table(folds=True)
    numeric = [place for place in range(len(table.columns)) if table.is_numeric(place)]
    return [html_table(table.columns, table.rows, numeric=numeric)]
