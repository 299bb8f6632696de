"""Figures of matplotlib, which is imported when one is made; without pyplot, which would keep them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fxwidth.errors import FxwidthError
from fxwidth.runtime.atomic_files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 120
# Of more lines a plot has no legend.
_MOST_IN_LEGEND = 16


def figure_class() -> type[Figure]:
    """Return matplotlib's class of figures.

    Raises:
        FxwidthError: matplotlib is not installed.
    """
    try:
        from matplotlib import figure
    except ImportError:
        raise FxwidthError("drawing needs matplotlib. Run pip install 'fxwidth[draw]'.") from None
    return figure.Figure


def new_axes(width: float = 6.4, height: float = 4.0) -> tuple[Figure, Axes]:
    """Return a figure of some inches with one pair of axes.

    Raises:
        FxwidthError: matplotlib is not installed.
    """
    figure = figure_class()(figsize=(width, height), layout="constrained")
    axes: Axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def name_lines(axes: Axes) -> None:
    """Give a plot a legend of its lines, unless they are too many to be told apart."""
    if len(axes.lines) <= _MOST_IN_LEGEND:
        axes.legend(fontsize="x-small")


def refuse_other_pictures(
    path: str | Path | None, what: str = "plots", suffixes: Sequence[str] = (".svg", ".png", ".pdf")
) -> None:
    """Check that a picture can be drawn to a path, if one is given.

    Raises:
        FxwidthError: the suffix is another, or the folder does not exist.
    """
    if path is None:
        return
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        names = [suffix[1:].upper() for suffix in suffixes]
        raise FxwidthError(
            f"{what} are drawn as {_either(names)}, not as {path.name!r}. End the path in {_either(suffixes)}."
        )
    if not path.parent.is_dir():
        raise FxwidthError(f"there is no folder {str(path.parent)!r} to draw {path.name!r} in. Make it first.")


def save_figure(figure: Figure, path: str | Path | None) -> Figure:
    """Write a figure to a file as a whole or not at all, if a path is given, and return it.

    Raises:
        FxwidthError: the file cannot be written.
    """
    if path is not None:
        with replacing(path) as beside:
            figure.savefig(beside, format=Path(path).suffix[1:].lower(), dpi=_DPI)
    return figure


def _either(names: Sequence[str]) -> str:
    *rest, last = names
    return f"{', '.join(rest)} or {last}"
