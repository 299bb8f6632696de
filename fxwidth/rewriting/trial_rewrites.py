"""Trial resizes of graphs that look at values: what cannot follow a resize by its parameters alone must stay.

A part that looks at values is called as it is, and so is a node that works with as many things as that has found: what
was found in one run must not be written into the graph. A trial also goes the ways of other numbers of finds, which may
have sizes of their own written in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxwidth.analysis.data_dependent_pins import nodes_behind_values
from fxwidth.analysis.data_dependent_runs import run_with
from fxwidth.analysis.result import Analysis
from fxwidth.analysis.training_calls import works_across_channels
from fxwidth.axes.factors import Factor
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.axes.pins import WRITTEN_IN
from fxwidth.errors import FxwidthError
from fxwidth.rewriting.added_modules import Additions
from fxwidth.rewriting.attributes import AttributeEdits
from fxwidth.rewriting.graphs import RewrittenGraph, rewrite_graph
from fxwidth.runtime.contexts import evaluating, quiet
from fxwidth.runtime.module_state import hooked_part, restored
from fxwidth.runtime.tensor_slots import substituted

_FINDS = (0, 2)


def pin_what_is_written_in(analysis: Analysis) -> None:
    """Pin the factors with which a node that cannot be taken apart does not do what is prescribed."""
    trials = _Trials(analysis, _hooked_nodes(analysis))
    in_training = any(analysis.training_calls.values())
    if analysis.record is None and not (analysis.effects or in_training or trials.hooked):
        return
    factors = trials.resizable()
    while factors and (problem := trials.problem(factors)) is not None:
        culprits = trials.culprits(factors) or factors
        analysis.space.context = ""
        for factor in culprits:
            analysis.space.pin(((factor,),), f"{WRITTEN_IN}: {problem}")
        factors = [factor for factor in factors if factor not in culprits]


def _hooked_nodes(analysis: Analysis) -> list[str]:
    """Return the nodes that call modules with hooks, which would be lost with these; plain layers are never lost."""
    assert analysis.seen is not None
    return [
        node.name
        for node, module in analysis.seen.called_modules()
        if module._modules and hooked_part(module) is not None
    ]


@dataclass
class _Trials:
    analysis: Analysis
    hooked: list[str]

    def __post_init__(self) -> None:
        unchanged_graph = RewrittenGraph(self.analysis.module.graph, Additions(self.analysis.module))
        finds = _FINDS if self.analysis.record is not None else ()
        self._finds = [count for count in finds if self._fails_with(count, unchanged_graph, {}) is None]

    def resizable(self) -> list[Factor]:
        """Return the free factors of all that nodes which cannot be taken apart work with, in training too."""
        space = self.analysis.space
        found: dict[Factor, None] = {}
        in_training = (call for calls in self.analysis.training_calls.values() for call in calls)
        calls = [call for call in in_training if works_across_channels(call)]
        whole = [*nodes_behind_values(self.analysis), *self.analysis.effects, *self.hooked]
        for node in dict.fromkeys(whole):
            calls += self.analysis.calls_of(node)
        for call in calls:
            for axes in (*call.axes.values(), *call.output_axes):
                for axis in axes:
                    found |= dict.fromkeys(factor for factor in space.factors(axis) if not factor.is_batch)
        of_parameters = {
            factor
            for entry in self.analysis.parameters.values()
            for axis in entry.axes
            for factor in space.factors(axis)
        }
        return [factor for factor in found if factor in of_parameters]

    def problem(self, factors: Sequence[Factor]) -> str | None:
        """Return None where the graph can be rewritten for about half of each factor, or what is in the way."""
        # Not the same part of each, lest two sizes that should be one be equal by chance.
        kept = {factor: np.arange(_about_half(factor.size, i)) for i, factor in enumerate(factors)}
        maps = IndexMaps(self.analysis.space, kept)
        fakes = self._fakes(maps)
        edits = AttributeEdits()
        try:
            graph = rewrite_graph(self.analysis, maps, fakes, edits)
            failures = (self._fails_with(count, graph, fakes) for count in self._finds)
            return next((failure for failure in failures if failure is not None), None)
        except FxwidthError as error:
            return str(error)
        finally:
            edits.undo()

    def culprits(self, factors: Sequence[Factor]) -> list[Factor]:
        """Return the factors that are in the way alone, by halving the set in which they are."""
        if self.problem(factors) is None:
            return []
        if len(factors) == 1:
            return list(factors)
        half = len(factors) // 2
        return [*self.culprits(factors[:half]), *self.culprits(factors[half:])]

    def _fakes(self, maps: IndexMaps) -> dict[str, Tensor]:
        fakes = {}
        with self.analysis.mode:
            for name, entry in self.analysis.parameters.items():
                if any(map(maps.changes, entry.axes)):
                    sizes = [maps.size(axis) for axis in entry.axes]
                    fakes[name] = torch.empty(sizes, dtype=entry.fake.dtype, device=entry.fake.device)
        return fakes

    def _fails_with(self, finds: int, rewritten: RewrittenGraph, fakes: Mapping[str, Tensor]) -> str | None:
        """Return None where a graph runs when so many things are found, or what is wrong."""
        analysis = self.analysis
        module, values = analysis.module, analysis.known_values(finds)
        assert values is not None
        known = {name: fakes.get(name, entry.fake) for name, entry in analysis.parameters.items()}
        try:
            with ExitStack() as stack:
                for context in (evaluating(module), restored(module), substituted(module, known), quiet()):
                    stack.enter_context(context)
                stack.enter_context(rewritten.additions.in_place())
                stack.enter_context(analysis.mode)
                run_with(module, rewritten.graph, analysis.inputs, values)
        except FxwidthError as error:
            return f"with {finds} things found, {error}"
        return None


def _about_half(size: int, number: int) -> int:
    return max(1, size // 2 - number % max(1, size // 4))
