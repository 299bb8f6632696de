"""What has been done to a graph, as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from fxwidth.recording.graph_meta import HISTORY, notes_of
from fxwidth.selection.registry import reads_moments
from fxwidth.tables import Table


@dataclass(frozen=True)
class Report:
    """The resizes of a graph, oldest first; `print` it for a readable form.

    Attributes:
        resizes: one dict each: widths {group: [old, new]}, parameters [before, after], evidence (what channels were
            chosen and readers refitted from: "data", "training", "noise", "weights" or None), selection (the method; of
            a function its module and name), kept {group: the channels that stayed, by their positions of then; behind
            those grown channels lie}, of groups that kept their basis, rotated (the groups that were brought to another
            basis first, of which the first channels stayed), named (the groups whose channels the plan named), folded
            (whether readers were refitted), recalibrated (whether running statistics of batch norms were corrected;
            False where there are none), lowered (nodes replaced by ATen ops, with the reason), norms (by what gains'
            norms have their variances multiplied), copies (what the channels of copies read since, -1 for nothing; see
            `fxwidth.untie_copies`), not_refitted (readers that lost channels without taking over what they read from
            them, products and reductions over channels, which have no weights to do so by, and gains and running
            statistics that keep their values, with the reason), original (what has become of the model that was traced:
            "resized", "untouched", or None where there is none, or none any more that shares parameters; one that
            nobody holds any more is told of until Python has collected it), directions (the method by which new
            channels were made; None where none were), not_informed (the weights in which they are orthogonal to the
            others because the method's moments could not be taken there, with the reason), reader_step (the loss_before
            and loss_after on batches held out, and the length of the step in units of the present columns, 0 for none;
            None where none was asked for).

    Example:
        >>> fxwidth.Report(()).resizes
        ()
        >>> print(fxwidth.Report(()))
        nothing was resized
    """

    resizes: tuple[dict[str, Any], ...]

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
        """Return a table of the groups' widths, first and after each resize, with the parameters below."""
        if not self.resizes:
            return Table(("group",), (), ("nothing was resized",))
        names = dict.fromkeys(name for record in self.resizes for name in record["widths"])
        rows = [(name, *map(str, self._course(name))) for name in names]
        counts = [f"{self.resizes[0]['parameters'][0]:,}", *(f"{record['parameters'][1]:,}" for record in self.resizes)]
        columns = ("group", "first", *(f"resize {number}" for number in range(1, len(self.resizes) + 1)))
        return Table(columns, (*rows, ("parameters", *counts)))

    def _course(self, name: str) -> list[int]:
        """Return the widths of a group, first and after each resize."""
        changes = [record["widths"].get(name) for record in self.resizes]
        course = [next(change[0] for change in changes if change is not None)]
        for change in changes:
            course.append(course[-1] if change is None else change[1])
        return course


def report(gm: fx.GraphModule) -> Report:
    """Return what `resize`, `evolve` and `Evolver` have done to a graph.

    Args:
        gm: the graph.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> gm = fxwidth.resize(gm, {"0": 10}, selection="magnitude", fold=False)
        >>> print(fxwidth.report(gm))  # doctest: +ELLIPSIS
        resize 1: 212 -> 134 parameters (63.2%), channels chosen by magnitude, readers not refitted...
          0: 16 -> 10
    """
    return Report(tuple(notes_of(gm).get(HISTORY, ())))


def _paragraph(number: int, record: dict[str, Any]) -> str:
    before, after = record["parameters"]
    lines = [f"resize {number}: {before:,} -> {after:,} parameters ({after / before:.1%}){_done(record)}"]
    named = dict.fromkeys(record.get("named", ()), ", channels named by the plan")
    lines += [f"  {name}: {old} -> {new}{named.get(name, '')}" for name, (old, new) in record["widths"].items()]
    lines += [f"  node {node} became ATen ops: {reason}" for node, reason in record["lowered"].items()]
    lines += [f"  {name} was not refitted: {reason}" for name, reason in record.get("not_refitted", {}).items()]
    return "\n".join(lines)


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
    told = {"resized": "the traced model resized too", "untouched": "the traced model left as it was"}
    parts += [told[record["original"]]] if record.get("original") else []
    return "".join(f", {part}" for part in parts)
