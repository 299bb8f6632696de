"""The page of a report: whole, self-contained, and readable in a narrow window."""

from __future__ import annotations

import copy
import pickle
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxwidth
from fxwidth import FxwidthError
from fxwidth.report_page.charts import course_chart, spectrum_chart
from fxwidth.report_page.elements import as_html, element, html_table
from fxwidth.report_page.style import STYLE

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
VOID = {"meta", "br", "hr", "img", "link", "input"}
SECTIONS = ["Cost", "Widths over time", "Spectra", "Groups", "Pinned groups", "Flow", "Layers", "What was done"]


ODD = "<b>&\"odd'</b>"


class Blocks(nn.Module):
    """Blocks around a stream, and a layer of any name."""

    def __init__(self, name: str = "last") -> None:
        super().__init__()
        self.stem = nn.Linear(4, 12)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 12)) for _ in range(3))
        self.name = name
        self.add_module(name, nn.Linear(12, 10))
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(getattr(self, self.name)(x).relu())


def traced(name: str = "last") -> fx.GraphModule:
    torch.manual_seed(0)
    return fxwidth.trace(Blocks(name), torch.randn(2, 4))


def resized() -> fx.GraphModule:
    gm = fxwidth.resize(traced(), {"blocks.1.0": 5})
    return fxwidth.resize(gm, {"stem": 9, "blocks.1.0": 3})


