"""The second front end: `torch.export`, for models whose Python code symbolic tracing cannot follow."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stderr
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental import proxy_tensor
from torch.nn.modules.module import _global_buffer_registration_hooks

from fxwidth.frontends.call_signature import (
    Argument,
    has_own_call,
    invoke,
    refuse_guarded,
)
from fxwidth.frontends.eager_answers import answering_as_in_eager_mode
from fxwidth.frontends.export_reassembly import (
    Program,
    Reassembly,
)
from fxwidth.frontends.forgotten_state import (
    leave,
    plain_changes,
    progress,
    refuse_computed_inside,
    refuse_computed_outside,
    same_changes,
)
from fxwidth.frontends.involved_sizes import bounded_effort
from fxwidth.frontends.random_draws import refusing_draws
from fxwidth.frontends.size_questions import SizeQuestions
from fxwidth.frontends.sizes_of_one import allow_ones
from fxwidth.frontends.watched_tensors import SetterWatch, memory_of, refusing_reads
from fxwidth.runtime.contexts import heeding_interruptions, quiet
from fxwidth.runtime.kept_objects import Change
from fxwidth.runtime.module_state import restored
from fxwidth.runtime.pytrees import Structure, flatten, flatten_each, rebuild_each
from fxwidth.runtime.trace_guards import UntraceableError, heeding_refusals, refuse_iterators
from fxwidth.runtime.unseen_effects import refuse_effect, watching_effects

aten = torch.ops.aten

_TRANSFORMS = "torch._functorch.predispatch"


def exported_graph(
    model: nn.Module,
    arguments: Sequence[Argument],
    device: torch.device,
    told: Callable[[], AbstractContextManager[None]] = answering_as_in_eager_mode,
    *,
    is_of_one_size: bool = False,
) -> fx.GraphModule:
    """Return the graph of a model, exported for one form of call and any size that the model's own code allows.

    It takes the arguments of the model's forward and returns what the model returns. It shares the model's parameters
    and buffers, under their names.

    Args:
        model: the module.
        arguments: those of its forward, with examples or defaults.
        device: where its parameters are.
        told: the context in which the model may ask whether it is exported; by default it is told that it is not.
        is_of_one_size: whether the graph is to be for any batch, and for no other sizes than the example's.
    """
    leaves, structures = flatten_each((argument.value for argument in arguments), (Tensor,))
    answers: list[Structure] = []

    def forward(*leaves: Any) -> list[Any]:
        # The model may write to what it is given, such as an empty cache.
        values = rebuild_each(copy.deepcopy(structures), leaves)
        returned = invoke(model, arguments, values)
        refuse_iterators(returned)
        result, answer = flatten(returned)
        answers.append(answer)
        return result

    examples = [leaf.detach().to(device).contiguous() for leaf in leaves]
    doubled = [leaf.repeat(2, *[1] * (leaf.dim() - 1)) if leaf.dim() else leaf for leaf in examples]
    if any(leaf.dim() and leaf.shape[0] != 1 for leaf in examples):
        program = _program(model, forward, examples, told, is_of_one_size)
    else:
        # A batch of one cannot be told from a dim that is merely broadcast.
        try:
            program = _program(model, forward, doubled, told, is_of_one_size)
        except Exception:
            program = _program(model, forward, examples, told, is_of_one_size)
        refuse_guarded(program.guards, examples)
    graph = Reassembly(program, arguments, structures, answers[-1]).run()
    graph.train(model.training)
    allow_ones(graph, model, arguments, structures, examples, program.of_ones)
    return graph


def _program(
    model: nn.Module,
    forward: Callable[..., list[Any]],
    leaves: Sequence[Tensor],
    told: Callable[[], AbstractContextManager[None]],
    is_of_one_size: bool,
) -> Program:
    """Export a function of tensors with the parameters of a model, under their names."""
    import torch._dynamo.external_utils  # the exporter would, later

    questions = SizeQuestions()
    watch, changes = SetterWatch(), list[Change]()

    def watched(*leaves: Any) -> list[Any]:
        watch.take(model.buffers())
        result = forward(*leaves)
        # Here, since the exporter puts attributes of submodules back when it ends.
        refuse_computed_inside(model, held, watch.is_table)
        changes[:] = plain_changes(held.changes())
        return result

    shell = _with_forward(model, watched)
    with ExitStack() as stack:
        held = stack.enter_context(restored(model))
        for context in (
            # It works on stand-ins for parameters and buffers, but on other tensors themselves.
            *(refusing_reads(memory_of(held.unregistered)), watching_effects(refuse_effect)),
            *(questions.noted(), told(), _nothing_left(), watch, refusing_draws(held.generators), _silently()),
        ):
            stack.enter_context(context)

        def exported(dims: Sequence[Any]) -> torch.export.ExportedProgram:
            with heeding_interruptions(), heeding_refusals():
                return torch.export.export(shell, tuple(leaves), dynamic_shapes=(tuple(dims),), strict=False)

        batches = [_dynamic(leaf.shape[:1]) for leaf in leaves]
        dynamic = batches if is_of_one_size else [_dynamic(leaf.shape) for leaf in leaves]
        try:
            with bounded_effort() if dynamic != batches else nullcontext():
                program = exported(dynamic)
        except UntraceableError:
            raise
        except Exception:
            # Some code goes with any batch, and with no other size, or with too much effort.
            if batches == dynamic:
                raise
            questions.forget()
            dynamic = batches
            program = exported(dynamic)
        _refuse_transforms(program.graph)
        refuse_computed_outside(held, watch.is_table)
        first = list(changes)
        leave(first)
        if first and (str(exported(dynamic).graph) != str(program.graph) or not same_changes(first, changes)):
            raise progress(first[0])
        of_ones = questions.guards(_own_values(program))
        return Program(program.module(), [*_guards(program), *of_ones], of_ones)


def _dynamic(shape: Sequence[int]) -> dict[int, Any] | None:
    """Return which dims of an input may be of other sizes: all that are not one, unless the model's code says no."""
    return {dim: torch.export.Dim.AUTO for dim, size in enumerate(shape) if size > 1} or None


