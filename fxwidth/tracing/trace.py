"""From a model to an fx graph that knows the shapes of its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.passes.shape_prop import TensorMetadata

from fxwidth.errors import FxwidthError
from fxwidth.frontends.call_signature import Call, arguments_of, call_of
from fxwidth.frontends.exported_programs import call_of_program, graph_of_program
from fxwidth.frontends.lifted_parameters import with_parameters
from fxwidth.frontends.untraceable import refuse_packed, refuse_scripts, refuse_sharded, refuse_unmade
from fxwidth.recording.graph_meta import CALL, note_original, notes_of
from fxwidth.rewriting.originals import remember_original
from fxwidth.rewriting.transaction import Transaction
from fxwidth.runtime.compiled_modules import uncompiled
from fxwidth.runtime.finiteness import refuse_nan
from fxwidth.tracing.analyze import analyze_module
from fxwidth.tracing.front_end_attempts import traced
from fxwidth.tracing.live_batch import read_batch_of_input
from fxwidth.work_progress import Progress, listening


def trace(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    progress: Progress = True,
) -> fx.GraphModule:
    """Return a model as an fx graph that records the shapes of its inputs.

    A GraphModule is taken as it is, and what `torch.compile(module)` returns as the module in it. Where
    `example_inputs` hold an `nn.Parameter`, as for graphs of dynamo, aot_autograd and `make_fx`, a copy of the graph is
    returned that holds copies of the parameters among its inputs, and takes those inputs that are left; so it is with
    an `nn.Buffer`, and with what dynamo names as a buffer. Of other inputs the sizes are not the graph's to change.

    Other modules are traced by `torch.fx` symbolic tracing, and by `torch.export` (non-strict, any size that the
    model's code allows) where that fails. The graph takes the arguments of the model, by position or by name, and
    returns what the model returns. Arguments that are left out are fixed at their defaults. It does in `train()` and
    `eval()` what the model does there: dropout, batch norm, noise, stochastic depth. Parts whose two modes no graph can
    hold are called as they are; where that cannot be, the graph is that of the mode the model is in, in which only
    dropout and batch norm follow, and an `FxwidthWarning` names the place.

    Parameters are shared with the model, so an optimizer made for the model goes on. A resize of the graph resizes the
    model too, if its own code does the same at the new widths; else the model stays as it is and shares nothing from
    then on. It is not kept alive by the graph. The graph may list its parameters in the order of their use: the state
    dict of an optimizer, which goes by order, belongs to an optimizer that is made for the same module.

    The graph of an ExportedProgram has tensors of its own, so that the program stays as it is, and is of the one mode
    that was exported; `fxwidth.write_back(gm, program)` makes a program of it again.

    Args:
        model: a module, in the mode (train or eval) that the graph is to start in, a GraphModule traced by anyone, or
            an ExportedProgram, whose own example inputs are taken where none are given.
        example_inputs: a tensor; a tuple of positional arguments; or a dict of arguments by name. Arguments may be
            lists, dicts and other objects with tensors in them. Of tensors only shapes and dtypes matter. The first
            dim, the batch, may differ later, and image sizes and lengths where the model's code lets them. Needless
            when the graph carries shapes or its first layers tell.
        example_kwargs: arguments by name, beside positional ones in `example_inputs`.
        progress: whether to show in a terminal, or else to log, after a second, how far the work has come; or a
            function that is called with a `ProgressUpdate` each time. An exception of it ends the work as Ctrl-C does.

    Raises:
        FxwidthError: the model cannot be traced, or does not run on the inputs.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> gm(torch.randn(5, 8)).shape
        torch.Size([5, 4])
    """
    return listening(progress, lambda: traced_model(model, example_inputs, example_kwargs))


def traced_model(
    model: nn.Module | ExportedProgram, example_inputs: Any = None, example_kwargs: Mapping[str, Any] | None = None
) -> fx.GraphModule:
    """Do what `trace` does, as a part of other work.

    Raises:
        FxwidthError: as for `trace`.
    """
    call, model = call_of(example_inputs, example_kwargs), uncompiled(model)
    is_captured = isinstance(model, ExportedProgram)
    if isinstance(model, ExportedProgram):
        call = call_of_program(model) if call is None else call
        model = graph_of_program(model)
    if not isinstance(model, nn.Module):
        raise FxwidthError(
            f"trace takes an nn.Module or a GraphModule, but received {_kind(model)}.{_instead_of(model)}"
        )
    # The exporter's settings are context variables: they end with the context.
    return copy_context().run(Transaction(model).run, partial(_trace, model, call, is_captured))


def _trace(model: nn.Module, call: Call | None, is_captured: bool) -> fx.GraphModule:
    refuse_scripts(model)
    refuse_unmade(model)
    refuse_sharded(model)
    refuse_packed(model)
    bound = with_parameters(model, call) if isinstance(model, fx.GraphModule) else None
    if bound is not None:
        model, call = bound.module, bound.call
    if isinstance(model, fx.GraphModule) and call is not None and (is_captured or bound is not None):
        read_batch_of_input(model, call)
    refuse_nan(model)
    module, analysis = (
        (model, analyze_module(model, call)) if isinstance(model, fx.GraphModule) else traced(model, call)
    )
    if module is not model:
        arguments = arguments_of(model, call)
        remember_original(module, model, arguments)
        notes_of(module)[CALL] = tuple((argument.name, argument.passing.value) for argument in arguments)
    _drop_postponed_annotations(module)
    for node in module.graph.nodes:
        value = analysis.node_values.get(node.name)
        if isinstance(value, Tensor):
            node.meta["tensor_meta"] = _metadata(value)
    note_original(module)
    return module


def _kind(given: Any) -> str:
    return f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__


def _instead_of(given: Any) -> str:
    """Return what to pass in the place of something that is often taken for a model."""
    if isinstance(given, type) and issubclass(given, nn.Module):
        return f" Make one: {given.__name__}(...)."
    if isinstance(given, (str, Path)):
        return " A file is read by fxwidth.load(path)."
    if isinstance(given, Mapping):
        return " A state dict belongs into a model: model.load_state_dict(state)."
    return " Put a function into the forward of an nn.Module." if callable(given) else ""


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