class Page(HTMLParser):
    """Reads a page, and complains of tags that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    @property
    def words(self) -> str:
        return "\n".join(text for tag, texts in self.texts.items() if tag != "style" for text in texts)


def page_of(gm: fx.GraphModule, folder: Path, **options: Any) -> tuple[Page, str]:
    path = fxwidth.report(gm).to_html(folder / "page.html", **options)
    text = path.read_text(encoding="utf-8")
    return Page(text), text


@pytest.mark.parametrize("make", [traced, resized])
def test_a_page_is_whole_and_needs_no_network(make: Callable[[], fx.GraphModule], tmp_path: Path) -> None:
    gm = make()
    page, text = page_of(gm, tmp_path)
    assert text.startswith("<!DOCTYPE html>")
    assert page.texts["h2"] == SECTIONS
    assert not re.search(r"https?:|//|url\(|@import|<script|\bsrc=|\bhref=", text)
    assert ("meta", "name", "viewport") in page.attributes
    assert page.texts["style"] == [STYLE]
    for rule in ("prefers-color-scheme: dark", "@media print"):
        assert rule in STYLE
    assert list(tmp_path.iterdir()) == [tmp_path / "page.html"]


def test_every_group_is_named_and_names_are_text(tmp_path: Path) -> None:
    gm = fxwidth.resize(traced(ODD), {ODD: 7})
    page, text = page_of(gm, tmp_path)
    graph = fxwidth.analyze(gm)
    assert ODD in {group.name for group in graph.groups}
    for group in graph.groups:
        assert group.name in page.words, group.name
        if group.pinned:
            assert group.pinned in page.words
    assert '<b>&"' not in text
    assert "odd'</b>" not in text


def test_repeated_blocks_are_folded_and_boxes_have_tooltips(tmp_path: Path) -> None:
    page, _ = page_of(traced(), tmp_path)
    assert "blocks.0..2.0 (3)" in page.texts["summary"]
    told = [text for text in page.texts["title"] if text.startswith("blocks.0..2.0\n")]
    assert len(told) == 1
    assert "carries: blocks.0.0 (8)" in told[0]
    assert "stands for 3 blocks" in told[0]


def test_costs_before_and_now_are_those_of_the_graphs(tmp_path: Path) -> None:
    whole, gm = traced(), resized()
    page, _ = page_of(gm, tmp_path)
    cells = page.texts["td"]
    for name, label in (("params", "parameters"), ("flops", "flops"), ("activation_memory", "bytes kept for backward")):
        before, now = (int(fxwidth.cost_polynomial(fxwidth.analyze(one), name)({})) for one in (whole, gm))
        place = cells.index(label)
        assert cells[place + 1 : place + 4] == [f"{before:,}", f"{now:,}", f"{now / before:.1%}"], name


def test_widths_over_time_are_those_of_the_history(tmp_path: Path) -> None:
    page, _ = page_of(resized(), tmp_path)
    assert {"stem: 12 → 12 → 9", "blocks.1.0: 8 → 5 → 3"} <= set(page.texts["title"])
    assert any(text.startswith("resize 2: ") for text in page.texts["pre"])
    page, _ = page_of(traced(), tmp_path)
    assert page.words.count("Nothing was resized.") == 2


def test_the_cut_is_where_the_width_is_now(tmp_path: Path) -> None:
    gm = traced()
    before = fxwidth.spectrum(fxwidth.analyze(gm), errors=False)
    gm = fxwidth.resize(gm, {"blocks.1.0": 2})
    for options in ({}, {"spectra": before}):
        page, text = page_of(gm, tmp_path, **options)
        (told,) = [one for one in page.texts["title"] if one.startswith("blocks.1.0: 8 → 2 channels")]
        chart = text[text.index(told) :].partition("</svg>")[0]
        cut = re.search(r'<line x1="([\d.]+)"[^>]*class="cut"', chart)
        points = re.search(r'<polyline points="([^"]*)"', chart)
        assert cut is not None
        assert points is not None
        across = [float(point.split(",")[0]) for point in points[1].split()]
        # The line goes on behind the cut where the values of then are given.
        assert len(across) == (8 if options else 2)
        assert sum(x < float(cut[1]) for x in across) == 2
        assert 'class="gone"' in chart


def test_a_graph_without_values_has_a_page_without_spectra(tmp_path: Path) -> None:
    with torch.device("meta"):
        gm = fxwidth.trace(Blocks(), torch.randn(2, 4))
    assert "There are no values to take spectra of." in page_of(gm, tmp_path)[0].words


def test_a_page_only_looks(tmp_path: Path) -> None:
    gm = resized()
    before, history = copy.deepcopy(gm.state_dict()), copy.deepcopy(fxwidth.report(gm).resizes)
    page_of(gm, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in gm.state_dict().items())
    assert fxwidth.report(gm).resizes == history


def test_a_report_is_kept_without_its_graph() -> None:
    report = fxwidth.report(resized())
    for again in (pickle.loads(pickle.dumps(report)), copy.deepcopy(report)):
        assert again == report
        assert again.graph is None
    assert report.graph is not None


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FxwidthError, match=r"this report has no graph to tell of; take the one that fxwidth\.report"):
        fxwidth.Report(()).to_html(tmp_path / "a.html")
    report = fxwidth.report(traced())
    with pytest.raises(FxwidthError, match=r"there is no folder .* to write a\.html to; make it first"):
        report.to_html(tmp_path / "none" / "a.html")
    with pytest.raises(FxwidthError, match=r"the path of a file is a text or a pathlib\.Path, but received int"):
        report.to_html(3)  # type: ignore[arg-type]
    for spectra in ({"stem": 3}, [1, 2], 5):
        with pytest.raises(FxwidthError, match=r"spectra= takes what fxwidth\.spectrum\(width_graph\) returns"):
            report.to_html(tmp_path / "a.html", spectra=spectra)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_page_that_cannot_be_made_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    report = fxwidth.report(traced())
    monkeypatch.setattr("fxwidth.report_page.page._layers", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.to_html(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_long_lines_are_thinned_and_ticks_are_round() -> None:
    chart = as_html(spectrum_chart([float(i) for i in range(5000, 0, -1)], 5000, 100, 7, "told"))
    points = re.search(r'<polyline points="([^"]*)"', chart)
    assert points is not None
    assert len(points[1].split()) == 120
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", as_html(course_chart({"a": [3, 700, 64]}, {}, "told")))
    assert texts == ["5", "10", "20", "50", "100", "200", "500", "first", "1", "2"]
    assert "11.7M" in as_html(course_chart({"a": [11_689_512, 11_000_000]}, {}, "told"))
    as_html(course_chart({"a": [1, 1]}, {}, "told"))


def test_elements_are_escaped() -> None:
    made = as_html(element("p", "1 < 2 & 3", None, element("b", "x"), "tail", class_="a", data_of='"', none=None))
    assert made == '<p class="a" data-of="&quot;">1 &lt; 2 &amp; 3<b>x</b>tail</p>'
    assert "<script>" not in as_html(html_table(["<script>"], [["<script>"]]))


def measured(text: str, width: int, folder: Path) -> tuple[list[int], str]:
    """Return how wide a window of a page is, how wide the page, and where its parts end, and what the console says."""
    # A window of its own has a least width; a frame has none.
    frame = as_html(element("iframe", id="page", style=f"width: {width}px; height: 900px; border: 0"))
    script = """<script>
      const frame = document.getElementById("page");
      frame.onload = () => {
        const page = frame.contentDocument.documentElement;
        const ends = [...page.querySelectorAll("section > *")].map(part => part.getBoundingClientRect().right);
        document.title = JSON.stringify([frame.contentWindow.innerWidth, page.scrollWidth, ...ends.map(Math.ceil)]);
      };
      frame.srcdoc = document.getElementById("text").content.textContent;
    </script>"""
    template = f'<template id="text">{as_html(element("p", text))[3:-4]}</template>'
    path = folder / "measured.html"
    path.write_text(f"<!DOCTYPE html><html><body>{frame}{template}{script}</body></html>", "utf-8")
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
        "--enable-logging=stderr", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = re.search(r"<title>\[([\d,]*)\]", done.stdout)
    assert found is not None, done.stdout[:500]
    return list(map(int, found[1].split(","))), "\n".join(line for line in done.stderr.split("\n") if "CONSOLE" in line)


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_it_without_errors_and_nothing_is_too_wide(width: int, tmp_path: Path) -> None:
    text = fxwidth.report(resized()).to_html(tmp_path / "page.html").read_text("utf-8")
    (inner, *others), said = measured(text, width, tmp_path)
    assert (inner, said) == (width, "")
    assert max(others) <= width
    # The check is not blind.
    wide = element("section", element("p", style=f"width: {width + 50}px"))
    broken = "<script>undefined_name()</script>"
    (_, *others), said = measured(text.replace("<footer>", f"{as_html(wide)}{broken}<footer>"), width, tmp_path)
    assert max(others) > width
    assert "undefined_name is not defined" in said
