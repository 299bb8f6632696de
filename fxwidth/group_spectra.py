"""All that is known of the widths of a graph's groups, as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fxwidth.errors import FxwidthError
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph, refuse_other_than_groups
from fxwidth.importance.loss_sensitivity import calibrated
from fxwidth.matplotlib_figures import name_lines, new_axes, refuse_other_pictures, save_figure
from fxwidth.option_keywords import Chosen, Loss
from fxwidth.option_values import check_switches
from fxwidth.options import PlanOptions, refuse_loss_without_data
from fxwidth.planning.group_choice import chosen_groups
from fxwidth.rewriting.looks import looking_at
from fxwidth.selection.registry import Selection
from fxwidth.statistics.moments import has_values
from fxwidth.tables import Table
from fxwidth.weights.rank_estimates import effective_rank, gavish_donoho_rank, marchenko_pastur_rank, stable_rank
from fxwidth.weights.writer_spectra import singular_values, writer_columns
from fxwidth.work_progress import Progress, each, listening


@dataclass(frozen=True)
class GroupSpectrum:
    """The spectrum of a group's writers and what is predicted to be lost at each of its widths.

    Attributes:
        width: the number of channels.
        singular_values: of the stacked writers, largest first, one per channel; None where there are no values.
        effective_rank: exp of their entropy.
        stable_rank: their energy in units of the largest.
        gavish_donoho_rank: how many are worth keeping if the others are noise of unknown level.
        marchenko_pastur_rank: how many lie above all that noise could have.
        errors: the predicted error of every width from none to all; plans add them up over groups. In units of the
            loss where it was probed, else -log of the share of their outputs that readers keep, summed over readers.
        evidence: what the errors come from: "data", "noise", "weights", or None for the spectrum alone.
        is_calibrated: whether the errors are in units of the loss.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> found = fxwidth.spectrum(fxwidth.analyze(gm))["0"]
        >>> found.width, 1 <= found.stable_rank <= found.effective_rank <= 16
        (16, True)
    """

    width: int
    singular_values: tuple[float, ...] | None = field(repr=False)
    effective_rank: float | None
    stable_rank: float | None
    gavish_donoho_rank: int | None
    marchenko_pastur_rank: int | None
    errors: tuple[float, ...] = field(repr=False)
    evidence: str | None
    is_calibrated: bool

    def as_plain(self) -> dict[str, Any]:
        """Return the spectrum as a dict of numbers, lists and strings, fit for JSON."""
        return asdict(self)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the singular values, and how many of them are worth keeping.

        Args:
            path: a file to draw to: .svg, .png or .pdf.

        Returns:
            The figure, a `matplotlib.figure.Figure`.

        Raises:
            FxwidthError: there are no values, the path cannot be drawn to, or matplotlib is not installed.
        """
        refuse_other_pictures(path)
        if self.singular_values is None:
            raise FxwidthError("there are no singular values to draw: the weights of this group have no values.")
        figure, axes = new_axes()
        axes.plot(range(1, self.width + 1), self.singular_values)
        if self.gavish_donoho_rank is not None:
            axes.axvline(self.gavish_donoho_rank, color="0.4", linestyle="--", label="worth keeping")
            axes.legend()
        axes.set(xlabel="channel", ylabel="singular value")
        axes.set_ylim(bottom=0)
        return save_figure(figure, path)


