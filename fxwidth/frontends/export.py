"""The second front end: `torch.export`, for models whose Python code symbolic tracing cannot follow."""

from __future__ import annotations

import copy
import operator
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental import proxy_tensor
from torch.nn.modules.module import _global_buffer_registration_hooks

from fxwidth.frontends.batch_of_one import SizeQuestions
from fxwidth.frontends.call_signature import (
    INPUTS_MODULE,
    OUTPUTS_MODULE,
    Argument,
    Inputs,
    Outputs,
    invoke,
    native,
    refuse_guarded,
)
from fxwidth.frontends.eager_answers import answering_as_in_eager_mode
from fxwidth.frontends.forgotten_state import (
    leave,
    plain_changes,
    progress,
    refuse_computed_inside,
    refuse_computed_outside,
    same_changes,
)
from fxwidth.frontends.random_draws import refusing_draws
from fxwidth.frontends.tracer_proxies import CodeTracer
from fxwidth.frontends.watched_tensors import SetterWatch, memory_of, refusing_reads
from fxwidth.runtime.contexts import heeding_interruptions, quiet
from fxwidth.runtime.kept_objects import Change
from fxwidth.runtime.module_state import restored, same_values
from fxwidth.runtime.pytrees import Leaf, Structure, flatten, flatten_each, rebuild_each
from fxwidth.runtime.trace_guards import UntraceableError, refuse_iterators
from fxwidth.runtime.unseen_effects import refuse_effect, watching_effects

aten = torch.ops.aten
# What the exporter has checked about dtypes, which another precision or autocast need not fulfil.
_DROPPED = (aten._assert_tensor_metadata.default,)

_TRANSFORMS = "torch._functorch.predispatch"


