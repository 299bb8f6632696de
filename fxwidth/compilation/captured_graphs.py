"""What dynamo has captured, as a graph of a model: what cannot be taken is refused, and sizes are those of tensors."""

from __future__ import annotations

import copy
import keyword
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator
from torch.fx.node import map_arg

from fxwidth.errors import FxwidthError

_EVOLVE = "shrink the model by fxwidth.evolve and compile what it returns by fxwidth.compile"
# What dynamo makes of L['x'], an argument.
_ARGUMENT = re.compile(r"^l_(\w+?)_$", re.IGNORECASE)


@dataclass(frozen=True)
class Captured:
    """A graph that takes tensors alone.

    Attributes:
        module: a copy of what was captured.
        inputs: an example of each input.
        positions: where in what was captured the inputs are.
        constants: the numbers by their positions that dynamo passes as tensors, and that are constants here.
        is_single: whether it returns one value, as a model does, where dynamo's returns a tuple of it.
    """

    module: fx.GraphModule
    inputs: tuple[Any, ...]
    positions: tuple[int, ...]
    constants: Mapping[int, float]
    is_single: bool


def captured(module: fx.GraphModule, inputs: Sequence[Any]) -> Captured:
    """Return a graph of dynamo's as one that takes tensors alone, named as the model's arguments where they tell.

    Args:
        module: the graph; it stays as it is.
        inputs: an example of each of its inputs; sizes that may be any are numbers among them.

    Raises:
        FxwidthError: the graph is needed with gradients, calls functions of its own, or takes numbers that are no
            sizes.
    """
    refuse_gradients(inputs, _switches_gradients_on(module))
    _refuse_functions(module)
    copied = fx.GraphModule(module, copy.deepcopy(module.graph))
    placeholders = copied.graph.find_nodes(op="placeholder")
    constants = {
        position: float(value)
        for position, (node, value) in enumerate(zip(placeholders, inputs, strict=True))
        if _is_number(node, value)
    }
    for position, value in constants.items():
        _put_in(placeholders[position], value)
    sizes = [position for position, value in enumerate(inputs) if not isinstance(value, Tensor)]
    left = [position for position in range(len(inputs)) if position not in (*sizes, *constants)]
    for position in sizes:
        _replace_size(placeholders[position], [placeholders[other] for other in left])
    _name_as_arguments([placeholders[position] for position in left])
    is_single = _takes_out_of_tuple(copied.graph)
    copied.graph.lint()
    copied.recompile()
    return Captured(copied, tuple(inputs[position] for position in left), tuple(left), constants, is_single)


def refuse_gradients(inputs: Sequence[Any], is_switched_on: bool = False) -> None:
    """Check that nobody needs the gradients of a graph.

    Args:
        inputs: what it is called with.
        is_switched_on: whether it asks for gradients itself.

    Raises:
        FxwidthError: one of its inputs needs them.
    """
    needing = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
    if needing and (is_switched_on or torch.is_grad_enabled()):
        what = "parameters require" if isinstance(needing[0], nn.Parameter) else "an input requires"
        raise FxwidthError(
            f"compile_backend is for inference, but gradients are on and {what} one, which the captured graph would "
            "not give to the model. Call the model under torch.no_grad() or torch.inference_mode(); to train, "
            f"{_EVOLVE}."
        )


def _switches_gradients_on(module: fx.GraphModule) -> bool:
    return any(
        node.target is torch._C._set_grad_enabled and bool(node.args and node.args[0]) for node in module.graph.nodes
    )


