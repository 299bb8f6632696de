"""What each dim of each parameter does for its channels: writes them, reads them, or acts on each alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from fxwidth.analysis.result import Analysis, Dim
from fxwidth.axes.factors import ONE, axis_size
from fxwidth.recording.tape import OpCall, storage_of
from fxwidth.rules.family_table import adds, family_of
from fxwidth.rules.op_families import Move, Movement, Product, WeightNorm

Lineage = tuple[frozenset[Dim], ...]


class Role(StrEnum):
    """A writer's rows make the channels, a reader's columns consume them, a per-channel tensor scales each alone."""

    WRITER = "writer"
    READER = "reader"
    PER_CHANNEL = "per-channel"


@dataclass(frozen=True)
class Reading:
    """A parameter that contracts a dim of an activation: the reader of whatever channels that dim is made of."""

    call: OpCall
    activation: Tensor
    activation_dim: int
    parameter: str
    parameter_dim: int


@dataclass(frozen=True)
class Roles:
    """The role of each parameter dim that the graph uses, and where parameters read activations."""

    by_dim: dict[Dim, Role]
    readings: tuple[Reading, ...]
    lineage: dict[Tensor, Lineage]

    def is_parameter(self, tensor: Tensor) -> bool:
        """Tell whether a tensor of the tape is made of parameters alone."""
        return tensor in self.lineage


def find_roles(analysis: Analysis) -> Roles:
    """Follow every parameter along the tape to the ops that use it."""
    lineage: dict[Tensor, Lineage] = {
        entry.fake: tuple([frozenset({(name, dim)}) for dim in range(len(entry.axes))])
        for name, entry in analysis.parameters.items()
    }
    by_dim: dict[Dim, Role] = {}
    readings: list[Reading] = []
    made_in: defaultdict[int, list[Tensor]] = defaultdict(list)
    for call in analysis.calls:
        inputs = call.inputs
        if call.func._schema.is_mutable and any(tensor not in lineage for tensor in inputs):
            # What was made of parameters alone is so no longer, under any of its names.
            for output in call.outputs:
                for key in made_in.pop(storage_of(output), ()):
                    lineage.pop(key, None)
        if inputs and all(tensor in lineage for tensor in inputs):
            for output in call.outputs:
                if output not in lineage:
                    lineage[output] = _through(call, inputs, output, lineage)
                    made_in[storage_of(output)].append(output)
            if not call.contractions:
                continue
        readings += _contraction_roles(call, lineage, by_dim)
        for tensor in inputs:
            _per_channel_roles(call, tensor, lineage, by_dim)
    return Roles(by_dim, tuple(readings), lineage)


_STRONGER = {Role.READER: 2, Role.WRITER: 1, Role.PER_CHANNEL: 0}


def _assign(by_dim: dict[Dim, Role], dims: Iterable[Dim], role: Role) -> None:
    for dim in dims:
        if dim not in by_dim or _STRONGER[role] > _STRONGER[by_dim[dim]]:
            by_dim[dim] = role


def _contraction_roles(call: OpCall, lineage: dict[Tensor, Lineage], by_dim: dict[Dim, Role]) -> list[Reading]:
    readings = []
    for contraction in call.contractions:
        sides = (
            (contraction.left, contraction.left_dims, contraction.right, contraction.right_dims),
            (contraction.right, contraction.right_dims, contraction.left, contraction.left_dims),
        )
        for own, own_dims, other, other_dims in sides:
            if own not in lineage:
                continue
            for dim, sources in enumerate(lineage[own]):
                _assign(by_dim, sources, Role.READER if dim in own_dims else Role.WRITER)
            if other not in lineage:
                readings += [
                    Reading(call, other, other_dim, *source)
                    for own_dim, other_dim in zip(own_dims, other_dims, strict=True)
                    for source in lineage[own][own_dim]
                ]
    return readings


def _per_channel_roles(call: OpCall, tensor: Tensor, lineage: dict[Tensor, Lineage], by_dim: dict[Dim, Role]) -> None:
    if tensor not in lineage:
        return
    if any(tensor is contraction.left or tensor is contraction.right for contraction in call.contractions):
        return
    # What is added to the channels writes them; what multiplies or normalises them acts on each alone.
    writes = bool(call.contractions) or adds(call.func)
    for sources in lineage[tensor]:
        _assign(by_dim, sources, Role.WRITER if writes else Role.PER_CHANNEL)


def _through(call: OpCall, inputs: list[Tensor], output: Tensor, lineage: dict[Tensor, Lineage]) -> Lineage:
    """Follow parameter dims through an op on parameters alone: exactly for movements, broadly for the rest."""
    family = family_of(call.func)
    if len(inputs) == 1:
        source = lineage[inputs[0]]
        if family == Movement(Move.PERMUTATION):
            return tuple(source[dim] for dim in _permuted(call, len(source)))
        if output.dim() == len(source) and tuple(output.shape) == tuple(map(axis_size, call.axes[inputs[0]])):
            return source
    if isinstance(family, WeightNorm) and output.dim() == call.arguments["v"].dim():
        direction, gain = (lineage[call.arguments[part]] for part in ("v", "g"))
        axes = call.axes[call.arguments["g"]]
        lengths = [gain[dim] if dim < len(axes) and axes[dim] != ONE else frozenset() for dim in range(output.dim())]
        return tuple(one | other for one, other in zip(direction, lengths, strict=True))
    if isinstance(family, Product) and len(inputs) == 2:
        return _of_product(family, *(lineage[call.arguments[name]] for name in (family.left, family.right)))
    # A number has no dims to give.
    inputs = [tensor for tensor in inputs if lineage[tensor]]
    # Broadcasting aligns from the last dim; where that does not fit, any dim may come from any other.
    same_rank = all(len(lineage[tensor]) == output.dim() for tensor in inputs)
    if same_rank and family != Movement(Move.RESHAPE):
        columns = zip(*(lineage[tensor] for tensor in inputs), strict=True)
        return tuple(frozenset().union(*column) for column in columns)
    everything: frozenset[Dim] = frozenset().union(*(dims for tensor in inputs for dims in lineage[tensor]))
    return (everything,) * output.dim()


def _permuted(call: OpCall, rank: int) -> list[int]:
    """Return the dim of its operand that each dim of a permutation's result is."""
    arguments, order = call.arguments, list(range(rank))
    if "dims" in arguments:
        return list(arguments["dims"])
    i, j = (arguments["dim0"], arguments["dim1"]) if "dim0" in arguments else (0, -1)
    if order:
        order[i], order[j] = order[j], order[i]
    return order


def _of_product(family: Product, left: Lineage, right: Lineage) -> Lineage:
    """Return the parameter dims that each dim of a product of parameters comes from."""
    sides = [dict(zip(letters, dims, strict=True)) for letters, dims in zip(family.terms, (left, right), strict=False)]
    return tuple(frozenset[Dim]().union(*(side.get(letter, ()) for side in sides)) for letter in family.terms[2])
