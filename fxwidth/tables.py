"""Tables of text: what is printed, and what a notebook shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_NUMERIC = frozenset("0123456789.,%-+ ")
# The notebook's own colours are kept, light or dark: only what its sheet lacks is said.
_TEXT_CELL, _NUMBER_CELL = "text-align:left", "text-align:right"


@dataclass(frozen=True)
class Table:
    """Rows of text under headings, with lines above and below.

    Attributes:
        columns: the headings.
        rows: the cells, one for each column.
        above: lines before the table.
        below: lines after it.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    above: tuple[str, ...] = ()
    below: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the table in columns of spaces, without spaces at the ends of lines."""
        lines = [*self.above]
        if self.rows:
            cells = [self.columns, *self.rows]
            widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
            lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        return "\n".join(line.rstrip() for line in [*lines, *self.below])

    def _repr_html_(self) -> str:
        """Return the table as a piece of HTML."""
        parts = [f"<p>{escape(line)}</p>" for line in self.above]
        if self.rows:
            styles = [_NUMBER_CELL if self.is_numeric(i) else _TEXT_CELL for i in range(len(self.columns))]
            parts += ["<table><thead>", _row("th", self.columns, styles), "</thead><tbody>"]
            parts += [_row("td", row, styles) for row in self.rows]
            parts.append("</tbody></table>")
        return "\n".join([*parts, *(f"<p>{escape(line)}</p>" for line in self.below)])

    def is_numeric(self, column: int) -> bool:
        """Whether a column has numbers, or nothing, in every cell."""
        return all(_NUMERIC.issuperset(row[column]) for row in self.rows)


def _row(tag: str, cells: Sequence[str], styles: Sequence[str]) -> str:
    pairs = zip(cells, styles, strict=True)
    return "<tr>" + "".join(f'<{tag} style="{style}">{escape(cell)}</{tag}>' for cell, style in pairs) + "</tr>"
