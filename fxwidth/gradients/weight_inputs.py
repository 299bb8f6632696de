"""Weights of products and convolutions as rows, one per output channel, and the inputs that each row meets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from fxwidth.recording.tape import OpCall, unbind
from fxwidth.rules.family_table import family_of, takes_rows
from fxwidth.rules.op_families import Convolution, Product
from fxwidth.weights.readers import Reader

# About how many numbers are laid out at a time.
_AT_ONCE = 2**24


def is_told(reader: Reader) -> bool:
    """Tell whether the inputs of a weight's rows can be laid out: those of a matrix, or of a real convolution."""
    family, weight = family_of(reader.call.func), reader.call.arguments[reader.weight]
    if not takes_rows(reader.call.func, reader.weight) or weight.is_complex():
        return False
    return isinstance(family, Convolution) or (isinstance(family, Product) and weight.dim() == 2)


def weight_rows(reader: Reader, weight: Tensor) -> Tensor:
    """Return a weight operand as [groups, outputs, inputs]; inputs of a convolution are channels and taps."""
    if not _convolves(reader):
        return weight.movedim(reader.weight_dim, -1)[None]
    parts: Tensor = weight.unflatten(0, (reader.groups, -1))
    return parts.transpose(1, 2).flatten(2) if reader.transposed else parts.flatten(2)


def weight_of_rows(reader: Reader, rows: Tensor, like: Tensor) -> Tensor:
    """Return the weight operand whose rows these are."""
    if not _convolves(reader):
        return rows[0].movedim(-1, reader.weight_dim)
    if reader.transposed:
        parts: Tensor = rows.unflatten(2, (-1, *like.shape[2:]))
        rows = parts.transpose(1, 2)
    return rows.reshape(like.shape)


def input_rows(reader: Reader, call: OpCall) -> Iterator[Tensor]:
    """Yield what the rows of a weight are multiplied with in a run, [groups, places, inputs], part by part."""
    source, weight = call.arguments[reader.source].detach(), call.arguments[reader.weight].detach()
    if not _convolves(reader):
        rows = source.movedim(reader.source_dim, -1).reshape(-1, source.shape[reader.source_dim])
        yield from (part[None] for part in rows.split(max(1, _AT_ONCE // rows.shape[1])))
        return
    inputs = weight_rows(reader, weight).shape[2]
    # With one output for each input, a convolution lays its inputs out, whatever its strides and dilations are.
    shape = list(weight.shape)
    shape[1 if reader.transposed else 0] = inputs * (1 if reader.transposed else reader.groups)
    unit = torch.eye(inputs, dtype=weight.dtype, device=weight.device).expand(reader.groups, inputs, inputs)
    unit = weight_of_rows(reader, unit, weight.new_empty(()).expand(shape))
    places = call.outputs[0].numel() // max(1, len(source) * call.outputs[0].shape[1])
    for part in source.split(max(1, _AT_ONCE // max(1, places * inputs * reader.groups))):
        laid = applied(call, {reader.source: part, reader.weight: unit})
        yield laid.unflatten(1, (reader.groups, inputs)).flatten(3).permute(1, 0, 3, 2).flatten(1, 2)


def output_sums(reader: Reader, outputs: Tensor) -> Tensor:
    """Return the sum over all places of an op's result, or of its gradient, [groups, outputs]."""
    sums = outputs.sum([dim for dim in range(outputs.dim()) if dim != _output_dim(reader, outputs)])
    return sums.reshape(reader.groups if _convolves(reader) else 1, -1)


def plus(reader: Reader, outputs: Tensor, constants: Tensor) -> Tensor:
    """Return an op's result with a constant added to each of its output channels, [groups, outputs]."""
    shape = [1] * outputs.dim()
    shape[_output_dim(reader, outputs)] = -1
    return outputs + constants.reshape(shape)


def applied(call: OpCall, other: dict[str, Tensor]) -> Tensor:
    """Return what an op of a run makes of other operands, without what it adds."""
    func: OpOverload = call.func
    arguments: dict[str, Any] = {name: _detached(value) for name, value in call.arguments.items()} | other
    family = family_of(func)
    if isinstance(family, Convolution):
        arguments["bias"] = None
        if "bias_sizes" in arguments:
            arguments["bias_sizes"] = None
    elif isinstance(family, Product) and family.added is not None:
        arguments[family.added] = torch.zeros_like(arguments[family.added])
    args, kwargs = unbind(func, arguments)
    result: Tensor = func(*args, **kwargs)
    return result


def _detached(value: object) -> object:
    return value.detach() if isinstance(value, Tensor) else value


def _convolves(reader: Reader) -> bool:
    return isinstance(family_of(reader.call.func), Convolution)


def _output_dim(reader: Reader, outputs: Tensor) -> int:
    return 1 if _convolves(reader) else outputs.dim() - 1
