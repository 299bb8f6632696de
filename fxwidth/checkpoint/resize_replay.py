"""The resizes of a saved graph again, on a fresh one: without a look at values, which come after them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import fx

from fxwidth.checkpoint.file_record import FileRecord, Step, steps_of
from fxwidth.costs.registry import cost_polynomial
from fxwidth.errors import FxwidthError
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.options import ResizeOptions
from fxwidth.recording.graph_meta import FREE_OUTPUTS, HISTORY, ORIGINAL, UNTIED, notes_of
from fxwidth.resizing.resize import resize_analyzed
from fxwidth.rewriting.optimizers import Optimizers
from fxwidth.rewriting.transaction import Transaction
from fxwidth.runtime.tensor_slots import tensor_slots
from fxwidth.serialization.graph_record import Fingerprint
from fxwidth.tracing.analyze import analyze_module
from fxwidth.untying.untie_copies import untie_copies

# A history may go through widths larger than the last ones; beyond this many times the parameters of the file and of
# the model together, the file alone does not warrant the memory.
_LARGEST = 16


@dataclass(frozen=True)
class ResizeReplay:
    """Resizes that are done again, and on what.

    Attributes:
        source: what tells of them, for errors.
        record: what it tells.
        module: the graph; changed in place, the caller takes that back on failure.
        transaction: that of which all this is a part.
        optimizer: what trains the graph, and goes along.
        values: how many values there are to fill the graph with, by which its size is judged; None for any size.
    """

    source: str | Path
    record: FileRecord
    module: fx.GraphModule
    transaction: Transaction
    optimizer: Optimizers | None
    values: int | None

    def run(self) -> None:
        """Do them.

        Raises:
            FxwidthError: they are of another model.
        """
        done = self._steps_done()
        self._check_original()
        if self.record.free_outputs:
            notes_of(self.module)[FREE_OUTPUTS] = self.record.free_outputs
        for number, step in enumerate(self.record.steps):
            if number >= done:
                self._untie(number)
                self._resize(step)
        self._untie(len(self.record.steps))

    def _steps_done(self) -> int:
        """Return how many of the resizes the graph has seen already: it may go on from where it is."""
        notes = notes_of(self.module)
        own, untied = steps_of(notes.get(HISTORY, ())), notes.get(UNTIED, [])
        saved = self.record.steps
        same = [(one.widths, one.kept) for one in own] == [(one.widths, one.kept) for one in saved[: len(own)]]
        if not same or [number for number in self.record.untied if number < len(own)] != [
            number for number in untied if number < len(own)
        ]:
            raise unfit(
                self.source,
                f"the graph has been resized {len(own)} times, otherwise than the one in the file; pass a fresh model",
            )
        return len(own)

    def _check_original(self) -> None:
        saved, own = self.record.original, notes_of(self.module).get(ORIGINAL)
        if saved is None or own is None:
            return
        difference = saved.difference(Fingerprint.of_data(own))
        if difference is not None:
            raise unfit(self.source, f"{difference}; make the model with the settings that it had")

    def _untie(self, number: int) -> None:
        if number in self.record.untied and number not in notes_of(self.module).get(UNTIED, ()):
            untie_copies(self.module)

    def _resize(self, step: Step) -> None:
        graph = WidthGraph(analyze_module(self.module))
        plan = {_present_name(graph, name): width for name, width in step.widths.items()}
        self._refuse_huge(graph, plan)
        options = ResizeOptions(exact=False, optimizer=self.optimizer)
        known = {"norms": step.norms, "kept": step.kept, "copies": step.copies}
        resize_analyzed(graph, plan, options, transaction=self.transaction, blind=True, **known)

    def _refuse_huge(self, graph: WidthGraph, plan: Mapping[str, int]) -> None:
        if self.values is None:
            return
        for name, width in plan.items():
            if type(width) is not int or width < 1:
                raise unfit(self.source, f"it gives {name!r} the width {width!r}")
        count = cost_polynomial(graph, "params")
        present = max(count({}), sum(tensor.numel() for tensor, _ in tensor_slots(self.module).values()))
        wanted = count({graph[name].factor: width for name, width in plan.items()})
        if wanted > _LARGEST * (self.values + present):
            raise FxwidthError(
                f"{self.source} goes through {int(wanted):,} parameters on the way to those in it, which is more "
                f"than {_LARGEST} times what it and the model hold; if you trust the file, pass trusted=True."
            )

    def note_history(self) -> None:
        """Give the graph the history that was saved."""
        if self.record.history is None:
            return
        notes = notes_of(self.module)
        # Whether the model goes along is told of this one.
        own = [record.get("original") for record in notes.get(HISTORY, ())]
        told = [{**saved, "original": mine} for saved, mine in zip(self.record.history, own, strict=True)]
        if told:
            notes[HISTORY] = told


def unfit(source: str | Path, why: str) -> FxwidthError:
    """Return the error that what is saved is of another model."""
    return FxwidthError(f"{source} does not fit this model: {why}.")


def _present_name(graph: WidthGraph, name: str) -> str:
    """Return what a group is called now; in earlier versions all names of a graph that is one call began with it."""
    without = name.removeprefix("model.")
    return without if name not in graph and without in graph else name
