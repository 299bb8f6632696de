"""Running a graph under fake tensors while rules say of what axes its tensors are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxwidth.analysis.data_dependent_pins import pin_other_ways
from fxwidth.analysis.free_outputs import FreeOutputs, is_freed, output_names
from fxwidth.analysis.graph_state import GraphState
from fxwidth.analysis.next_calls import kept_and_read
from fxwidth.analysis.result import Analysis, ParameterAxes, TensorSpec
from fxwidth.analysis.size_reads import of_other_inputs
from fxwidth.analysis.training_calls import ModuleRun, follow_other_answer, follow_training
from fxwidth.axes.factor_space import FactorSpace
from fxwidth.axes.factors import Axis, Factor, axis_size, bare_factor, constant
from fxwidth.axes.pins import NOT_COVERED, OTHER_SHAPES, OUTPUT, Pin, input_dimension
from fxwidth.axes.unification import unify
from fxwidth.errors import FxwidthError
from fxwidth.frontends.call_signature import OUTPUTS_MODULE
from fxwidth.frontends.input_misfits import misfit_of
from fxwidth.frontends.labels import labels_in_list
from fxwidth.recording.batch_dim import batch_factor
from fxwidth.recording.composite_ops import WholeOps, calls_no_whole_op
from fxwidth.recording.data_dependent import ValueRecord
from fxwidth.recording.submodules import watching_parts
from fxwidth.recording.tape import Axes, OpCall, TapeRecorder, plain_kernels
from fxwidth.rules.registry import RuleContext, keeps, rule_for
from fxwidth.rules.unruled import why_unruled
from fxwidth.runtime.contexts import evaluating, quiet
from fxwidth.runtime.fake_tensors import fake_like, fake_mode
from fxwidth.runtime.gc_pause import without_collections
from fxwidth.runtime.kept_objects import stand_ins
from fxwidth.runtime.module_state import Held, is_plain_layer, restored, walk
from fxwidth.runtime.pytrees import deep_tensors, map_leaves, states_in
from fxwidth.runtime.tensor_slots import Slots, substituted, tensor_slots
from fxwidth.runtime.trace_guards import UntraceableError
from fxwidth.runtime.unseen_effects import COMPUTES_GRADIENTS, watching_effects
from fxwidth.work_progress import tell


class NodeInterpreter(fx.Interpreter):
    """Runs a graph node by node, telling a recorder which node is at work and keeping every value."""

    def __init__(self, module: fx.GraphModule, analysis: Analysis, recorder: TapeRecorder) -> None:
        super().__init__(module, garbage_collect_values=False)
        self._analysis = analysis
        self._recorder = recorder

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        tell("analysing", len(self._analysis.node_calls), len(self._analysis.module.graph.nodes), is_inside=True)
        self._recorder.begin(n.name)
        self._analysis.computed_sizes = self._sizes_taken(n)
        first = len(self._recorder.calls)
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        if getattr(module, "_modules", None):
            with watching_parts(module, self._recorder, self._analysis.part_calls):
                value = self._run_plainly(n)
        else:
            value = self._run_plainly(n)
        self._analysis.node_calls[n.name] = range(first, len(self._recorder.calls))
        if module is not None and not is_plain_layer(module):
            self._follow_training(n, module, value, is_silent=first == len(self._recorder.calls))
        self._analysis.node_values[n.name] = value
        # As they are now: a later op may give the tensor other dims in place.
        self._analysis.node_axes[n.name] = tuple(map(self._analysis.axes_of, deep_tensors(value)))
        return value

    def _sizes_taken(self, node: fx.Node) -> frozenset[int]:
        """Return the numbers that a node takes from others and that are others for other inputs."""
        space, axes_of = self._analysis.space, self._analysis.axes_of
        return frozenset(
            self.env[source]
            for source in node.all_input_nodes
            if type(self.env.get(source)) is int and of_other_inputs(source, self.env, space, axes_of)
        )

    def keeping(self, held: Held) -> dict[str, list[Tensor]]:
        """Return the nodes whose modules keep tensors of this run, with what their next calls read."""
        own = {entry.fake for entry in self._analysis.parameters.values()}
        owners = {id(change.owner) for change in held.changes() if any(t not in own for t in stand_ins(change.new))}
        found = {}
        for node in self.graph.find_nodes(op="call_module") if owners else ():
            parts = [part for _, part in walk(self.fetch_attr(str(node.target)))]
            # What is kept outside may be by any of them.
            if id(None) in owners or any(id(part) in owners or id(type(part)) in owners for part in parts):
                found[node.name] = kept_and_read(
                    self._analysis, self._recorder, node.name, partial(self._run_plainly, node)
                )
        return found

    def _follow_training(self, node: fx.Node, module: nn.Module, value: Any, is_silent: bool) -> None:
        run = ModuleRun(module, *self.fetch_args_kwargs_from_env(node), value)
        if is_silent and run.was_passed_through():
            follow = follow_training
        elif not is_silent and all(user.op == "output" or user.target == OUTPUTS_MODULE for user in node.users):
            follow = follow_other_answer
        else:
            return
        self._analysis.training_calls[node.name] = follow(self._analysis, self._recorder, run)

    def _run_plainly(self, node: fx.Node) -> Any:
        # As the base class does, without its book-keeping of stack traces.
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        run = getattr(self, node.op)
        callee = self.fetch_attr(str(node.target)) if node.op == "call_module" else node.target
        if not calls_no_whole_op(callee, node.op):
            return run(node.target, args, kwargs)
        with torch._C.DisableTorchFunction():
            return run(node.target, args, kwargs)

    def fetch_attr(self, target: str) -> Any:
        """Return a module, parameter or buffer by its path."""
        module = self.submodules.get(target)
        return super().fetch_attr(target) if module is None else module


@without_collections()
def analyze_axes(
    module: fx.GraphModule,
    examples: Sequence[Any],
    record: ValueRecord | None = None,
    free: FreeOutputs = (),
) -> Analysis:
    """Run a graph on fake tensors and return the axes of everything in it.

    Args:
        module: the graph; it is run in eval mode and left as it was.
        examples: one value per placeholder: a `TensorSpec`, a tensor (used for its shape and dtype alone), a constant,
            or a nested value of these.
        record: results of ops that depend on values, from `record_values`.
        free: the outputs whose sizes may change.

    Raises:
        FxwidthError: the graph does not run on these inputs.
    """
    analysis = _analyzed(module, examples, record, free, is_single=False)
    # A first dim of the inputs that must have the size of a parameter is no batch.
    if analysis.space.batch_is_shared and _batch_reaches_parameters(analysis):
        return _analyzed(module, examples, record, free, is_single=True)
    return analysis


def _batch_reaches_parameters(analysis: Analysis) -> bool:
    return any(analysis.space.reaches_batch(axis) for entry in analysis.parameters.values() for axis in entry.axes)


def _analyzed(
    module: fx.GraphModule, examples: Sequence[Any], record: ValueRecord | None, free: FreeOutputs, is_single: bool
) -> Analysis:
    mode = fake_mode()
    space = FactorSpace()
    inputs = faked_inputs(examples, mode)
    slots = tensor_slots(module)
    parameters = _parameters(slots, mode, space)
    fakes = {name: entry.fake for name, entry in parameters.items()}
    batch = None if is_single else batch_factor(module, inputs, fakes, mode, record is not None)
    analysis = Analysis(module, space, mode, parameters, inputs, batch, record, is_single=is_single)
    names = [str(node.target) for node in module.graph.find_nodes(op="placeholder")]
    for name, argument in zip(names, inputs, strict=False):
        for value in deep_tensors(argument):
            analysis.set_axes(value, _input_axes(value, batch, name))
    run_on_tape(analysis, slots, partial(apply_rule, analysis))
    _pin_what_is_used(analysis)
    pin_other_ways(analysis)
    space.context = "model output"
    for output, name in zip(analysis.outputs, analysis.output_names, strict=True):
        is_followed = output in analysis.states or is_freed(name, free)
        for axis in () if is_followed else analysis.axes_of(output):
            for factor in space.factors(axis):
                if not factor.is_batch:
                    space.pin(((factor,),), OUTPUT)
    return analysis


def run_on_tape(analysis: Analysis, slots: Slots, on_call: Callable[[OpCall], None]) -> None:
    """Run the graph of an analysis that knows its parameters and inputs, and note what it does and returns.

    Args:
        analysis: takes the tape, the values of nodes and the outputs.
        slots: where the module has its tensors.
        on_call: gives each op its axes right after it has run.

    Raises:
        FxwidthError: the graph does not run on the inputs.
    """
    module, fakes = analysis.module, {name: entry.fake for name, entry in analysis.parameters.items()}
    for entry in analysis.parameters.values():
        analysis.set_axes(entry.fake, entry.axes)
    recorder = TapeRecorder(keeps, on_call, values=analysis.known_values())
    analysis.calls = recorder.calls
    replaced = substituted(module, fakes, slots, restored)

    def see(does: str, _: str) -> None:
        analysis.effects[recorder.node] = does

    effects = watching_effects(see, regions=True, calls=False)
    with evaluating(module), replaced as held, plain_kernels(WholeOps(see)), effects, quiet(), analysis.mode, recorder:
        interpreter = NodeInterpreter(module, analysis, recorder)
        result = run_graph(interpreter, recorder, analysis.inputs, analysis.effects)
        analysis.keeping = interpreter.keeping(held)
    analysis.outputs = deep_tensors(result)
    names = output_names(result)
    analysis.output_names = [names.get(tensor, str(place)) for place, tensor in enumerate(analysis.outputs)]
    analysis.states = set(states_in(result))
    analysis.seen = GraphState.of(module, slots)


def run_graph(
    interpreter: fx.Interpreter, recorder: TapeRecorder, inputs: Sequence[Any], effects: Mapping[str, str] | None = None
) -> Any:
    """Run a graph on one value per placeholder.

    Args:
        interpreter: runs it.
        recorder: knows which node is at work.
        inputs: the values.
        effects: what nodes have been seen to do of which no op tells.

    Raises:
        FxwidthError: it does not run on these inputs.
    """
    try:
        return interpreter.run(*inputs, enable_io_processing=False)
    except UntraceableError as error:
        raise FxwidthError(
            f"node {recorder.node!r} cannot be analysed: {error}. Write to the tensor in place, as by copy_."
        ) from error
    except Exception as error:
        shapes = [map_leaves(lambda leaf: tuple(leaf.shape), value) for value in inputs]
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if (effects or {}).get(recorder.node) == COMPUTES_GRADIENTS:
            raise FxwidthError(
                f"node {recorder.node!r} computes gradients in its forward pass, which fails here, where gradients are "
                f"off ({lines[0].rstrip('.')}). Let the model turn them on for that part, by torch.enable_grad(), as "
                "its evaluation without gradients needs too."
            ) from error
        if (told := labels_in_list(inputs)) is not None:
            raise FxwidthError(told) from error
        misfit = misfit_of(interpreter.module, inputs)
        if misfit is not None:
            raise FxwidthError(
                f"{misfit.told}: pass example_inputs such as {misfit.example}. The graph fails at node "
                f"{recorder.node!r}: {lines[0].rstrip('.')}."
            ) from error
        raise FxwidthError(
            f"the graph fails at node {recorder.node!r} on inputs of shapes {shapes}: {lines[0].rstrip('.')}. "
            "Pass example_inputs of the shapes and dtypes the model takes, batch first, as a tensor or a tuple; for a "
            "graph that is there already, call fxwidth.analyze(gm, example_inputs), by which later calls go."
        ) from error


def faked_inputs(examples: Sequence[Any], mode: FakeTensorMode) -> tuple[Any, ...]:
    """Return one value per placeholder with fake tensors in the place of specs and tensors."""
    return tuple(map_leaves(partial(_fake_input, mode), value, TensorSpec, Tensor) for value in examples)


def _fake_input(mode: FakeTensorMode, value: TensorSpec | Tensor) -> Tensor:
    if isinstance(value, TensorSpec):
        with mode:
            return torch.empty(value.shape, dtype=value.dtype, device=value.device, layout=value.layout)
    return mode.from_tensor(value)


def _input_axes(value: Tensor, batch: Factor | None, name: str) -> Axes:
    axes = [constant(size, Pin(input_dimension(dim, name))) for dim, size in enumerate(value.shape)]
    if batch is not None and value.dim() and value.shape[0] == batch.size:
        axes[0] = ((batch,),)
    return tuple(axes)


def _parameters(slots: Slots, mode: FakeTensorMode, space: FactorSpace) -> dict[str, ParameterAxes]:
    result = {}
    for name, (tensor, _) in slots.items():
        axes = tuple([space.fresh(size, f"{name}:{dim}") for dim, size in enumerate(tensor.shape)])
        origins = tuple(map(bare_factor, axes))
        result[name] = ParameterAxes(name, tensor, fake_like(mode, tensor), origins, axes)
    return result


def _pin_what_is_used(analysis: Analysis) -> None:
    calls = [*analysis.calls, *(call for calls in analysis.training_calls.values() for call in calls)]
    in_question = [call for call in calls if call.pins_if_used]
    used = {tensor for call in calls for tensor in call.inputs} | set(analysis.outputs) if in_question else set()
    for call in in_question:
        for result, axis, reason in call.pins_if_used:
            if result in used:
                analysis.space.context = call.place
                analysis.space.pin(axis, reason)


def apply_rule(analysis: Analysis, call: OpCall) -> None:
    """Apply an op's rule to a call that has just run, or pin what it touches."""
    outputs = call.outputs
    space = analysis.space
    space.context = call.place
    call.axes = {tensor: analysis.axes_of(tensor) for tensor in call.inputs}
    call.computed = analysis.computed_sizes
    if not outputs:
        return
    axes, reason = _axes_by_rule(analysis, call, outputs)
    if axes is None:
        for operand in call.inputs:
            for axis in analysis.axes_of(operand):
                space.pin(axis, reason)
        why = Pin(reason, space.context)
        axes = [tuple(constant(size, why) for size in output.shape) for output in outputs]
    call.output_axes = tuple(
        _write_axes(analysis, call, output, result) for output, result in zip(outputs, axes, strict=True)
    )