def _with_forward(model: nn.Module, forward: Callable[..., list[Any]]) -> nn.Module:
    """Return a shallow copy of a model, with another forward that calls the model."""
    shell = copy.copy(model)
    shell.forward = forward
    if has_own_call(model):
        # That too is in the call inside.
        shell.__class__ = type(type(model).__name__, (type(model),), {"__call__": nn.Module.__call__})
    # The hooks are the model's, which is called inside.
    shell._forward_hooks, shell._forward_pre_hooks = OrderedDict(), OrderedDict()
    return shell


def _guards(program: torch.export.ExportedProgram) -> list[str]:
    """Return the conditions under which a program is the model, on `leaves`."""
    # How a tensor lies in memory changes nothing of what is computed.
    kept = [guard for guard in program._guards_code if "stride()" not in guard and "storage_offset" not in guard]
    return [guard.replace("L['leaves']", "leaves") for guard in kept]


def _own_values(program: torch.export.ExportedProgram) -> list[Tensor]:
    """Return the symbolic tensors that stand for the inputs."""
    placeholders = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    return [placeholders[str(name)].meta["val"] for name in program.graph_signature.user_inputs]


def _refuse_transforms(graph: fx.Graph) -> None:
    """Check that a graph does not open and close levels of vmap, grad or jvp: ops in between see batched tensors."""
    for node in graph.nodes:
        if getattr(node.target, "__module__", None) == _TRANSFORMS:
            raise UntraceableError(f"the exported graph has a part under a transform of torch.func ({node.name})")


@contextmanager
def _silently() -> Iterator[None]:
    """Silence the exporter, which prints the graph it has got when it fails: here another front end is asked then."""
    with warnings.catch_warnings(), quiet(), redirect_stderr(StringIO()):
        # What a model keeps is looked at here, and what recurrent layers keep are their own weights.
        warnings.filterwarnings("ignore", "The tensor attributes? self", UserWarning)
        yield


@contextmanager
def _nothing_left() -> Iterator[None]:
    """Take out what torch leaves behind: the last graph, and when an export fails, a hook on all buffers (in 2.11)."""
    before = set(_global_buffer_registration_hooks)
    try:
        yield
    finally:
        for key in set(_global_buffer_registration_hooks) - before:
            del _global_buffer_registration_hooks[key]
        getattr(proxy_tensor, "_FAKE_TENSOR_ID_TO_PROXY_MAP_FOR_EXPORT", {}).clear()
