"""A model tried out at given widths: what its code does then, with the sizes that it keeps set by trial."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
from torch import nn

from fxwidth.axes.factors import Factor
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.modules.class_fit import fit_class
from fxwidth.modules.class_runs import ClassRuns, Failure, SeenOp
from fxwidth.modules.code_sizes import Pairs, fit_sizes, set_layer_sizes, sizes_in_ops
from fxwidth.modules.holdings import Widths
from fxwidth.modules.model_edits import ModelEdits
from fxwidth.modules.rebuilding import Rebuilding, take_differences
from fxwidth.rewriting.attributes import UnsettableError


class Trials:
    """Tries a model at widths of the groups of a graph; the model is left as it was.

    Args:
        width_graph: the groups.
        runs: the model.
    """

    def __init__(self, width_graph: WidthGraph, runs: ClassRuns) -> None:
        self.width_graph = width_graph
        self.runs = runs

    @cached_property
    def before(self) -> list[SeenOp]:
        """What the model does at its present widths."""
        return self.runs.seen(IndexMaps(self.width_graph.analysis.space, {}))[0]

    def maps(self, widths: Widths) -> IndexMaps:
        """Return the maps of some new widths."""
        kept: dict[Factor, np.ndarray] = {
            self.width_graph[name].factor: np.arange(width) for name, width in widths.items()
        }
        return IndexMaps(self.width_graph.analysis.space, kept)

    def problem(self, widths: Widths, rebuilding: Rebuilding | None) -> str | None:
        """Return why the model would be refused some widths when they are written back, or None."""
        edits = ModelEdits(self.runs.model)
        try:
            found = fit_class(self.runs, self.maps(widths), edits, rebuilding).problem
            return None if found is None else str(found)
        finally:
            edits.undo()

    def failure(self, widths: Widths) -> Failure | None:
        """Return where the model cannot do what is prescribed at some widths, whatever its attributes are set to."""
        maps, edits = self.maps(widths), ModelEdits(self.runs.model)
        fakes, wanted = self.runs.fakes(maps), self.runs.wanted(maps)
        known: Mapping[str, Pairs] = sizes_in_ops(self.before, self.runs.calls, maps, wanted)
        try:
            set_layer_sizes(self.runs, fakes, edits)
            return fit_sizes(self.runs, lambda: self.runs.failure(maps, fakes, wanted=wanted), known, edits)
        except UnsettableError as error:
            return self._unset(error)
        finally:
            edits.undo()

    def failure_as(self, widths: Widths, base: nn.Module, other: nn.Module) -> Failure | None:
        """Return where the model cannot do what is prescribed with the attributes of another of its class."""
        maps, edits = self.maps(widths), ModelEdits(self.runs.model)
        fakes = self.runs.fakes(maps)
        try:
            set_layer_sizes(self.runs, fakes, edits)
            take_differences(self.runs.model, base, other, edits)
            return self.runs.failure(maps, fakes)
        except UnsettableError as error:
            return self._unset(error)
        finally:
            edits.undo()

    def _unset(self, error: UnsettableError) -> Failure:
        return Failure(-1, "", type(self.runs.model).__name__, str(error))
