"""A module's class at some widths: its attributes and configuration set to what they need, and what it does judged.

A plan for a module asks this before it is made, `write_back` when the widths are there: what the one allows the other
does not refuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from fxwidth.analysis.result import Analysis
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.modules.class_runs import ClassRuns, Failure
from fxwidth.modules.code_sizes import Pairs, fit_sizes, set_layer_sizes, sizes_in_ops
from fxwidth.modules.config_fit import fit_config
from fxwidth.modules.model_edits import ModelEdits
from fxwidth.modules.proofs import eager_failure, training_failure
from fxwidth.modules.rebuilding import Rebuilding, Shapes, attributes_of_entries, made_otherwise, take_differences
from fxwidth.rewriting.attributes import UnsettableError
from fxwidth.rewriting.graph_calls import arguments_of_graph
from fxwidth.runtime.tensor_slots import named_tensors


@dataclass(frozen=True)
class ClassFit:
    """What a class needs for some widths, or why it cannot hold them.

    Attributes:
        problem: None, or what is in the way.
        built: the class, built anew, without values; None where it has no configuration.
    """

    problem: Failure | str | None
    built: nn.Module | None = None


def fit_class(runs: ClassRuns, maps: IndexMaps, edits: ModelEdits, rebuilding: Rebuilding | None = None) -> ClassFit:
    """Set a model's attributes to what widths need, and judge what it does at two batch sizes and in both modes.

    Args:
        runs: the model.
        maps: the widths.
        edits: takes the changes of attributes and of the configuration.
        rebuilding: builds the class anew; None for one of its own.
    """
    try:
        found = _fitted(runs, maps, edits, Rebuilding.of(runs.model) if rebuilding is None else rebuilding)
    except UnsettableError as error:
        return ClassFit(str(error))
    if found.problem is None:
        found = ClassFit(_otherwise(runs, maps), found.built)
    return found


def _fitted(runs: ClassRuns, maps: IndexMaps, edits: ModelEdits, rebuilding: Rebuilding | None) -> ClassFit:
    fakes, wanted, model = runs.fakes(maps), runs.wanted(maps), runs.model
    # A model that has been resized with the graph has the sizes of its configuration no more.
    old = runs if rebuilding is None else runs.of(rebuilding.base)
    runs.go_as_graph(None if rebuilding is None else old)
    before, _ = old.seen(maps, old.own_fakes())
    known: Mapping[str, Pairs] = sizes_in_ops(before, runs.calls, maps, wanted)
    set_layer_sizes(runs, fakes, edits)
    if rebuilding is None:
        return ClassFit(fit_sizes(runs, lambda: runs.failure(maps, fakes, wanted=wanted), known, edits))

    def judge(built: nn.Module) -> Failure | None:
        mark = edits.mark()
        try:
            take_differences(model, rebuilding.base, built, edits)
            return runs.failure(maps, fakes, wanted=wanted)
        finally:
            edits.undo(mark)

    fitted = fit_config(rebuilding, _shapes(runs, maps), known.get("", {}), judge)
    if fitted.problem is not None or fitted.built is None:
        return ClassFit(fitted.problem)
    take_differences(model, rebuilding.base, fitted.built, edits)
    buffer = made_otherwise(runs.analysis.module, fitted.built)
    if buffer is not None:
        return ClassFit(
            f"a {type(model).__name__} that is built anew would make other numbers in {buffer} than the graph has"
        )
    edits.apply_together(attributes_of_entries(model.config, fitted.changes))
    return ClassFit(None, fitted.built)


def _shapes(runs: ClassRuns, maps: IndexMaps) -> Shapes:
    """Return the shapes of the graph's parameters at some widths, by the model's names for them; not of dead ones."""
    names = named_tensors(runs.analysis.module)
    entries = {id(entry.tensor): entry for entry in runs.analysis.parameters.values()}
    found: Shapes = {}
    for name, _ in runs.model.named_parameters(remove_duplicate=False):
        if name in names and name not in runs.dead:
            entry = entries.get(id(names[name]))
            found[name] = tuple(names[name].shape if entry is None else map(maps.size, entry.axes))
    return found


def _otherwise(runs: ClassRuns, maps: IndexMaps) -> Failure | str | None:
    """Return where the model does otherwise than the graph, at two batch sizes and in both modes."""
    fakes = runs.fakes(maps)
    failure = runs.failure(maps, fakes)
    if failure is None and _is_told_at_larger_batch(runs.analysis):
        failure = runs.failure(maps.with_larger_batch(), fakes)
    if failure is not None:
        return failure
    problem = training_failure(runs, maps)
    return eager_failure(runs, maps) if problem is None else problem


def _is_told_at_larger_batch(analysis: Analysis) -> bool:
    """Tell whether a graph does at a larger batch what its tape says, which cannot follow it through a sort.

    Where it does not, values are compared there alone.
    """
    if analysis.batch is None:
        return False
    graph = ClassRuns(analysis, analysis.module, arguments_of_graph(analysis.module))
    return graph.failure(IndexMaps(analysis.space, {}).with_larger_batch()) is None
