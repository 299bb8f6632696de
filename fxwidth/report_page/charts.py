"""Small charts in SVG: the spectrum of a group with its cut, and widths over resizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.etree.ElementTree import Element

from fxwidth.report_page.elements import element

# As many points as a line needs to look as it is.
_POINTS = 120
_LABELS = 8
_WIDTH, _HEIGHT = 208.0, 96.0
_PAD = 4.0
_WIDE, _HIGH, _LEFT, _BELOW = 400.0, 200.0, 44.0, 22.0


def spectrum_chart(values: Sequence[float], count: int, cut: int | None, worth: int | None, told: str) -> Element:
    """Return the singular values of a group as a falling line.

    Args:
        values: the singular values, largest first.
        count: how many channels the horizontal axis has.
        cut: behind which of them there are none any more; None for no cut.
        worth: how many are told to be worth keeping, where that is known.
        told: the tooltip.
    """
    largest = max(values, default=0.0) or 1.0
    chosen = _thinned(len(values))
    points = [(_across(place + 0.5, count), _up(values[place] / largest)) for place in chosen]
    floor = _up(0.0)
    parts = [element("title", told)]
    if cut is not None and cut < count:
        x = _across(cut, count)
        parts.append(element("rect", x=x, y=0, width=_across(count, count) - x, height=_HEIGHT, class_="gone"))
    if points:
        outline = [(points[0][0], floor), *points, (points[-1][0], floor)]
        parts += [element("polygon", points=_listed(outline), class_="area")]
        parts += [element("polyline", points=_listed(points), class_="line")]
    for place, kind in ((worth, "worth"), (cut, "cut")):
        if place is not None:
            x = _across(place, count)
            parts.append(element("line", x1=x, x2=x, y1=0, y2=_HEIGHT, class_=kind))
    return element("svg", *parts, viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}", class_="chart", role="img")


def course_chart(lines: Mapping[str, Sequence[int]], colours: Mapping[str, str], told: str) -> Element:
    """Return what numbers were first and after each resize, on a logarithmic scale.

    Args:
        lines: the numbers, by name.
        colours: the colours of lines; those without get the page's.
        told: what the chart shows, for those who hear it.
    """
    every = [value for values in lines.values() for value in values]
    low, high = math.log(min(every)), math.log(max(every))
    last = max(len(values) for values in lines.values()) - 1
    span = (high - low) or 1.0

    def across(place: float) -> float:
        return _LEFT + (_WIDE - _LEFT - _PAD) * place / max(1, last)

    def up(value: float) -> float:
        return _PAD * 2 + (_HIGH - _BELOW - _PAD * 3) * (1 - (math.log(value) - low) / span)

    parts = [element("title", told)]
    for tick in _ticks(min(every), max(every)):
        parts.append(element("line", x1=_LEFT, x2=_WIDE, y1=up(tick), y2=up(tick), class_="rule"))
        parts.append(element("text", _short(tick), x=_LEFT - 6, y=up(tick) + 4, text_anchor="end", font_size=11))
    for place in _thinned(last + 1, _LABELS):
        anchor = "start" if place == 0 else "end" if place == last else "middle"
        label = "first" if place == 0 else str(place)
        parts.append(element("text", label, x=across(place), y=_HIGH - 6, text_anchor=anchor, font_size=11))
    for name, values in lines.items():
        stops = [(across(place), up(value)) for place, value in enumerate(values)]
        line = element("polyline", points=_listed(stops), class_="line")
        if name in colours:
            line.set("style", f"stroke: {colours[name]}")
        parts.append(element("g", element("title", f"{name}: {' → '.join(map(str, values))}"), line))
    return element("svg", *parts, viewBox=f"0 0 {_WIDE:g} {_HIGH:g}", class_="chart", role="img")


def _across(place: float, count: int) -> float:
    return _PAD + (_WIDTH - 2 * _PAD) * place / max(1, count)


def _up(share: float) -> float:
    return _PAD + (_HEIGHT - 2 * _PAD) * (1 - share)


def _thinned(count: int, most: int = _POINTS) -> list[int]:
    """Return places in a sequence: all of them, or some at nearly equal distances, the ends among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _ticks(low: int, high: int) -> list[int]:
    """Return round numbers between two, or these themselves where there are few."""
    digits = range(int(math.log10(low)), int(math.log10(high)) + 1)
    found = [factor * 10**digit for digit in digits for factor in (1, 2, 5) if low <= factor * 10**digit <= high]
    return found if 2 <= len(found) <= 8 else sorted({low, high})


def _short(number: int) -> str:
    """Return a number in three digits, as `11.7M`."""
    for unit, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{letter}"
    return str(number)


def _listed(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in points)
