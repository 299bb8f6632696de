"""An `ExportedProgram` as a graph that is called as it is, and such a graph as an `ExportedProgram` again."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument
from torch.utils import _pytree as pytree

from fxwidth.errors import FxwidthError
from fxwidth.frontends.call_signature import Call
from fxwidth.frontends.program_differences import refuse_lost
from fxwidth.frontends.program_sizes import DIMS, HINTS, dynamic_shapes, size_of
from fxwidth.runtime.contexts import quiet
from fxwidth.runtime.module_state import restored

# What torch notes of the values of nodes: symbols in them belong to the program, whose conditions must not grow.
_VALUES = ("val", "tensor_meta", "unbacked_bindings")
# The inference form, which `run_decompositions` makes: it has no op that writes, but outputs that are written.
_INFERENCE = "ATEN"


def graph_of_program(program: ExportedProgram) -> fx.GraphModule:
    """Return a program as a graph with tensors of its own, which is called as the program is.

    Raises:
        FxwidthError: nothing in it is a parameter, or it holds what no graph can.
    """
    _refuse_unresizable(program)
    module = copy.deepcopy(plain_graph(program))
    for node in module.graph.nodes:
        for key in _VALUES:
            node.meta.pop(key, None)
    # Constants are buffers here, which is what analyses and resizes know, and as before in no state dict.
    for name in (*_constants(program), *program.graph_signature.non_persistent_buffers):
        holder, _, attribute = name.rpartition(".")
        module.get_submodule(holder)._non_persistent_buffers_set.add(attribute)
    return module


def plain_graph(program: ExportedProgram) -> fx.GraphModule:
    """Return the graph of a program as a module of no special kind, with the tensors of the program."""
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    # A module of torch.export asks for all arguments at each call, and refuses train() and eval().
    result = _with_graph(module, module.graph)
    _tie(result)
    return result


def _tie(module: nn.Module) -> None:
    """Make one tensor of those that are the same memory, as torch reads a tensor that a file has under two names."""
    first: dict[Any, Tensor] = {}
    for part in module.modules():
        tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for held in tables:
            for name, tensor in held.items():
                if _is_in_memory(tensor):
                    held[name] = first.setdefault(_place(tensor), tensor)


def _is_in_memory(tensor: Any) -> bool:
    # Of other classes of tensors nobody knows where they are.
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return False
    return not tensor.is_meta and tensor.numel() > 0


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Return what two tensors have in common that are one."""
    memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
    return (*memory, tensor.is_conj(), tensor.is_neg(), type(tensor), tensor.requires_grad)


