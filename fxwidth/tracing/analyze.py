"""The channel groups of a graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from torch import fx

from fxwidth.analysis.axis_propagation import analyze_axes
from fxwidth.analysis.data_dependent_runs import record_values
from fxwidth.analysis.free_outputs import FreeOutputs, checked, refuse_unknown
from fxwidth.analysis.input_specs import (
    input_specs,
    integer_examples,
    real_inputs,
    where_module_is,
    whole_numbers,
    with_batch_of_two,
)
from fxwidth.analysis.known_axes_replay import OtherGraphError, follow_axes, lost_groups
from fxwidth.analysis.result import Analysis
from fxwidth.errors import FxwidthError
from fxwidth.frontends.call_signature import Call, call_of
from fxwidth.frontends.placeholder_calls import bound_to_placeholders
from fxwidth.frontends.untraceable import refuse_sharded
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.recording.data_dependent import VALUE_ERRORS, ValueRecord
from fxwidth.recording.graph_meta import AXES, EXAMPLES, FREE_OUTPUTS, INPUTS, VALUES, InMemory, notes_of
from fxwidth.rewriting.transaction import Transaction
from fxwidth.rewriting.trial_rewrites import pin_what_is_written_in
from fxwidth.runtime.compiled_modules import uncompiled
from fxwidth.runtime.gc_pause import without_collections
from fxwidth.runtime.tensor_slots import tensor_slots
from fxwidth.runtime.trace_guards import UntraceableError, heeding_refusals
from fxwidth.work_progress import Progress, listening, tell


def analyze(
    gm: fx.GraphModule,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    free_outputs: bool | str | Collection[str] | None = None,
    progress: Progress = True,
) -> WidthGraph:
    """Find the channel groups of a graph: what can be resized, what is coupled with what, what is pinned and why.

    Args:
        gm: a graph from `fxwidth.trace`, or any GraphModule.
        example_inputs: as for `fxwidth.trace`; needless when the graph carries shapes.
        example_kwargs: arguments by name, beside positional ones in `example_inputs`.
        free_outputs: whether the sizes of what the model returns may change, since whoever reads it follows: True for
            all outputs, or the names of some, such as "features" or "0", which stand for all that is inside of them.
            The graph remembers it, so that plans and resizes go by it; None is what it remembers, False pins all again.
            Batches, positions and what a model returns in training alone stay.
        progress: as for `fxwidth.trace`.

    Raises:
        FxwidthError: no shapes are known, or the graph does not run on them; or no output has such a name.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> print(fxwidth.analyze(gm))  # doctest: +ELLIPSIS, +NORMALIZE_WHITESPACE
        group  width  kind    writers  readers  notes
        0      16     hidden  2        1
        0:1    8      input   0        1        pinned: it must equal a dimension of fixed size...
        2      4      output  2        0        pinned: the size of the model's output (model output)
        a group is named after the first layer that writes it, or else reads it...
    """
    free = None if free_outputs is None else checked(free_outputs)
    gm = uncompiled(gm)
    analysis = listening(progress, lambda: analyze_module(gm, example_inputs, example_kwargs, free))
    refuse_without_parameters(gm)
    return WidthGraph(analysis)


def refuse_without_parameters(module: fx.GraphModule) -> None:
    """Check that there is a parameter in a graph, or a tensor that may be meant for one.

    Raises:
        FxwidthError: there is none, and so nothing that can have another width.
    """
    if tensor_slots(module):
        return
    inputs = [str(node.target) for node in module.graph.find_nodes(op="placeholder")]
    told = f"{', '.join(inputs[:3])}{', ...' if len(inputs) > 3 else ''}" if inputs else "none"
    raise FxwidthError(
        f"nothing in the graph is a parameter: it holds none, and none of its inputs ({told}) was an nn.Parameter when "
        "it was traced. Graphs of torch.compile, aot_autograd and make_fx take the parameters as inputs: call "
        "fxwidth.trace(gm, example_inputs) with the nn.Parameters themselves among the inputs, or "
        "torch.compile(model, backend=fxwidth.compile_backend(params=0.5))."
    )


def refuse_other_than_graph(module: object, taker: str | None = None) -> None:
    """Check that a graph was given.

    Args:
        module: what was given.
        taker: what takes it, as the error names it.

    Raises:
        FxwidthError: it is something else.
    """
    if not isinstance(module, fx.GraphModule):
        wanted = "a torch.fx.GraphModule is needed" if taker is None else f"{taker} takes a torch.fx.GraphModule"
        raise FxwidthError(f"{wanted}, but received {type(module).__name__}; call fxwidth.trace first.")


def analyze_module(
    module: fx.GraphModule,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    free: FreeOutputs | None = None,
) -> Analysis:
    """Analyse a graph on the given inputs or on the shapes it carries, and remember those shapes.

    Raises:
        FxwidthError: no shapes are known, or the graph does not run on them.
    """
    refuse_other_than_graph(module)
    refuse_sharded(module)
    call = call_of(example_inputs, example_kwargs)
    tell("analysing")
    with without_collections():
        transaction = Transaction(module, is_run_only=True)
    return transaction.run(partial(_analyzed, module, call, free))


def _analyzed(module: fx.GraphModule, call: Call | None, free: FreeOutputs | None) -> Analysis:
    specs = input_specs(module, call)
    before: FreeOutputs = notes_of(module).get(FREE_OUTPUTS, ())
    free = before if free is None else free
    if free != before and AXES in notes_of(module):
        raise FxwidthError(
            "which outputs are free is remembered as long as a group is of width one; grow it, or pass free_outputs= "
            "before the resize that makes it so narrow."
        )
    try:
        analysis = _of_a_batch(module, specs, call, free)
    except FxwidthError as error:
        moved = where_module_is(specs, module) if call is None else None
        if moved is None:
            raise
        try:
            analysis = _of_a_batch(module, moved, call, free)
        except FxwidthError:
            raise error from error.__cause__
        specs = moved
    refuse_unknown(free, analysis)
    found: dict[str, Any] = {INPUTS: specs}
    if free != before:
        found[FREE_OUTPUTS] = free
    if call is not None:
        found[EXAMPLES] = InMemory(integer_examples(analysis, bound_to_placeholders(module, call)))
    notes = notes_of(module)
    # In one step: nothing can come between the two.
    notes |= found
    return analysis


def _of_a_batch(module: fx.GraphModule, specs: list[Any], call: Call | None, free: FreeOutputs) -> Analysis:
    """Analyse a graph with a batch of two where the specs have a batch of one, if it takes that."""
    doubled = with_batch_of_two(specs)
    if doubled is not None:
        with suppress(FxwidthError):
            return _analyze(module, doubled, call, free)
    return _analyze(module, specs, call, free)


def _analyze(module: fx.GraphModule, specs: list[Any], call: Call | None, free: FreeOutputs) -> Analysis:
    """Analyse a graph, by what is on record of its axes if there are groups of width one."""
    known = notes_of(module).get(AXES)
    by_rules = partial(_by_rules, free)
    if known is None:
        return _with_values(by_rules, module, specs, call)
    try:
        return _with_values(partial(follow_axes, known), module, specs, call)
    except OtherGraphError as error:
        analysis = _with_values(by_rules, module, specs, call)
        analysis.lost = lost_groups(known, error)
        return analysis


def _by_rules(
    free: FreeOutputs, module: fx.GraphModule, specs: list[Any], record: ValueRecord | None = None
) -> Analysis:
    analysis = analyze_axes(module, specs, record, free)
    pin_what_is_written_in(analysis)
    return analysis


def _with_values(
    analyse: Callable[..., Analysis], module: fx.GraphModule, specs: list[Any], call: Call | None
) -> Analysis:
    """Analyse a graph; where what it does depends on values, with those of one run on real inputs."""
    known_for, record, _ = notes_of(module).get(VALUES, (None, None, None))
    if record is not None and call is None and known_for == specs:
        return analyse(module, specs, record)
    has_values = not any(tensor.is_meta for tensor, _ in tensor_slots(module).values())
    try:
        with heeding_refusals(VALUE_ERRORS):
            return analyse(module, specs)
    except UntraceableError as error:
        if not has_values:
            raise FxwidthError(
                f"the model looks at values, and its parameters are on the meta device, which has none ({error}). "
                "Analyse it with values."
            ) from error
    except FxwidthError as error:
        if not _is_about_values(error) or not has_values:
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
