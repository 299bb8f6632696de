"""The first front end: `torch.fx` symbolic tracing of a model for one form of call."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Sequence
from typing import Any

from torch import fx, nn

from fxwidth.frontends.call_signature import Argument, Passing, arguments_of
from fxwidth.frontends.eager_answers import answering_as_in_eager_mode
from fxwidth.frontends.forgotten_state import refuse_progress, refuse_stores_inside, refuse_stores_outside
from fxwidth.frontends.generated_signature import set_kinds
from fxwidth.frontends.proxy_tracer import ProxyTracer
from fxwidth.frontends.random_draws import refusing_draws
from fxwidth.frontends.tracer_proxies import CodeTracer, assigned_buffers
from fxwidth.frontends.watched_tensors import SetterWatch, refusing_reads
from fxwidth.runtime.contexts import heeding_interruptions
from fxwidth.runtime.module_state import restored
from fxwidth.runtime.trace_guards import (
    Belongings,
    heeding_refusals,
    noticing,
)
from fxwidth.runtime.unseen_effects import refuse_effect, watching_effects


def symbolic_graph(
    model: nn.Module,
    arguments: Sequence[Argument],
    *,
    live_numbers: bool = True,
    leaves: Collection[nn.Module] = (),
    failed: list[nn.Module] | None = None,
    modes: dict[nn.Module, bool] | None = None,
) -> fx.GraphModule:
    """Return the graph of a model, traced by running it on proxies.

    Tensors stay inputs of the graph; flags, None and other objects are fixed, and a call with others is refused.

    Args:
        model: the module.
        arguments: those of its forward, with examples or defaults.
        live_numbers: whether numbers stay inputs too; a model that branches on them cannot be traced so.
        leaves: submodules that are called as they are.
        failed: takes the innermost submodule in which tracing ends, if it does.
        modes: takes the mode of each submodule when it is called as it is.
    """
    modes = {} if modes is None else modes
    modes.clear()
    failed = [] if failed is None else failed
    belongings = Belongings(model)
    with restored(model) as held:

        def traced() -> tuple[ProxyTracer, fx.Graph]:
            tracer = ProxyTracer(arguments, live_numbers, leaves, failed, belongings, held, modes)
            return tracer, _run(tracer, model)

        tracer, graph = traced()
        refuse_stores_inside(held, failed)
        refuse_stores_outside(held)
        belongings.refuse_replaced(failed)
        refuse_progress(model, held, str(graph), lambda: str(traced()[1]), failed)
        root = copy.copy(model)  # with the constants that the tracer keeps in it
    # Unpickling traces the generated code anew, which has nothing to do with the model's arguments.
    graph._tracer_cls = CodeTracer
    set_kinds(graph, ((argument.name, argument.kind) for argument in arguments))
    root._modules = {**model._modules, **tracer.helpers}
    return fx.GraphModule(root, graph, type(model).__name__)


def _run(tracer: ProxyTracer, model: nn.Module) -> fx.Graph:
    """Trace a model while all is watched that a graph would forget."""
    with (
        heeding_interruptions(),
        heeding_refusals(),
        refusing_draws(tracer.generators),
        noticing(tracer.autocasts),
        watching_effects(refuse_effect),
        answering_as_in_eager_mode(),
        assigned_buffers(),
        refusing_reads(tracer.watch.is_of_model),
        tracer.watch,
        SetterWatch(),
    ):
        return tracer.trace(model)


def graph_with_leaves(
    model: nn.Module, arguments: Sequence[Argument], leaves: list[nn.Module], modes: dict[nn.Module, bool] | None = None
) -> fx.GraphModule:
    """Return the graph of a model, in which parts that cannot be traced are called as they are.

    A part is the innermost module at which tracing ends. Where that is the model itself, the graph is one call of it,
    as `model`.

    Args:
        model: the module.
        arguments: those of its forward, with examples or defaults.
        leaves: submodules that are called as they are; takes those that are found.
        modes: takes the mode of each submodule when it is called as it is.
    """
    known = len(leaves)
    while True:
        failed: list[nn.Module] = []
        try:
            return symbolic_graph(model, arguments, live_numbers=False, leaves=leaves, failed=failed, modes=modes)
        except Exception:
            # A part that fails although it is called as it is, as a model that keeps what it computes, has no inside.
            if not failed or failed[0] is model or any(failed[0] is leaf for leaf in leaves):
                del leaves[known:]
                return one_call(model)
        leaves.append(failed[0])


def one_call(model: nn.Module) -> fx.GraphModule:
    """Return a graph that calls a model with the arguments it is given."""
    graph = fx.Graph()
    positional: list[fx.Node] = []
    named: dict[str, Any] = {}
    arguments = arguments_of(model, None)
    for argument in arguments:
        node = graph.create_node("placeholder", argument.name, argument.default, name=argument.name)
        if argument.passing is Passing.BY_POSITION or argument.kind is inspect.Parameter.POSITIONAL_ONLY:
            positional.append(node)
        else:
            named[argument.name] = node
    set_kinds(graph, ((argument.name, argument.kind) for argument in arguments))
    name = "model"
    while hasattr(model, name):
        name += "_"
    graph.output(graph.call_module(name, tuple(positional), named))
    return fx.GraphModule({name: model}, graph, type(model).__name__)
