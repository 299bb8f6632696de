"""What has been done to a graph, as text, table, plot and page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from fxwidth.errors import FxwidthError
from fxwidth.group_spectra import GroupSpectrum
from fxwidth.matplotlib_figures import name_lines, new_axes, refuse_other_pictures, save_figure
from fxwidth.recording.width_history import RESIZED, UNTOUCHED, WRITTEN_BACK, courses, resizes_of, resizes_written_back
from fxwidth.report_page.page import report_page
from fxwidth.runtime.atomic_files import path_of, replacing
from fxwidth.selection.registry import reads_moments
from fxwidth.tables import Table
from fxwidth.work_progress import Progress, listening

_UNKNOWN_FLOPS = "flops are left out where they are not known, as of resizes by earlier versions"


@dataclass(frozen=True)
class Report:
    """The resizes of a graph, oldest first; `print` it for a readable form.

    Attributes:
        resizes: one dict each: widths {group: [old, new]}, parameters [before, after], flops (those of a forward pass
            on the example inputs, their whole batch, [before, after]; None, or left out by earlier versions, where they
            are not known), evidence (what channels were chosen and readers refitted from: "data", "training", "data and
            noise" where data are few or show a part alone, "training and noise", "noise", "weights" or None), selection
            (the method; of a function its module and name), kept {group: the channels that stayed, by their positions
            of then; behind those grown channels lie}, of groups that kept their basis, rotated (the groups that were
            brought to another basis first, of which the first channels stayed), named (the groups whose channels the
            plan named), folded (whether readers were refitted), recalibrated (whether running statistics of batch norms
            were corrected; False where there are none), lowered (nodes replaced by ATen ops, with the reason), norms
            (by what gains' norms have their variances multiplied), outputs {dim of an output: [old size, new size]},
            where outputs were free, copies (what the channels of copies read since, -1 for nothing; see
            `fxwidth.untie_copies`), not_refitted (readers that lost channels without taking over what they read from
            them, products and reductions over channels, which have no weights to do so by, and gains and running
            statistics that keep their values, with the reason), original (what has become of the model that was traced:
            "resized", "untouched", "written back" to since, or None where there is none, or none any more that shares
            parameters; one that nobody holds any more is told of until Python has collected it), directions (the method
            by which new channels were made; None where none were), not_informed (the weights in which they are
            orthogonal to the others because the method's moments could not be taken there, with the reason),
            reader_step (the loss_before and loss_after on batches held out, and the length of the step in units of the
            present columns, 0 for none; None where none was asked for).
        graph: the graph, for `to_html`; copies and pickles of a report leave it out.

    Example:
        >>> fxwidth.Report(()).resizes
        ()
        >>> print(fxwidth.Report(()))
        nothing was resized
    """

    resizes: tuple[dict[str, Any], ...]
    graph: fx.GraphModule | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"resizes": self.resizes, "graph": None}

    def __str__(self) -> str:
        """Return a paragraph per resize."""
        if not self.resizes:
            return "nothing was resized"
        return "\n".join(_paragraph(number, record) for number, record in enumerate(self.resizes, 1))

    def __repr__(self) -> str:
        return f"<Report of {len(self.resizes)} resizes>"

    def _repr_html_(self) -> str:
        if not self.resizes:
            return self.table()._repr_html_()
        done = ((record, _paragraph(number, record).split("\n")) for number, record in enumerate(self.resizes, 1))
        tables = []
        for record, lines in done:
            named = set(record.get("named", ()))
            rows = [
                (name, str(old), str(new), "named by the plan" if name in named else "")
                for name, (old, new) in record["widths"].items()
            ]
            columns = ("group", "before", "after", "channels")
            tables.append(Table(columns, tuple(rows), (lines[0],), tuple(lines[1 + len(rows) :])))
        return "\n".join(table._repr_html_() for table in tables)

    def table(self) -> Table:
        """Return a table of the groups' widths, first and after each resize, with parameters and flops below."""
        if not self.resizes:
            return Table(("group",), (), ("nothing was resized",))
        rows = [(name, *map(str, widths)) for name, widths in courses(self.resizes).items()]
        counts = [f"{self.resizes[0]['parameters'][0]:,}", *(f"{record['parameters'][1]:,}" for record in self.resizes)]
        columns = ("group", "first", *(f"resize {number}" for number in range(1, len(self.resizes) + 1)))
        flops = [record.get("flops") for record in self.resizes]
        known = [
            "" if flops[0] is None else f"{flops[0][0]:,}",
            *("" if one is None else f"{one[1]:,}" for one in flops),
        ]
        # Of no resize: the row would say nothing.
        costs = [("parameters", *counts), *([("flops", *known)] if any(known) else [])]
        return Table(columns, (*rows, *costs), (), () if all(known) else (_UNKNOWN_FLOPS,))

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the widths of groups, first and after each resize.

        Args:
            path: a file to draw to: .svg, .png or .pdf.

        Returns:
            The figure, a `matplotlib.figure.Figure`.

        Raises:
            FxwidthError: nothing was resized, the path cannot be drawn to, or matplotlib is not installed.
        """
        refuse_other_pictures(path)
        if not self.resizes:
            raise FxwidthError("nothing was resized, so there are no widths over time to draw; resize the graph first.")
        figure, axes = new_axes()
        found = courses(self.resizes)
        for name, widths in found.items():
            axes.step(range(len(widths)), widths, where="post", label=name, linewidth=1)
        axes.set(xlabel="resizes", ylabel="width")
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks(range(len(self.resizes) + 1))
        name_lines(axes)
        return save_figure(figure, path)

    def to_html(
        self, path: str | Path, *, spectra: Mapping[str, GroupSpectrum] | None = None, progress: Progress = True
    ) -> Path:
        """Write all that is known of the graph as one page of HTML, which needs no network.

        It has the cost before and now, the widths over time, spectra with their cut, the pinned groups with their
        reasons, the layers, a picture of the groups with repeated blocks folded, and what was done.

        Args:
            path: the file to write; one that is there is replaced as a whole.
            spectra: those to show in the place of the present ones, as `fxwidth.spectrum` gave them before the graph
                was resized: the cut then lies in them.
            progress: as for `fxwidth.spectrum`.

        Returns:
            The path.

        Raises:
            FxwidthError: the report was not made by `fxwidth.report`, the graph cannot be analysed, spectra are others,
                or the file cannot be written.
        """
        if self.graph is None:
            raise FxwidthError(
                "this report has no graph to tell of; take the one that fxwidth.report returns for a graph."
            )
        given = [] if spectra is None else list(spectra.values()) if isinstance(spectra, Mapping) else [spectra]
        if not all(isinstance(one, GroupSpectrum) for one in given):
            raise FxwidthError("spectra= takes what fxwidth.spectrum(width_graph) returns.")
        place = path_of(path)
        paragraphs = [_paragraph(number, record) for number, record in enumerate(self.resizes, 1)]
        graph, title = self.graph, f"Report of {type(self.graph).__name__}"
        text = listening(progress, lambda: report_page(graph, title, paragraphs, spectra))
        with replacing(place) as beside:
            beside.write_text(text, encoding="utf-8")
        return place


def report(gm: nn.Module | ExportedProgram) -> Report:
    """Return what `resize`, `evolve` and `Evolver` have done to a graph.

    Args:
        gm: the graph; or a module or an ExportedProgram that `evolve` or `write_back` has returned, as long as it is
            the same object.

    Raises:
        FxwidthError: it is none of these.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> gm = fxwidth.resize(gm, {"0": 10}, selection="magnitude", fold=False)
        >>> print(fxwidth.report(gm))  # doctest: +ELLIPSIS
        resize 1: 212 -> 134 parameters (63.2%), 768 -> 480 flops (62.5%), channels chosen by magnitude, ...
          0: 16 -> 10
    """
    if isinstance(gm, fx.GraphModule):
        return Report(resizes_of(gm), gm)
    resizes = resizes_written_back(gm)
    if resizes is None:
        raise FxwidthError(
            f'report takes a graph, or the module that evolve(..., output="module") or write_back has returned, but '
            f"received {type(gm).__name__}. The model that was traced is told of by the graph: fxwidth.report(gm)."
        )
    return Report(resizes)


def _paragraph(number: int, record: dict[str, Any]) -> str:
    flops = record.get("flops")
    told = "flops not known" if flops is None else f"{_change(flops)} flops{_share(flops)}"
    parameters = record["parameters"]
    counts = f"{_change(parameters)} parameters{_share(parameters)}, {told}"
    lines = [f"resize {number}: {counts}{_done(record)}"]
    named = dict.fromkeys(record.get("named", ()), ", channels named by the plan")
    lines += [f"  {name}: {old} -> {new}{named.get(name, '')}" for name, (old, new) in record["widths"].items()]
    outputs = record.get("outputs", {})
    lines += [f"  output {dim}: {old} -> {new}, which callers follow" for dim, (old, new) in outputs.items()]
    lines += [f"  node {node} became ATen ops: {reason}" for node, reason in record["lowered"].items()]
    lines += [f"  {name} was not refitted: {reason}" for name, reason in record.get("not_refitted", {}).items()]
    return "\n".join(lines)


def _change(counts: Sequence[int]) -> str:
    return " -> ".join(f"{count:,}" for count in counts)


def _share(counts: Sequence[int]) -> str:
    before, after = counts
    return f" ({after / before:.1%})" if before else ""


_OF_ORIGINAL = {
    RESIZED: "the traced model resized too",
    UNTOUCHED: "the traced model left as it was",
    WRITTEN_BACK: "the traced model resized by writing back",
}


def _done(record: dict[str, Any]) -> str:
    """Tell how channels were dropped: by what they were chosen, and what became of their readers."""
    evidence, selection = record["evidence"], record["selection"]
    # A record of an earlier version does not say; all that had evidence were refitted then.
    folded = record.get("folded", evidence is not None)
    parts = []
    shrunk = [name for name, (old, new) in record["widths"].items() if new < old]
    if shrunk:
        source = f" from {evidence}" if evidence is not None and reads_moments(selection) and not folded else ""
        # Magnitude and functions of the user's need no evidence.
        can_choose = evidence is not None or not reads_moments(selection)
        is_chosen = can_choose and set(shrunk) > set(record.get("named", ()))
        parts += [f"channels chosen by {selection}{source}"] if is_chosen else []
        parts.append(f"readers refitted from {evidence}" if folded else "readers not refitted")
    parts += ["batch norm recalibrated"] if record.get("recalibrated") else []
    parts += [_OF_ORIGINAL[record["original"]]] if record.get("original") else []
    return "".join(f", {part}" for part in parts)