def _write_axes(analysis: Analysis, call: OpCall, output: Tensor, axes: Axes) -> Axes:
    """Give a result its axes, and return them; one that was written in place keeps those that it has."""
    old = call.axes.get(output)
    if old is not None and len(old) == len(axes) and all(map(_same_size, old, axes)):
        # What was written must fit what was there.
        _couple(analysis, old, axes)
        return old
    analysis.set_axes(output, axes)
    return axes


def _same_size(first: Axis, second: Axis) -> bool:
    return first is second or axis_size(first) == axis_size(second)


def _couple(analysis: Analysis, first: Sequence[Axis], second: Sequence[Axis]) -> None:
    for one, two in zip(first, second, strict=True):
        if one is not two:
            unify(analysis.space, one, two)


def _axes_by_rule(analysis: Analysis, call: OpCall, outputs: Sequence[Tensor]) -> tuple[Sequence[Axes] | None, str]:
    rule = rule_for(call.func)
    if rule is None:
        return None, why_unruled(call.func)
    context = RuleContext(call, analysis.space, analysis.axes_of, analysis.in_memory_of)
    try:
        result = [tuple(axes) for axes in rule(context)]
    except Exception as error:
        # A rule that does not fit the call must not guess: pinning costs compression, never the model.
        return None, f"{NOT_COVERED}: {error or type(error).__name__}"
    shapes = [tuple(map(axis_size, axes)) for axes in result]
    if shapes != [output.shape for output in outputs]:
        return None, f"{OTHER_SHAPES} {shapes}"
    return result, ""
