"""Front ends, asked one after the other until one makes a graph that does what the model does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import fx, nn

from fxwidth.analysis.input_specs import device_of
from fxwidth.analysis.result import Analysis
from fxwidth.errors import FxwidthError
from fxwidth.frontends.call_signature import Argument, Call, arguments_of
from fxwidth.frontends.eager_answers import answering_as_in_eager_mode
from fxwidth.frontends.export import exported_graph
from fxwidth.frontends.export_otherwise import exported_otherwise, warn_of_other_way
from fxwidth.frontends.own_faults import advice, own_fault, told
from fxwidth.frontends.own_modes import OwnModes, own_modes, warn_of_own_methods
from fxwidth.frontends.state_names import keep_names
from fxwidth.frontends.symbolic import graph_with_leaves, one_call, symbolic_graph
from fxwidth.frontends.train_eval import Traced, Tracer, in_both_modes, warn_of_modes
from fxwidth.frontends.untraceable import refuse_names
from fxwidth.rewriting.model_runs import differs_from_model
from fxwidth.runtime.trace_guards import UntraceableError
from fxwidth.tracing.analyze import analyze_module
from fxwidth.work_progress import tell

_SYMBOLIC, _EXPORT, _LEAVES = "torch.fx.symbolic_trace", "torch.export", "torch.fx.symbolic_trace with leaves"
_ONE_CALL = "one call of the model"
_OTHERWISE = "torch.export of what the model does when it is exported"
_EXPORTS = (_EXPORT, _OTHERWISE)
# Of so many modules an export takes a second, of a transformer's on one core.
_MANY = 50


def traced(model: nn.Module, call: Call | None) -> tuple[fx.GraphModule, Analysis]:
    """Return what the first front end makes that can trace the model and whose graph runs.

    Raises:
        FxwidthError: none can.
    """
    askers = set[str]()
    arguments = arguments_of(model, call)
    attempts = _Attempts(model, call, arguments, own_modes(model))
    for name, front_end in _front_ends(model, call, arguments, askers):
        if attempts.best is not None and name not in _EXPORTS:
            continue  # it would follow no more
        found = attempts.make(name, front_end)
        if found is not None and not found[0].untraceable:
            if name == _OTHERWISE:
                warn_of_other_way(model, askers)
            return attempts.told(*found)
        attempts.best = attempts.best or found
    if attempts.best is not None:
        return attempts.told(*attempts.best)
    refuse_names(model)
    raise attempts.failure()


def _front_ends(
    model: nn.Module, call: Call | None, arguments: Sequence[Argument], askers: set[str]
) -> Iterator[tuple[str, Tracer]]:
    """Yield all that can trace with what is known of the call, in the order in which they are asked."""
    yield _SYMBOLIC, lambda *found: _symbolic(model, arguments, True, *found)
    yield _SYMBOLIC, lambda *found: _symbolic(model, arguments, False, *found)
    if call is None:
        return
    device, as_it_runs, kept = device_of(model), partial(answering_as_in_eager_mode, askers), call.is_of_one_size
    yield _EXPORT, lambda *_: exported_graph(model, arguments, device, as_it_runs, is_of_one_size=kept)
    if askers:
        yield _OTHERWISE, lambda *_: exported_otherwise(model, arguments, device, askers, is_of_one_size=kept)
    yield _LEAVES, lambda leaves, _, modes: graph_with_leaves(model, arguments, leaves, modes)
    yield _ONE_CALL, lambda *_: one_call(model)


@dataclass
class _Attempts:
    """What has come of the front ends so far.

    Attributes:
        model: the module.
        call: how it is called.
        arguments: those that it takes, with what the call gives.
        own: what its `train()` and `eval()` do.
        best: a graph that runs, but does not follow both modes for want of a trace.
        reasons: why those that have failed did, by their names.
        unusable: why the first graph that could be traced does not run.
    """

    model: nn.Module
    call: Call | None
    arguments: Sequence[Argument]
    own: OwnModes
    best: tuple[Traced, Analysis] | None = None
    reasons: dict[str, Exception] = field(default_factory=dict)
    unusable: FxwidthError | None = None

    def make(self, name: str, front_end: Tracer) -> tuple[Traced, Analysis] | None:
        """Return the graph that a front end makes, or None where it fails or its graph does not run."""
        tell(f"tracing by {name}", is_long=name in _EXPORTS and sum(1 for _ in self.model.modules()) >= _MANY)
        try:
            traced = in_both_modes(self.model, front_end, self.own, takes_leaves=name not in _EXPORTS)
            keep_names(self.model, traced.module)
        except Exception as error:
            self.reasons[name] = error
            return None
        try:
            analysis = analyze_module(traced.module, self.call)
            if name not in _EXPORTS and (other := self._otherwise(traced, analysis)) is not None:
                self.reasons[name] = UntraceableError(f"its graph would not do what the model does: {other}")
                return None
            return traced, analysis
        except FxwidthError as error:
            self.reasons[name] = error
            if name not in (_LEAVES, _ONE_CALL):
                self.unusable = self.unusable or error
            return None

    def _otherwise(self, traced: Traced, analysis: Analysis) -> str | None:
        """Return what the model does otherwise than its graph: its code may have looked at what it is given."""
        if traced.unfollowed is not None and self.model.training:
            return None  # it is the graph of training alone, as the user is told
        return differs_from_model(analysis, self.model, self.arguments)

    def told(self, traced: Traced, analysis: Analysis) -> tuple[fx.GraphModule, Analysis]:
        """Return a graph, with warnings of what of the model it does not follow."""
        warn_of_modes(self.model, traced.unfollowed)
        warn_of_own_methods(self.model, traced.module, self.own)
        return traced.module, analysis

    def failure(self) -> FxwidthError:
        """Return the error that says why no front end can trace the model."""
        fault = own_fault(self.model, self.call)
        if self.unusable is not None:
            place = f" The model itself fails so: {fault.place}." if fault is not None and fault.place else ""
            # A graph may have ops in the place of layers, which tell less.
            is_told = any(words in str(self.unusable) for words in ("the first layer", "looks like labels"))
            remedy = "" if is_told else advice(self.model, self.call)
            if not place + remedy:
                return self.unusable
            placed = FxwidthError(f"{self.unusable}{place}{remedy}")
            placed.__cause__ = self.unusable
            return placed
        if fault is not None:
            return told(fault, self.model, self.call)
        error = _untraceable(self.model, self.reasons, self.call)
        error.__cause__ = list(self.reasons.values())[-1]
        return error


def _symbolic(
    model: nn.Module,
    arguments: Sequence[Argument],
    live_numbers: bool,
    leaves: list[nn.Module],
    failed: list[nn.Module],
    modes: dict[nn.Module, bool],
) -> fx.GraphModule:
    return symbolic_graph(model, arguments, live_numbers=live_numbers, leaves=leaves, failed=failed, modes=modes)


def _untraceable(model: nn.Module, reasons: Mapping[str, Exception], call: Call | None) -> FxwidthError:
    told = ". ".join(f"{name} says: {_first_line(error).rstrip('.')}" for name, error in reasons.items())
    remedy = "Make its control flow independent of tensor values, or trace the part that is to be resized."
    if call is None:
        remedy = "torch.export may, but needs example_inputs: pass a tensor or a tuple of inputs, batch first."
    return FxwidthError(f"{type(model).__name__} cannot be traced. {told}. {remedy}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