def _with_graph(module: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """Return a module of a graph that has the tensors of another one."""
    result = fx.GraphModule(module, graph, "Exported")
    for name, part in module.named_modules():
        unsaved = part._non_persistent_buffers_set
        if unsaved:
            # torch 2.11 saves them all.
            result.get_submodule(name)._non_persistent_buffers_set |= unsaved
    return result


def call_of_program(program: ExportedProgram) -> Call:
    """Return the example inputs of a program, or others of their sizes where it has none."""
    if program.example_inputs is not None:
        args, kwargs = program.example_inputs
        return Call(tuple(args), dict(kwargs))
    args, kwargs = pytree.tree_unflatten([_example(value) for value in _user_values(program)], _in_spec(program))
    return Call(tuple(args), kwargs)


def program_of_graph(module: fx.GraphModule, program: ExportedProgram) -> ExportedProgram:
    """Return a graph as a program that is called as another one is, with its signature and its sizes.

    Args:
        module: a graph from `graph_of_program`, resized or not; it stays as it is, and shares its tensors.
        program: the program that it was made of.

    Raises:
        FxwidthError: `torch.export` cannot make a program of it, or something of the first one would be lost.
    """
    shell = _with_constants(module, _constants(program))
    call = call_of_program(program)
    made = None
    for kind in (DIMS, HINTS):
        try:
            sizes = dynamic_shapes(_user_values(program), program.range_constraints, kind)
            # By position, those by name in their order: so `torch.export` takes the tree of the two.
            shapes = pytree.tree_unflatten(sizes, _in_spec(program))
            made = _exported(shell, call, (*shapes[0], *shapes[1].values()), program)
            break
        except Exception as error:
            # A condition that the graph itself asks for is no fault where a size is only said to be dynamic.
            failure = error
    if made is None:
        lines = str(failure).strip().splitlines() or [type(failure).__name__]
        raise FxwidthError(
            f"torch.export cannot make a program of the resized graph: {lines[0].rstrip('.')}. Go on with the graph "
            "itself: fxwidth.trace(program), then fxwidth.resize."
        ) from failure
    refuse_lost(program, made)
    made._example_inputs = program.example_inputs
    for key, value in program.graph_module.meta.items():
        made.graph_module.meta.setdefault(key, value)
    return made


def _exported(shell: fx.GraphModule, call: Call, shapes: tuple[Any, ...], program: ExportedProgram) -> ExportedProgram:
    with restored(shell), quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.export.export(shell, call.args, dict(call.kwargs), dynamic_shapes=shapes, strict=False)
        if program.dialect == _INFERENCE:
            # Nothing is decomposed: ops that write become outputs that are written.
            made = made.run_decompositions({})
    return made


def _with_constants(module: fx.GraphModule, names: set[str]) -> fx.GraphModule:
    """Return a copy of a graph, with the same tensors, that has constants as plain attributes, as they were."""
    shell = _with_graph(module, copy.deepcopy(module.graph))
    for name in names:
        holder, _, attribute = name.rpartition(".")
        part = shell.get_submodule(holder)
        if attribute in part._buffers:
            tensor = part._buffers.pop(attribute)
            part._non_persistent_buffers_set.discard(attribute)
            setattr(part, attribute, tensor)
    return shell


def _refuse_unresizable(program: ExportedProgram) -> None:
    signature = program.graph_signature
    if signature.backward_signature is not None:
        raise FxwidthError(
            "the ExportedProgram holds a forward and a backward pass in one graph, whose gradients would stay at the "
            "old sizes; export the forward pass alone."
        )
    other = [name for name, value in program.constants.items() if not isinstance(value, Tensor)]
    if other:
        raise FxwidthError(
            f"the ExportedProgram holds {other[0]!r}, a {type(program.constants[other[0]]).__name__}, of which nobody "
            "knows what widths are in it; export a model whose state is tensors."
        )
    if not signature.parameters:
        held = [len(signature.buffers), len(signature.lifted_tensor_constants), len(signature.user_inputs)]
        raise FxwidthError(
            f"nothing in the ExportedProgram is a parameter: it has {held[0]} buffers, {held[1]} constants and "
            f"{held[2]} inputs. Export a module whose weights are nn.Parameter, not one to which they are passed, nor "
            "a function."
        )
    kept = [entry.fqn for entry in program.module_call_graph if entry.fqn and entry.signature is not None]
    if kept:
        raise FxwidthError(
            f"the ExportedProgram keeps the calls of {', '.join(map(repr, kept))} for unflattening, which a resized "
            "graph has no longer; export without preserve_module_call_signature."
        )


def _constants(program: ExportedProgram) -> set[str]:
    """Return the names of tensors that are neither parameters nor buffers."""
    specs = program.graph_signature.input_specs
    return {str(spec.target) for spec in specs if spec.kind == InputKind.CONSTANT_TENSOR}


def _user_values(program: ExportedProgram) -> list[Any]:
    """Return what stands for each input: fake tensors, and other values as they are."""
    specs = [spec for spec in program.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
    known = {node.name: node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")}
    return [
        known[spec.arg.name] if isinstance(spec.arg, TensorArgument) else known.get(spec.arg.name) for spec in specs
    ]


def _in_spec(program: ExportedProgram) -> Any:
    return program.call_spec.in_spec


def _example(value: Any) -> Any:
    """Return a value for an input: numbers from a seed where it is a tensor of them, zeros of whole numbers."""
    if not isinstance(value, Tensor):
        return size_of(value) if isinstance(value, torch.SymInt) else value
    shape = [size_of(size) for size in value.shape]
    if not value.dtype.is_floating_point:
        return torch.zeros(shape, dtype=value.dtype, device=value.device)
    generator = torch.Generator().manual_seed(0)
    return torch.rand(shape, generator=generator, device="cpu").to(value.device, value.dtype)
