"""Front ends: from a model to an fx graph that knows the shapes of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import TensorMetadata

from fxwidth.analysis.axis_propagation import analyze_axes
from fxwidth.analysis.data_dependent_runs import record_values
from fxwidth.analysis.input_specs import (
    device_of,
    input_specs,
    integer_examples,
    real_inputs,
    whole_numbers,
    with_batch_of_two,
)
from fxwidth.analysis.known_axes_replay import OtherGraphError, follow_axes, lost_groups
from fxwidth.analysis.result import Analysis
from fxwidth.errors import FxwidthError
from fxwidth.frontends.call_signature import Argument, Call, arguments_of, bound_to_placeholders, call_of
from fxwidth.frontends.eager_answers import answering_as_in_eager_mode
from fxwidth.frontends.export import exported_graph
from fxwidth.frontends.export_otherwise import exported_otherwise, warn_of_other_way
from fxwidth.frontends.own_modes import OwnModes, own_modes, warn_of_own_methods
from fxwidth.frontends.state_names import keep_names
from fxwidth.frontends.symbolic import graph_with_leaves, symbolic_graph
from fxwidth.frontends.train_eval import Traced, Tracer, in_both_modes, warn_of_modes
from fxwidth.frontends.untraceable import refuse_names, refuse_scripts, refuse_unmade
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.recording.data_dependent import VALUE_ERRORS, ValueRecord
from fxwidth.recording.graph_meta import AXES, EXAMPLES, INPUTS, VALUES, InMemory, notes_of
from fxwidth.rewriting.originals import remember_original
from fxwidth.rewriting.transaction import Transaction
from fxwidth.rewriting.trial_rewrites import pin_what_is_written_in
from fxwidth.runtime.finiteness import refuse_nan
from fxwidth.runtime.gc_pause import without_collections
from fxwidth.runtime.tensor_slots import tensor_slots


def trace(
    model: nn.Module, example_inputs: Any = None, example_kwargs: Mapping[str, Any] | None = None
) -> fx.GraphModule:
    """Return a model as an fx graph that records the shapes of its inputs.

    A GraphModule is taken as it is. Other modules are traced by `torch.fx` symbolic tracing, and by `torch.export`
    (non-strict, any batch size) where that fails. The graph takes the arguments of the model, by position or by name,
    and returns what the model returns. Arguments that are left out are fixed at their defaults. It does in `train()`
    and `eval()` what the model does there: dropout, batch norm, noise, stochastic depth. Parts whose two modes no graph
    can hold are called as they are; where that cannot be, the graph is that of the mode the model is in, in which only
    dropout and batch norm follow, and an `FxwidthWarning` names the place.

    Parameters are shared with the model, so an optimizer made for the model goes on. A resize of the graph resizes the
    model too, if its own code does the same at the new widths; else the model stays as it is and shares nothing from
    then on. It is not kept alive by the graph. The graph may list its parameters in the order of their
    use: the state dict of an optimizer, which goes by order, belongs to an optimizer that is made for the same module.

    Args:
        model: a module, in the mode (train or eval) that the graph is to start in, or a GraphModule traced by anyone.
        example_inputs: a tensor; a tuple of positional arguments; or a dict of arguments by name. Arguments may be
            lists, dicts and other objects with tensors in them. Of tensors only shapes and dtypes matter, and only the
            first dim, the batch, may differ later. Needless when the graph carries shapes or its first layers tell.
        example_kwargs: arguments by name, beside positional ones in `example_inputs`.

    Raises:
        FxwidthError: the model cannot be traced, or does not run on the inputs.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> gm(torch.randn(5, 8)).shape
        torch.Size([5, 4])
    """
    if not isinstance(model, nn.Module):
        raise FxwidthError(f"trace takes an nn.Module or a GraphModule, but received {type(model).__name__}.")
    call = call_of(example_inputs, example_kwargs)
    # The exporter's settings are context variables: they end with the context.
    return copy_context().run(Transaction(model).run, partial(_trace, model, call))


def _trace(model: nn.Module, call: Call | None) -> fx.GraphModule:
    refuse_scripts(model)
    refuse_unmade(model)
    refuse_nan(model)
    module, analysis = (
        (model, analyze_module(model, call)) if isinstance(model, fx.GraphModule) else _traced(model, call)
    )
    if module is not model:
        remember_original(module, model, arguments_of(model, call))
    _drop_postponed_annotations(module)
    for node in module.graph.nodes:
        value = analysis.node_values.get(node.name)
        if isinstance(value, Tensor):
            node.meta["tensor_meta"] = _metadata(value)
    return module


def analyze(
    gm: fx.GraphModule, example_inputs: Any = None, example_kwargs: Mapping[str, Any] | None = None
) -> WidthGraph:
    """Find the channel groups of a graph: what can be resized, what is coupled with what, what is pinned and why.

    Args:
        gm: a graph from `fxwidth.trace`, or any GraphModule.
        example_inputs: as for `fxwidth.trace`; needless when the graph carries shapes.
        example_kwargs: arguments by name, beside positional ones in `example_inputs`.

    Raises:
        FxwidthError: no shapes are known, or the graph does not run on them.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> print(fxwidth.analyze(gm))  # doctest: +ELLIPSIS, +NORMALIZE_WHITESPACE
        group  width  writers  readers  notes
        0      16     2        1
        0:1    8      0        1        pinned: it must equal a dimension of fixed size...
        2      4      2        0        pinned: the size of the model's output (model output)
    """
    return WidthGraph(analyze_module(gm, example_inputs, example_kwargs))


def analyze_module(
    module: fx.GraphModule, example_inputs: Any = None, example_kwargs: Mapping[str, Any] | None = None
) -> Analysis:
    """Analyse a graph on the given inputs or on the shapes it carries, and remember those shapes.

    Raises:
        FxwidthError: no shapes are known, or the graph does not run on them.
    """
    if not isinstance(module, fx.GraphModule):
        raise FxwidthError(
            f"a torch.fx.GraphModule is needed, but received {type(module).__name__}; call fxwidth.trace first."
        )
    call = call_of(example_inputs, example_kwargs)
    with without_collections():
        transaction = Transaction(module, is_run_only=True)
    return transaction.run(partial(_analyzed, module, call))


def _analyzed(module: fx.GraphModule, call: Call | None) -> Analysis:
    specs = input_specs(module, call)
    doubled = with_batch_of_two(specs)
    try:
        analysis = _analyze(module, specs if doubled is None else doubled, call)
    except FxwidthError:
        if doubled is None:
            raise
        analysis = _analyze(module, specs, call)
    found: dict[str, Any] = {INPUTS: specs}
    if call is not None:
        found[EXAMPLES] = InMemory(integer_examples(analysis, bound_to_placeholders(module, call)))
    notes = notes_of(module)
    # In one step: nothing can come between the two.
    notes |= found
    return analysis


def _analyze(module: fx.GraphModule, specs: list[Any], call: Call | None) -> Analysis:
    """Analyse a graph, by what is on record of its axes if there are groups of width one."""
    known = notes_of(module).get(AXES)
    if known is None:
        return _with_values(_by_rules, module, specs, call)
    try:
        return _with_values(partial(follow_axes, known), module, specs, call)
    except OtherGraphError as error:
        analysis = _with_values(_by_rules, module, specs, call)
        analysis.lost = lost_groups(known, error)
        return analysis


def _by_rules(module: fx.GraphModule, specs: list[Any], record: ValueRecord | None = None) -> Analysis:
    analysis = analyze_axes(module, specs, record)
    pin_what_is_written_in(analysis)
    return analysis


def _with_values(
    analyse: Callable[..., Analysis], module: fx.GraphModule, specs: list[Any], call: Call | None
) -> Analysis:
    """Analyse a graph; where what it does depends on values, with those of one run on real inputs."""
    known_for, record, _ = notes_of(module).get(VALUES, (None, None, None))
    if record is not None and call is None and known_for == specs:
        return analyse(module, specs, record)
    try:
        return analyse(module, specs)
    except FxwidthError as error:
        if not _is_about_values(error) or any(tensor.is_meta for tensor, _ in tensor_slots(module).values()):
            raise
    values = real_inputs(module, specs, call)
    record = record_values(module, values)
    analysis = analyse(module, specs, record)
    notes_of(module)[VALUES] = (specs, record, whole_numbers(values))
    return analysis


def _is_about_values(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, VALUE_ERRORS):
        error = error.__cause__ or error.__context__
    return error is not None


def _traced(model: nn.Module, call: Call | None) -> tuple[fx.GraphModule, Analysis]:
    """Return what the first front end makes that can trace the model and whose graph runs."""
    askers = set[str]()
    attempts = _Attempts(model, call, own_modes(model))
    for name, front_end in _front_ends(model, call, askers):
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


def _front_ends(model: nn.Module, call: Call | None, askers: set[str]) -> Iterator[tuple[str, Tracer]]:
    """Yield all that can trace with what is known of the call, in the order in which they are asked."""
    arguments = arguments_of(model, call)
    yield _SYMBOLIC, lambda *found: _symbolic(model, arguments, True, *found)
    yield _SYMBOLIC, lambda *found: _symbolic(model, arguments, False, *found)
    if call is None:
        return
    device, as_it_runs = device_of(model), partial(answering_as_in_eager_mode, askers)
    yield _EXPORT, lambda *_: exported_graph(model, arguments, device, as_it_runs)
    if askers:
        yield _OTHERWISE, lambda *_: exported_otherwise(model, arguments, device, askers)
    yield _LEAVES, lambda leaves, _, modes: graph_with_leaves(model, arguments, leaves, modes)


@dataclass
class _Attempts:
    """What has come of the front ends so far.

    Attributes:
        model: the module.
        call: how it is called.
        own: what its `train()` and `eval()` do.
        best: a graph that runs, but does not follow both modes for want of a trace.
        reasons: why those that have failed did, by their names.
        unusable: why the first graph that could be traced does not run.
    """

    model: nn.Module
    call: Call | None
    own: OwnModes
    best: tuple[Traced, Analysis] | None = None
    reasons: dict[str, Exception] = field(default_factory=dict)
    unusable: FxwidthError | None = None

    def make(self, name: str, front_end: Tracer) -> tuple[Traced, Analysis] | None:
        """Return the graph that a front end makes, or None where it fails or its graph does not run."""
        try:
            traced = in_both_modes(self.model, front_end, self.own, takes_leaves=name not in _EXPORTS)
            keep_names(self.model, traced.module)
        except Exception as error:
            self.reasons[name] = error
            return None
        try:
            return traced, analyze_module(traced.module, self.call)
        except FxwidthError as error:
            self.reasons[name] = error
            if name != _LEAVES:
                self.unusable = self.unusable or error
            return None

    def told(self, traced: Traced, analysis: Analysis) -> tuple[fx.GraphModule, Analysis]:
        """Return a graph, with warnings of what of the model it does not follow."""
        warn_of_modes(self.model, traced.unfollowed)
        warn_of_own_methods(self.model, traced.module, self.own)
        return traced.module, analysis

    def failure(self) -> FxwidthError:
        """Return the error that says why no front end can trace the model."""
        if self.unusable is not None:
            return self.unusable
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


_SYMBOLIC, _EXPORT, _LEAVES = "torch.fx.symbolic_trace", "torch.export", "torch.fx.symbolic_trace with leaves"
_OTHERWISE = "torch.export of what the model does when it is exported"
_EXPORTS = (_EXPORT, _OTHERWISE)


def _untraceable(model: nn.Module, reasons: Mapping[str, Exception], call: Call | None) -> FxwidthError:
    told = ". ".join(f"{name} says: {_first_line(error).rstrip('.')}" for name, error in reasons.items())
    remedy = "Make its control flow independent of tensor values, or trace the part that is to be resized."
    if call is None:
        remedy = "torch.export may, but needs example_inputs: pass a tensor or a tuple of inputs, batch first."
    return FxwidthError(f"{type(model).__name__} cannot be traced. {told}. {remedy}")


def _drop_postponed_annotations(module: fx.GraphModule) -> None:
    """Take annotations that are names in strings out of a graph: torch 2.11 cannot pickle one that has them."""
    annotated = [node for node in module.graph.nodes if isinstance(node.type, str)]
    for node in annotated:
        node.type = None
    if annotated:
        module.recompile()


def _metadata(value: Tensor) -> TensorMetadata:
    quantised: dict[str, Any] = {}
    return TensorMetadata(value.shape, value.dtype, value.requires_grad, value.stride(), None, False, quantised)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