class Spectra(dict[str, GroupSpectrum]):
    """The spectra of groups by their names; `print` it for a table.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> print(fxwidth.spectrum(fxwidth.analyze(gm)))  # doctest: +ELLIPSIS, +NORMALIZE_WHITESPACE
        group  width  effective rank  stable rank  worth keeping  error at 75 %  at 50 %  at 25 %
        0      16     ...
    """

    def __repr__(self) -> str:
        return f"<Spectra of {len(self)} groups>"

    def __str__(self) -> str:
        """Return a table with the ranks of each group, and the errors at three of its widths."""
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def table(self) -> Table:
        """Return a table with the ranks of each group, and the errors at three of its widths."""
        rows = [(name, *_cells(found)) for name, found in self.items()]
        sources = {found.evidence for found in self.values() if found.evidence}
        below = (f"errors predicted from {', '.join(sorted(sources))}",) if sources else ()
        return Table(_COLUMNS, tuple(rows), () if rows else ("no group is free",), below)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the singular values of all groups, each relative to its largest, over the share of its channels.

        Args:
            path: a file to draw to: .svg, .png or .pdf.

        Returns:
            The figure, a `matplotlib.figure.Figure`.

        Raises:
            FxwidthError: there are no values, the path cannot be drawn to, or matplotlib is not installed.
        """
        refuse_other_pictures(path)
        known = {name: values for name, found in self.items() if (values := found.singular_values) and values[0] > 0}
        if not known:
            raise FxwidthError("there are no singular values to draw: no group is free, or weights have no values.")
        figure, axes = new_axes()
        for name, values in known.items():
            count = len(values)
            shares = [(place + 1) / count for place in range(count)]
            axes.plot(shares, [value / values[0] for value in values], label=name, linewidth=1)
        axes.set(xlabel="share of the channels", ylabel="singular value, of the largest")
        axes.set_ylim(bottom=0)
        name_lines(axes)
        return save_figure(figure, path)


_SHARES = (0.75, 0.5, 0.25)
_COLUMNS = ("group", "width", "effective rank", "stable rank", "worth keeping", "error at 75 %", "at 50 %", "at 25 %")


def _cells(found: GroupSpectrum) -> Iterator[str]:
    yield str(found.width)
    for rank in (found.effective_rank, found.stable_rank):
        yield "" if rank is None else f"{rank:.1f}"
    yield "" if found.gavish_donoho_rank is None else str(found.gavish_donoho_rank)
    for share in _SHARES:
        yield f"{found.errors[round(share * found.width)]:.3g}" if found.errors else ""


def spectrum(
    width_graph: WidthGraph,
    *,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    selection: Selection = "greedy",
    only: Chosen | None = None,
    keep: Chosen | None = None,
    errors: bool = True,
    progress: Progress = True,
) -> Spectra:
    """Return the spectrum, the ranks and the width curve of every free group, by its name.

    Args:
        width_graph: the groups, from `fxwidth.analyze`.
        data: batches that begin with the graph's inputs, from which to see what readers see; without them, that is
            estimated from the weights and batch norm statistics.
        loss: called with the output and what follows the inputs in a batch; brings errors to the unit of the loss.
        selection: the method whose choices the errors are of, as for `fxwidth.plan`.
        only: names or patterns of the groups to look at, or modules, as for `fxwidth.plan`.
        keep: likewise of groups to leave out.
        errors: whether to predict what each width loses; without, which is fast, the spectra are those of the weights
            alone, and `errors` are empty.
        progress: whether to show in a terminal, or else to log, after a second, how far the work has come; or a
            function that is called with a `ProgressUpdate` each time. An exception of it ends the work as Ctrl-C does.

    Raises:
        FxwidthError: a pattern matches no group, there is no such method, or the data or the loss cannot be used.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> found = fxwidth.spectrum(fxwidth.analyze(gm))["0"]
        >>> len(found.singular_values), len(found.errors)
        (16, 17)
    """
    options = PlanOptions(data=data, selection=selection, only=only, keep=keep)
    refuse_loss_without_data(loss, data)
    check_switches({"errors": errors})
    if not errors and (data is not None or selection != "greedy"):
        raise FxwidthError("errors=False looks at the weights alone; leave out data=, loss= and selection=.")
    refuse_other_than_groups(width_graph)
    groups = chosen_groups(width_graph, options.only, options.keep)

    def look() -> Spectra:
        if not errors:
            return spectra_of_weights(width_graph, groups)
        evidence, curves = calibrated(width_graph, groups, data, loss, selection)
        found = {g.name: _of(width_graph, g, curves[g], evidence.source(g), loss is not None) for g in groups}
        return Spectra(found)

    return listening(progress, lambda: looking_at(width_graph.analysis.module, look))


def spectra_of_weights(width_graph: WidthGraph, groups: Sequence[ChannelGroup]) -> Spectra:
    """Return the spectra of some groups without errors of widths."""
    return Spectra({g.name: _of(width_graph, g, (), None, False) for g in each(groups, "looking at spectra")})


def _of(graph: WidthGraph, group: ChannelGroup, errors: Any, source: str | None, is_calibrated: bool) -> GroupSpectrum:
    columns = writer_columns(graph, group)
    curve = tuple(np.asarray(errors).tolist())
    if not columns or not has_values(graph.analysis):
        return GroupSpectrum(group.width, None, None, None, None, None, curve, source, is_calibrated)
    values = np.asarray(singular_values(graph, group).cpu().numpy(), dtype=np.float64)
    return GroupSpectrum(
        group.width,
        tuple(values.tolist()),
        effective_rank(values),
        stable_rank(values),
        gavish_donoho_rank(values, group.width, columns),
        marchenko_pastur_rank(values, group.width, columns),
        curve,
        source,
        is_calibrated,
    )