def exported_graph(
    model: nn.Module,
    arguments: Sequence[Argument],
    device: torch.device,
    told: Callable[[], AbstractContextManager[None]] = answering_as_in_eager_mode,
) -> fx.GraphModule:
    """Return the graph of a model, exported for one form of call and any batch size.

    It takes the arguments of the model's forward and returns what the model returns. It shares the model's parameters
    and buffers, under their names.

    Args:
        model: the module.
        arguments: those of its forward, with examples or defaults.
        device: where its parameters are.
        told: the context in which the model may ask whether it is exported; by default it is told that it is not.
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
        program = _program(model, forward, examples, told)
    else:
        # A batch of one cannot be told from a dim that is merely broadcast.
        try:
            program = _program(model, forward, doubled, told)
        except Exception:
            program = _program(model, forward, examples, told)
        refuse_guarded(program.guards, examples)
    return _Reassembly(program, arguments, structures, answers[-1]).run()


def _program(
    model: nn.Module,
    forward: Callable[..., list[Any]],
    leaves: Sequence[Tensor],
    told: Callable[[], AbstractContextManager[None]],
) -> _Program:
    """Export a function of tensors with the parameters of a model, under their names."""
    import torch._dynamo.external_utils  # the exporter would, later

    questions = SizeQuestions()
    shell, watch, changes = copy.copy(model), SetterWatch(), list[Change]()

    def watched(*leaves: Any) -> list[Any]:
        watch.take(model.buffers())
        result = forward(*leaves)
        # Here, since the exporter puts attributes of submodules back when it ends.
        refuse_computed_inside(model, watch.is_table)
        changes[:] = plain_changes(held.own.changes())
        return result

    shell.forward = watched
    # The hooks are the model's, which is called inside.
    shell._forward_hooks, shell._forward_pre_hooks = OrderedDict(), OrderedDict()
    dynamic = tuple({0: torch.export.Dim.AUTO} if leaf.dim() and leaf.shape[0] > 1 else None for leaf in leaves)
    with ExitStack() as stack:
        held = stack.enter_context(restored(model))
        registered = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        # It works on stand-ins for parameters and buffers, but on other tensors themselves.
        others = [tensor for tensor in held.tensors if id(tensor) not in registered]
        for context in (
            *(same_values(others), refusing_reads(memory_of(others)), watching_effects(refuse_effect)),
            *(questions.heard(), told(), _nothing_left(), watch, refusing_draws(), _silently()),
        ):
            stack.enter_context(context)

        def exported() -> torch.export.ExportedProgram:
            with heeding_interruptions():
                return torch.export.export(shell, tuple(leaves), dynamic_shapes=(dynamic,), strict=False)

        program = exported()
        _refuse_transforms(program.graph)
        refuse_computed_outside(held, watch.is_table)
        first = list(changes)
        leave(first)
        if first and (str(exported().graph) != str(program.graph) or not same_changes(first, changes)):
            raise progress(first[0])
        # How a tensor lies in memory changes nothing of what is computed.
        kept = [guard for guard in program._guards_code if "stride()" not in guard and "storage_offset" not in guard]
        placeholders = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
        own = [placeholders[str(name)].meta["val"] for name in program.graph_signature.user_inputs]
        guards = [*(guard.replace("L['leaves']", "leaves") for guard in kept), *questions.guards(own)]
        return _Program(program.module(), guards)


@dataclass(frozen=True)
class _Program:
    """An exported graph, and the conditions on `leaves`, its inputs, under which it is the model."""

    module: fx.GraphModule
    guards: Sequence[str]


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


class Region(nn.Module):
    """A part of an exported graph that runs under autocast or without gradients, as the model wanted it."""

    def __init__(
        self, body: fx.GraphModule, context: Callable[..., AbstractContextManager[Any]], *settings: Any
    ) -> None:
        super().__init__()
        self.body = body
        self.context = context
        self.settings = settings

    def forward(self, *values: Any) -> Any:
        """Run the part."""
        with self.context(*self.settings):
            return self.body(*values)


class _Reassembly:
    """A graph with the arguments and the answer of the model, made from one with tensors alone."""

    def __init__(
        self,
        program: _Program,
        arguments: Sequence[Argument],
        structures: Sequence[Structure],
        answer: Structure,
    ) -> None:
        self._exported = program.module
        self._guards = program.guards
        self._arguments = arguments
        self._structures = structures
        self._answer = answer
        self._graph = fx.Graph(tracer_cls=CodeTracer)
        self._modules: dict[str, nn.Module] = {}

    def run(self) -> fx.GraphModule:
        """Return the graph with its module."""
        placeholders = self._exported.graph.find_nodes(op="placeholder")
        known: dict[fx.Node, Any] = dict(zip(placeholders, self._inputs(placeholders), strict=True))
        result = self._copy(self._exported, known)
        plain, value = native(self._answer, result)
        self._graph.output(value if plain else self._call(OUTPUTS_MODULE, Outputs(self._answer), result))
        for name, module in self._modules.items():
            self._exported.add_submodule(name, module)
        return fx.GraphModule(self._exported, self._graph, "Exported")

    def _inputs(self, leaves: Sequence[fx.Node]) -> list[fx.Node]:
        """Return the node of each tensor among the arguments."""
        names = [argument.name for argument in self._arguments]
        nodes = [
            self._graph.create_node("placeholder", argument.name, argument.default, name=argument.name)
            for argument in self._arguments
        ]
        shapes = [_known_shape(leaf.meta["val"]) for leaf in leaves]
        checked = self._call(INPUTS_MODULE, Inputs(names, self._structures, shapes, self._guards), nodes)
        direct = {part.position: i for i, part in enumerate(self._structures) if isinstance(part, Leaf)}
        return [
            nodes[direct[i]] if i in direct else self._graph.call_function(operator.getitem, (checked, i))
            for i in range(len(leaves))
        ]

    def _call(self, name: str, module: nn.Module, arguments: Sequence[fx.Node]) -> fx.Node:
        self._modules[name] = module
        return self._graph.create_node("call_module", name, tuple(arguments))

    def _copy(self, source: fx.GraphModule, known: dict[fx.Node, Any]) -> Sequence[Any]:
        """Copy the nodes of a graph and return what it returns."""
        for node in source.graph.nodes:
            if node.op == "output":
                result: Sequence[Any] = fx.node.map_arg(node.args[0], known.__getitem__)
                return result
            is_guard = node.op == "call_module" and node.target == "_guards_fn"
            if node.op == "placeholder" or is_guard or node.target in _DROPPED or _is_unused_attribute(source, node):
                continue
            operand = known.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
            if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
                known[node] = self._region(source, node, known)
            elif node.target is operator.getitem and isinstance(operand, (list, tuple)):
                known[node] = operand[node.args[1]]
            else:
                known[node] = self._graph.node_copy(node, known.__getitem__)
        return ()

    def _region(self, source: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        """Take a part that runs in a context of its own: copy its nodes where that does the same."""
        name = node.target.__name__ if callable(node.target) else str(node.target)
        graphs = [part for part in node.args if isinstance(part, fx.Node) and _is_graph(source, part)]
        if name not in _CONTEXTS or len(graphs) != 1:
            raise UntraceableError(f"the exported graph has a part of the kind {name}")
        place = node.args.index(graphs[0])
        settings = node.args[:place]
        operands: list[Any] = [fx.node.map_arg(part, known.__getitem__) for part in node.args[place + 1 :]]
        body = source.get_submodule(str(graphs[0].target))
        assert isinstance(body, fx.GraphModule)
        if name == "wrap_with_set_grad_enabled" and not _writes(body):
            own = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
            results = self._copy(body, own)
            return results if settings[0] else [self._graph.call_function(aten.detach.default, (r,)) for r in results]
        _drop_checks(body)
        region = Region(body, _CONTEXTS[name], *settings)
        return self._call(f"fxwidth_region_{len(self._modules)}", region, operands)


_CONTEXTS: dict[str, Callable[..., AbstractContextManager[Any]]] = {
    "wrap_with_set_grad_enabled": torch.set_grad_enabled,
    "wrap_with_autocast": torch.autocast,
}


def _is_graph(source: fx.GraphModule, part: Any) -> bool:
    return (
        isinstance(part, fx.Node)
        and part.op == "get_attr"
        and isinstance(getattr(source, str(part.target), None), fx.GraphModule)
    )


def _is_unused_attribute(source: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "get_attr" and (not node.users or _is_graph(source, node))


def _writes(body: fx.GraphModule) -> bool:
    return any(
        isinstance(node.target, torch._ops.HigherOrderOperator)
        or (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable)
        for node in body.graph.nodes
    )


def _drop_checks(body: fx.GraphModule) -> None:
    for node in list(body.graph.nodes):
        if node.target in _DROPPED:
            body.graph.erase_node(node)
    for part in body.children():
        if isinstance(part, fx.GraphModule):
            _drop_checks(part)
    body.recompile()


def _known_shape(value: Any) -> list[int | None] | None:
    if not isinstance(value, Tensor):
        return None
    return [size if isinstance(size, int) else None for size in value.shape]
