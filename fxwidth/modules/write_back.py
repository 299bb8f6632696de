"""The widths, parameters and buffers of a graph put into a module of the class that was traced."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar, overload

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fxwidth.analysis.result import Analysis
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.errors import FxwidthError
from fxwidth.frontends.exported_programs import program_of_graph
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.modules.class_fit import fit_class
from fxwidth.modules.class_runs import ClassRuns, Failure
from fxwidth.modules.model_edits import ModelEdits
from fxwidth.modules.proofs import refuse_other_values
from fxwidth.modules.rebuilding import plain_objects, unsaved_tensors
from fxwidth.recording.width_history import note_written_back
from fxwidth.rewriting.graph_calls import arguments_of_graph
from fxwidth.rewriting.originals import is_traced_from, original_of, part_others, remember_original
from fxwidth.rewriting.successors import twin
from fxwidth.rewriting.transaction import Transaction
from fxwidth.runtime.tensor_slots import named_tensors, set_slot
from fxwidth.tracing.analyze import analyze_module

_Model = TypeVar("_Model", bound=nn.Module)


@overload
def write_back(gm: fx.GraphModule, model: _Model) -> _Model: ...
@overload
def write_back(gm: fx.GraphModule, model: ExportedProgram) -> ExportedProgram: ...
def write_back(gm: fx.GraphModule, model: nn.Module | ExportedProgram) -> nn.Module | ExportedProgram:
    """Put the widths, parameters and buffers of a graph into a module of the class that was traced.

    The sizes that the class keeps in attributes and in its configuration are set to what is needed; which these are is
    found by trial, and judged by the ATen ops that the module's own forward then runs: they must be those of the graph,
    at two batch sizes, in evaluation and in training, and the outputs must be equal. The module shares its parameters
    with the graph from then on, so that an optimizer of the graph goes on with it, and is resized with it where it can
    be; where the model that was traced is another one that is resized with the graph, it gets copies.

    Of a configuration in which a size changes, and of any other object, the model gets a copy that all of its modules
    share: what others hold stays as it is. What cannot be copied is refused.

    What the forward does not read, such as `num_features` of timm, stays: no trial tells that it is such a size.
    Parameters that it reads in no mode, such as the mask token of a classifier, get the size that the configuration
    gives them, with their first entries.

    A model of Hugging Face transformers gets a configuration from which `from_pretrained` builds the same sizes.

    An ExportedProgram is not written to: a copy of the graph becomes a new one, with the signature, the kind (training
    or inference IR) and the sizes of inputs of the one that was traced.

    Args:
        gm: the graph, resized or not.
        model: the model that was traced, another one of its class, or one on the meta device; or the ExportedProgram.

    Returns:
        `model`, or the new ExportedProgram.

    Raises:
        FxwidthError: the class cannot hold these widths; the message names the place in its code or the entry of its
            configuration, and what would do. Nothing has changed. So it is after any other exception, Ctrl-C included.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.resize(fxwidth.trace(net, torch.randn(2, 8)), {"0": 10})
        >>> fresh = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> fxwidth.write_back(gm, fresh)[0].out_features
        10
    """
    if not isinstance(gm, fx.GraphModule):
        raise FxwidthError(f"write_back takes a graph from fxwidth.trace, but received {type(gm).__name__}.")
    if isinstance(model, ExportedProgram):
        # What the graph becomes later is no concern of the program.
        program = program_of_graph(copy.deepcopy(gm), model)
        note_written_back(program, gm, is_traced=False)
        return program
    if not isinstance(model, nn.Module) or isinstance(model, fx.GraphModule):
        raise FxwidthError(
            f"write_back takes a module of the class that was traced, but received {type(model).__name__}."
        )
    transaction = Transaction(gm, model, objects=plain_objects(model))
    is_traced = is_traced_from(gm, model)
    transaction.run(lambda: _written(gm, model, transaction))
    note_written_back(model, gm, is_traced)
    return model


def written_back(gm: fx.GraphModule, model: _Model, transaction: Transaction) -> _Model:
    """Do what `write_back` does within a transaction of the two, and of the objects that the model keeps sizes in."""
    _written(gm, model, transaction)
    return model


def _written(gm: fx.GraphModule, model: nn.Module, transaction: Transaction) -> None:
    analysis = analyze_module(gm)
    runs = ClassRuns(analysis, model, arguments_of_graph(gm))
    _refuse_other_names(runs)
    part_others(gm, model, transaction)
    fitted = fit_class(runs, IndexMaps(analysis.space, {}), ModelEdits(model))
    if fitted.problem is not None:
        raise FxwidthError(_refusal(analysis, model, fitted.problem))
    _put_in_place(gm, runs, fitted.built)
    refuse_other_values(gm, model, runs)


def _refuse_other_names(runs: ClassRuns) -> None:
    """Check that graph and model have the same tensors, by their names."""
    model, graph = runs.model, runs.analysis.module
    own = named_tensors(model)
    # Where a model cannot be taken apart, the graph has it as a part, and each parameter by two names.
    of_graph = named_tensors(graph)
    known = {id(tensor) for name, tensor in of_graph.items() if name in own}
    for name, tensor in of_graph.items():
        if isinstance(tensor, nn.Parameter) and id(tensor) not in known:
            raise FxwidthError(
                f"{name} of the graph is none of {type(model).__name__}; pass a module of the class that was traced, "
                "built as that was. Where a pass has folded or split layers since, no module of the class has these: "
                "write back before such a pass, or keep the graph."
            )
    for name, (tensor, _) in runs.slots.items():
        if name not in runs.entries and tensor.is_meta and name not in unsaved_tensors(model):
            raise FxwidthError(
                f"{name} is on the meta device and not in the graph, as nothing there uses it; load it into the module "
                "first, or pass one that has its tensors."
            )


def _put_in_place(gm: fx.GraphModule, runs: ClassRuns, built: nn.Module | None) -> None:
    """Give the model the tensors of the graph."""
    original = original_of(gm)
    shares = original is None or original is runs.model
    anew = {} if built is None else named_tensors(built)
    for name, (tensor, places) in runs.slots.items():
        if name in runs.dead and name in anew and anew[name].shape != tensor.shape:
            new = _cut(tensor, anew[name].shape)
        elif name in runs.entries:
            entry: Tensor = runs.analysis.parameters[runs.entries[name]].tensor
            new = entry if shares else twin(entry, entry)
        elif tensor.is_meta and name in anew and not anew[name].is_meta:
            new = anew[name]
        else:
            continue
        for holder, attribute in places:
            set_slot(holder, attribute, new)
    if shares:
        remember_original(gm, runs.model, arguments_of_graph(gm))


def _cut(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a parameter of another shape that nothing uses: with the first entries, and zeros beyond."""
    new = tensor.detach().new_zeros(tuple(shape))
    both = tuple(slice(min(one, other)) for one, other in zip(tensor.shape, shape, strict=True))
    new[both] = tensor.detach()[both]
    return nn.Parameter(new, tensor.requires_grad)


def _refusal(analysis: Analysis, model: nn.Module, problem: Failure | str) -> str:
    """Tell what is in the way of widths, at which groups, and what would do."""
    groups: list[str] = []
    if isinstance(problem, Failure):
        parts = [group for group in WidthGraph(analysis).groups if group.pinned is None]
        inside = [g for g in parts if any(site.parameter.startswith(f"{problem.part}.") for site in g.sites)]
        groups = [f"{group.name!r} ({group.width})" for group in inside[:4]]
    at = f" Groups that occur there: {', '.join(groups)}." if groups else ""
    return (
        f"{type(model).__name__} cannot hold the widths of this graph: {problem}.{at} Plan widths that it can hold, by "
        "fxwidth.plan(width_graph, ..., for_module=model) before the resize: it keeps sizes equal for which the class "
        "has one number, such as query and value heads or the layers of one configuration, and others as they are."
    )
