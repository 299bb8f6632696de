"""Where the channels of an activation come from: the position in a parameter that each of its entries stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxwidth.analysis.result import Analysis
from fxwidth.axes.factors import Factor
from fxwidth.axes.index_maps import Indices
from fxwidth.recording.tape import OpCall, tensors_in, unbind
from fxwidth.rules.family_table import as_family, family_of, is_arithmetic, running_norm
from fxwidth.rules.op_families import Arithmetic, Attention, Convolution, Family, Norm, Product


@dataclass(frozen=True)
class Place:
    """Where a parameter holds the channels of a basis.

    Attributes:
        parameter: its name.
        dim: its dim.
        positions: the position of each channel of each head along the dim, [channels, heads].
        inverse: whether it goes with the inverse of what the others go with: it is multiplied with them.
    """

    parameter: str
    dim: int
    positions: Indices
    inverse: bool

    @property
    def identity(self) -> tuple[object, ...]:
        """What tells one place from another."""
        return self.parameter, self.dim, self.positions.shape, self.positions.tobytes(), self.inverse


@dataclass(frozen=True)
class Origins:
    """The way of one dim of a parameter along the tape.

    Attributes:
        parameter: its name.
        dim: the dim.
        of: the position along the dim that each entry of a tensor stands for, by the tensor's id, of its shape.
    """

    parameter: str
    dim: int
    of: Mapping[Tensor, Tensor]

    def along(self, tensor: Tensor, dim: int) -> Tensor | None:
        """Return the position that each entry along one dim of a tensor stands for; None if there is no such."""
        if tensor not in self.of:
            return None
        own = _without_copies(self.of[tensor].movedim(dim, -1))
        rows = own.reshape(-1, own.shape[-1])
        return None if (rows != rows[:1]).any() else rows[0].expand(tensor.shape[dim])


def origins(analysis: Analysis, factor: Factor, parameter: str, dim: int) -> Origins | None:
    """Follow one dim of a parameter to where its factor is summed over.

    Args:
        analysis: the tape.
        factor: whose channels are followed.
        parameter: the name of a parameter.
        dim: a dim of it that the factor is in.

    Returns:
        None where an op on the way is not one of those that a linear group may have.
    """
    entry = analysis.parameters[parameter]
    numbers = torch.arange(entry.tensor.shape[dim], device="cpu")
    of = {entry.fake: _along(numbers, dim, entry.tensor.shape)}
    for call in analysis.calls:
        known = {tensor: of[tensor] for tensor in call.inputs if tensor in of}
        if not known or not any(factor in analysis.space.factors(axis) for axes in call.output_axes for axis in axes):
            continue
        follow = _FOLLOWED.get(type(family_of(call.func)), _moved)
        try:
            results = follow(call, known)
        except (RuntimeError, IndexError, ValueError):
            return None
        of.update(zip(call.outputs, results, strict=True))
    return Origins(parameter, dim, of)


Known = Mapping[Tensor, Tensor]
_Follow = Callable[[OpCall, Known], Sequence[Tensor]]


def _along(numbers: Tensor, dim: int, shape: torch.Size) -> Tensor:
    """Return numbers along one dim of a shape."""
    return numbers.reshape([-1 if place == dim else 1 for place in range(len(shape))]).expand(shape)


def _without_copies(tensor: Tensor) -> Tensor:
    """Return a tensor without what `expand` has made of it, but for the last dim: one entry stands for all copies."""
    strides = [*tensor.stride()[:-1], 1]
    return tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)]


def _moved(call: OpCall, known: Known) -> Sequence[Tensor]:
    """Run an op on positions; sums and multiples have those of what they are made of."""
    if is_arithmetic(call.func, Arithmetic.SUM, Arithmetic.PRODUCT, Arithmetic.QUOTIENT):
        shape = call.outputs[0].shape
        first, *others = (one.broadcast_to(shape) for one in known.values())
        if any(not torch.equal(first, other) for other in others):
            raise ValueError("channels of two places of one parameter are added")
        return [first]
    arguments = pytree.tree_map_only(Tensor, lambda tensor: known[tensor].contiguous(), dict(call.arguments))
    args, kwargs = unbind(call.func, arguments)
    return tensors_in(call.func(*args, **kwargs))


def _product(call: OpCall, known: Known) -> Sequence[Tensor]:
    """Follow an operand of a matrix product along its dims that are not summed over, or what is added."""
    family = as_family(call.func, Product)
    assert family is not None
    left, right, result = family.terms
    letters = {family.left: left, family.right: right}
    shape = call.outputs[0].shape
    found = []
    for name, own in _operands(call, known):
        if name in letters:
            own = _without(own, letters[name], family.summed)
            kept = [letter for letter in letters[name] if letter not in family.summed]
            own = own.permute([kept.index(letter) for letter in result if letter in kept])
            own = own[tuple(slice(None) if letter in kept else None for letter in result)]
        found.append(own.broadcast_to(shape))
    return [_only(found)]


def _without(own: Tensor, letters: str, summed: Sequence[str]) -> Tensor:
    for letter in summed:
        own, letters = own.select(letters.index(letter), 0), letters.replace(letter, "")
    return own


def _attention(call: OpCall, known: Known) -> Sequence[Tensor]:
    """Follow values to what they are mixed to; queries and keys end here."""
    shape = call.outputs[0].shape
    found = [own for name, own in _operands(call, known) if name == "value"]
    return [_only([own.select(-2, 0).unsqueeze(-2).broadcast_to(shape) for own in found])]


def _convolution(call: OpCall, known: Known) -> Sequence[Tensor]:
    """Follow a kernel or bias to the output channels."""
    found = []
    for name, own in _operands(call, known):
        if name == "input" or (call.arguments.get("transposed") and call.arguments["groups"] > 1):
            raise ValueError("channels go through a grouped convolution")
        channels = 1 if name == "weight" and call.arguments.get("transposed") else 0
        vector = own.movedim(channels, -1).reshape(-1, own.shape[channels])[0]
        found.append(_along(vector, 1, call.outputs[0].shape))
    return [_only(found)]


def _batch_norm(call: OpCall, known: Known) -> Sequence[Tensor]:
    """Follow the channels that are normalised, the bias, or the running mean; what is saved is for training alone."""
    norm, found = running_norm(call.func), []
    for name, own in _operands(call, known):
        if norm is None or name not in ("input", norm.bias, norm.mean):
            raise ValueError("channels are scaled, each by itself")
        found.append(own if name == "input" else _along(own, 1, call.outputs[0].shape))
    return [_only(found), *(torch.zeros(output.shape, dtype=torch.int64, device="cpu") for output in call.outputs[1:])]


def _operands(call: OpCall, known: Known) -> list[tuple[str, Tensor]]:
    return [
        (name, known[value]) for name, value in call.arguments.items() if isinstance(value, Tensor) and value in known
    ]


def _only(found: list[Tensor]) -> Tensor:
    (one,) = found
    return one


_FOLLOWED: dict[type[Family | None], _Follow] = {
    Product: _product,
    Attention: _attention,
    Convolution: _convolution,
    Norm: _batch_norm,
}
