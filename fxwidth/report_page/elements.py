"""Elements of HTML and SVG, of which texts are escaped and tags closed by the serialiser."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from xml.etree.ElementTree import Element, tostring

Child = Element | str | None


def element(tag: str, *children: Child, **attributes: object) -> Element:
    """Return an element.

    Args:
        tag: its name.
        children: texts and elements in it; None for nothing.
        attributes: by names in which `_` stands for `-`, and one at the end for none; those that are None are left out.

    Example:
        >>> as_html(element("p", "1 < 2", element("b", "yes"), class_="a"))
        '<p class="a">1 &lt; 2<b>yes</b></p>'
    """
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    made = Element(tag, {names[name]: _text(value) for name, value in attributes.items() if value is not None})
    last: Element | None = None
    for child in children:
        if isinstance(child, Element):
            made.append(child)
            last = child
        elif child is not None and last is None:
            made.text = (made.text or "") + child
        elif child is not None and last is not None:
            last.tail = (last.tail or "") + child
    return made


def as_html(root: Element) -> str:
    """Return an element as text."""
    return tostring(root, encoding="unicode", method="html")


def html_table(columns: Sequence[str], rows: Iterable[Sequence[Child]], *, numeric: Iterable[int] = ()) -> Element:
    """Return a table that is scrolled where it is wider than the page.

    Args:
        columns: the headings.
        rows: the cells.
        numeric: the places of columns of numbers.
    """
    right = set(numeric)

    def row(tag: str, cells: Sequence[Child]) -> Element:
        made = [element(tag, cell, class_="number" if place in right else None) for place, cell in enumerate(cells)]
        return element("tr", *made)

    body = [row("td", cells) for cells in rows]
    return element(
        "div", element("table", element("thead", row("th", columns)), element("tbody", *body)), class_="scroll"
    )


def _text(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