def _refuse_functions(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if isinstance(node.target, HigherOrderOperator):
            raise FxwidthError(
                f"the model calls torch's {node.target.name()!r}, which takes functions, such as the branches of "
                "torch.cond, and compile_backend does not look into them. Compile the parts around it, each by "
                f"torch.compile(part, backend=fxwidth.compile_backend(...)), or {_EVOLVE}."
            )


def _is_number(node: fx.Node, value: Any) -> bool:
    """Tell whether dynamo passes a Python number as a tensor, as it does with dynamic=True."""
    if not isinstance(value, Tensor) or value.dim() or value.dtype != torch.float64 or value.is_cuda:
        return False
    return bool(node.users) and all(user.op == "call_method" and user.target == "item" for user in node.users)


def _put_in(number: fx.Node, value: float) -> None:
    for read in list(number.users):
        # Not by replace_all_uses_with, which takes nodes alone.
        for user in list(read.users):
            user.args, user.kwargs = map_arg((user.args, user.kwargs), partial(_put_for, read, value))
        number.graph.erase_node(read)
    number.graph.erase_node(number)


def _put_for(node: fx.Node, value: float, argument: fx.Node) -> fx.Node | float:
    return value if argument is node else argument


def _replace_size(number: fx.Node, tensors: Sequence[fx.Node]) -> None:
    """Have the size of a tensor read where dynamo passes it as a number of its own."""
    graph = number.graph
    if number.users:
        found = next(_dims_of(number, tensors), None)
        if found is None:
            raise FxwidthError(
                f"the captured graph takes {number.name!r}, a number that is no size of its inputs, and may be any. "
                "Compile with torch.compile(model, dynamic=False, ...), or pass it as a tensor."
            )
        behind = next(node for node in graph.nodes if node.op != "placeholder")
        with graph.inserting_before(behind):
            number.replace_all_uses_with(graph.call_method("size", found))
    graph.erase_node(number)


def _dims_of(number: fx.Node, tensors: Sequence[fx.Node]) -> Iterator[tuple[fx.Node, int]]:
    symbol = _symbol(number.meta.get("example_value"))
    for node in tensors:
        value = node.meta.get("example_value")
        for dim, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if symbol is not None and _symbol(size) == symbol:
                yield node, dim


def _symbol(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else None


def _takes_out_of_tuple(graph: fx.Graph) -> bool:
    """Have a graph return what it returns a tuple of, for losses, which are functions of this; tell if it did."""
    output = graph.output_node()
    (returned,) = output.args
    if not isinstance(returned, (tuple, list)) or len(returned) != 1:
        return False
    output.args = (returned[0],)
    return True


def _name_as_arguments(placeholders: Sequence[fx.Node]) -> None:
    """Name inputs as the model names its arguments, so that batches of data can go by these names."""
    taken = {str(node.target) for node in placeholders}
    for node in placeholders:
        found = _ARGUMENT.match(str(node.target))
        name = found[1] if found is not None else ""
        if name.isidentifier() and not keyword.iskeyword(name) and name not in taken and "_modules_" not in name:
            taken.add(name)
            node.target = name


def refuse_other_constants(constants: Mapping[int, float], given: Sequence[Any]) -> None:
    """Check that the numbers among what dynamo gives are those that a graph has.

    Args:
        constants: the numbers by their positions.
        given: what dynamo gives.

    Raises:
        FxwidthError: one is another.
    """
    for position, value in constants.items():
        if float(given[position]) != value:
            raise FxwidthError(
                f"a number that the model computes with was {value} when compile_backend shrunk the model, and is "
                f"{float(given[position])} now. Pass it as a tensor, or call torch.compiler.reset(), after which the "
                "next call shrinks the model anew."
            )


def refuse_writes(module: fx.GraphModule, inputs: Sequence[Any], names: Mapping[int, str]) -> None:
    """Check by a run that a graph writes to none of its inputs, nor to a buffer.

    Args:
        module: the graph, with parameters and buffers among its inputs.
        inputs: an example of each.
        names: of parameters and buffers, by their positions.

    Raises:
        FxwidthError: it does.
    """
    given = [value.detach().clone() if isinstance(value, Tensor) else value for value in inputs]
    versions = [value._version for value in given]
    devices = {value.device.index for value in given if value.is_cuda}
    with torch.random.fork_rng(devices=sorted(index for index in devices if index is not None)), torch.no_grad():
        module(*given)
    for position, (value, before, version) in enumerate(zip(given, inputs, versions, strict=True)):
        if value._version != version or not _is_same(value, before):
            buffer = names.get(position)
            what = f"its buffer {buffer!r}" if buffer else f"input {position}"
            raise FxwidthError(
                f"the model writes to {what} when it is called, as batch norms do in training, and what is compiled "
                f"for the shrunken model would not do that to the model. Call model.eval() first; else {_EVOLVE}."
            )


def _is_same(value: Tensor, before: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(value), torch.nan_to_num(before.detach()))
