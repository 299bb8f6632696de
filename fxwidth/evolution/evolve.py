"""All steps of a resize in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar, Unpack, overload

from torch import fx, nn
from torch.distributed import ProcessGroup
from torch.export import ExportedProgram

from fxwidth.distributed.replicas import Replicas
from fxwidth.distributed.sharded import Shard
from fxwidth.distributed.wrappers import unwrapped
from fxwidth.errors import FxwidthError
from fxwidth.frontends.exported_programs import program_of_graph
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.modules.rebuilding import plain_objects
from fxwidth.modules.write_back import written_back
from fxwidth.option_keywords import EvolveKeywords
from fxwidth.options import PlanOptions, ResizeOptions, both_options, tells_options
from fxwidth.planning.planner import Plan, plan_with_evidence
from fxwidth.recording.width_history import note_written_back
from fxwidth.resizing.resize import resize_analyzed
from fxwidth.rewriting.optimizers import Optimizers, check_optimizer
from fxwidth.rewriting.transaction import Transaction
from fxwidth.runtime.process_groups import ranks_at_work
from fxwidth.tracing.analyze import analyze_module, refuse_without_parameters
from fxwidth.tracing.trace import traced_model
from fxwidth.work_progress import Progress, listening, tell

_OUTPUTS = ("graph", "module")
_Model = TypeVar("_Model", bound=nn.Module)


@overload
def evolve(
    model: nn.Module,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    optimizer: Optimizers | None = None,
    process_group: ProcessGroup | None = None,
    shard: Shard | None = None,
    progress: Progress = True,
    output: Literal["graph"] = "graph",
    **options: Unpack[EvolveKeywords],
) -> fx.GraphModule: ...
@overload
def evolve(
    model: _Model,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    optimizer: Optimizers | None = None,
    process_group: ProcessGroup | None = None,
    shard: Shard | None = None,
    progress: Progress = True,
    output: Literal["module"],
    **options: Unpack[EvolveKeywords],
) -> _Model: ...
@overload
def evolve(
    model: ExportedProgram,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    progress: Progress = True,
    **options: Unpack[EvolveKeywords],
) -> ExportedProgram: ...
@tells_options(PlanOptions, ResizeOptions)
def evolve(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    optimizer: Optimizers | None = None,
    process_group: ProcessGroup | None = None,
    shard: Shard | None = None,
    progress: Progress = True,
    output: Literal["graph", "module"] = "graph",
    **options: Unpack[EvolveKeywords],
) -> nn.Module | ExportedProgram:
    """Trace a model, plan new widths by its spectra, and resize it.

    Args:
        model: any module or GraphModule. The returned graph is the model to use from now on; a GraphModule is resized
            itself, unless its parameters are among its inputs (see `fxwidth.trace`), another module if its own code
            does at the new widths what the graph does, and else stays as it was: see `fxwidth.resize`. Of a
            DistributedDataParallel it is the graph in it. An ExportedProgram stays as it was, and a new one is returned
            that takes the same inputs and is of the same kind, training or inference IR.
        example_inputs: as for `fxwidth.trace`; needless when the graph carries shapes.
        example_kwargs: arguments by name, beside positional ones in `example_inputs`.
        optimizer: the optimizer that trains the model; a list where several do, each for its parameters.
        process_group: the ranks of `torch.distributed` that hold the same network and do this together, each with
            `data` of its own. Needless where a DistributedDataParallel is around the graph: that tells it, and its
            reducer is made anew.
        shard: for a graph sharded by `torch.distributed.fsdp.fully_shard`, the function that does it; see `Evolver`.
        output: "graph" for the resized graph, or "module" for the model itself: the plan is then one that its class can
            hold (`for_module=model`), and its widths are written back to it (`fxwidth.write_back`).
        progress: whether to show in a terminal, or else to log, after a second, how far the work has come; or a
            function that is called with a `ProgressUpdate` each time. An exception of it ends the work as Ctrl-C does.
        options: those of `fxwidth.plan`, e.g. `params=0.5` or `budget=`, and those of `fxwidth.resize`; `data`,
            `selection`, `exact`, `rotate` and `loss` are for both, a loss where it is looked at.

    Returns:
        The resized graph, the model, or an ExportedProgram.

    Raises:
        FxwidthError: the model, the inputs or the options cannot be used, or the class of the model cannot hold the
            widths; nothing has changed. So it is after any other exception, Ctrl-C included.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.evolve(net, torch.randn(2, 8), params=0.5)
        >>> sum(parameter.numel() for parameter in gm.parameters())
        95
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> fxwidth.evolve(net, torch.randn(2, 8), params=0.5, output="module")
        Sequential(
          (0): Linear(in_features=8, out_features=7, bias=True)
          (1): ReLU()
          (2): Linear(in_features=7, out_features=4, bias=True)
        )
    """
    if output not in _OUTPUTS:
        raise FxwidthError(f'output={output!r} must be "graph", or "module" for the model itself.')
    if isinstance(model, ExportedProgram):
        _refuse_for_programs(optimizer, output, {"process_group": process_group, "shard": shard})
    wrapper, model = model, unwrapped(model)
    to_module = output == "module" and not isinstance(model, fx.GraphModule)
    if to_module and isinstance(model, nn.Module):
        options = {"for_module": model, **options}
    planning, resizing = both_options(options, optimizer)
    modules = [model] if isinstance(model, nn.Module) else []
    for module in modules:
        check_optimizer(optimizer, module)
    objects = [one for module in modules for one in plain_objects(module)] if to_module else []
    traced: fx.GraphModule | None = None

    def work(transaction: Transaction) -> nn.Module | ExportedProgram:
        nonlocal traced
        traced = module = traced_model(model, example_inputs, example_kwargs)
        refuse_without_parameters(module)
        if module is not model and isinstance(model, fx.GraphModule):
            check_optimizer(optimizer, module)
        planned_and_resized(WidthGraph(analyze_module(module)), planning, resizing, transaction)
        if isinstance(model, ExportedProgram):
            tell("exporting", is_long=True)
            return program_of_graph(module, model)
        if to_module:
            tell("writing back")
            return written_back(module, model, transaction)
        return module

    def changed(result: nn.Module | ExportedProgram) -> list[nn.Module]:
        assert isinstance(result, nn.Module)
        return [result, *resizing.graphs_beside]

    def whole() -> nn.Module | ExportedProgram:
        replicas = Replicas.of(model, process_group, (), shard)
        return replicas.run(work, [*modules, *resizing.graphs_beside], changed, optimizer=optimizer, objects=objects)

    # The wrapper must not be garbage before.
    result = listening(progress, whole)
    if traced is not None and result is not traced:
        note_written_back(result, traced, is_traced=result is model)
    return wrapper if to_module else result


def _refuse_for_programs(optimizer: Optimizers | None, output: str, of_ranks: Mapping[str, Any]) -> None:
    """Check that nothing is asked of an ExportedProgram that goes with a module alone."""
    for name, value in of_ranks.items():
        if value is not None:
            raise FxwidthError(
                f"{name}= is for graphs that several ranks hold, and an ExportedProgram is given back as a new one. "
                "Resize a graph on all ranks, fxwidth.trace(program), and export that."
            )
    if optimizer is not None:
        raise FxwidthError(
            "optimizer= trains the parameters of a module, and an ExportedProgram is given back as a new one. Make the "
            "optimizer for a graph, fxwidth.trace(program), and resize that."
        )
    if output == "module":
        raise FxwidthError(
            'output="module" is for models of a class of their own; an ExportedProgram is given back as one. Leave it '
            "out."
        )


def planned_and_resized(
    width_graph: WidthGraph,
    planning: PlanOptions,
    resizing: ResizeOptions,
    transaction: Transaction,
    revise: Callable[[Plan], Plan] | None = None,
) -> tuple[Plan, fx.GraphModule]:
    """Plan and resize from the same evidence, so that it is gathered once.

    Args:
        width_graph: the graph, which has just been analysed.
        planning: how to plan.
        resizing: how to resize.
        transaction: that of which this is a part.
        revise: makes of the plan the one to be carried out.
    """
    # A plan counts on those changes of basis alone that the resize will make.
    chosen, evidence = plan_with_evidence(width_graph, replace(planning, rotate=resizing.rotates))
    chosen = chosen if revise is None else revise(chosen)
    if (ranks := ranks_at_work()) is not None:
        chosen = ranks.first("the plan", chosen)
    # Without a budget a plan does not look at the data, and a resize still can.
    return chosen, resize_analyzed(width_graph, chosen, resizing, evidence=evidence, transaction=transaction)
