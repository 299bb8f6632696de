"""What each dim of each parameter does for its channels: writes them, reads them, or acts on each alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import prod

from torch import Tensor

from fxwidth.analysis.result import Analysis, Dim
from fxwidth.axes.factor_space import FactorSpace
from fxwidth.axes.factors import ONE, Factor, axis_size
from fxwidth.recording.tape import Axes, Contraction, OpCall, storage_of
from fxwidth.rules.family_table import adds, family_of
from fxwidth.rules.op_families import FakeQuantization, Move, Movement, Product, WeightNorm
from fxwidth.rules.views import end_of_block

Factors = frozenset[Factor]
Provenance = tuple[frozenset[Dim], ...]


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
    provenance: dict[Tensor, Provenance]

    def is_parameter(self, tensor: Tensor) -> bool:
        """Tell whether a tensor of the tape is made of parameters alone."""
        return tensor in self.provenance

    def activation_products(self, call: OpCall) -> Iterator[Contraction]:
        """Yield the contractions of an op of which neither side is made of parameters alone."""
        for contraction in call.contractions:
            if not self.is_parameter(contraction.left) and not self.is_parameter(contraction.right):
                yield contraction


def find_roles(analysis: Analysis) -> Roles:
    """Follow every parameter along the tape to the ops that use it."""
    provenance: dict[Tensor, Provenance] = {
        entry.fake: tuple([frozenset({(name, dim)}) for dim in range(len(entry.axes))])
        for name, entry in analysis.parameters.items()
    }
    by_dim: dict[Dim, Role] = {}
    readings: list[Reading] = []
    made_in: defaultdict[int, list[Tensor]] = defaultdict(list)
    for call in analysis.calls:
        inputs = call.inputs
        traced = [tensor for tensor in inputs if tensor in provenance]
        if call.func._schema.is_mutable and len(traced) < len(inputs):
            # What was made of parameters alone is so no longer, under any of its names.
            for output in call.outputs:
                for key in made_in.pop(storage_of(output), ()):
                    provenance.pop(key, None)
            traced = [tensor for tensor in inputs if tensor in provenance]
        if inputs and len(traced) == len(inputs):
            for output in call.outputs:
                if output not in provenance:
                    provenance[output] = _through(analysis.space, call, inputs, output, provenance)
                    made_in[storage_of(output)].append(output)
            if not call.contractions:
                continue
        readings += _contraction_roles(call, provenance, by_dim)
        _per_channel_roles(call, traced, provenance, by_dim)
    return Roles(by_dim, tuple(readings), provenance)


_STRONGER = {Role.READER: 2, Role.WRITER: 1, Role.PER_CHANNEL: 0}


def _assign(by_dim: dict[Dim, Role], dims: Iterable[Dim], role: Role) -> None:
    for dim in dims:
        if dim not in by_dim or _STRONGER[role] > _STRONGER[by_dim[dim]]:
            by_dim[dim] = role


def _contraction_roles(call: OpCall, provenance: dict[Tensor, Provenance], by_dim: dict[Dim, Role]) -> list[Reading]:
    readings = []
    for contraction in call.contractions:
        sides = (
            (contraction.left, contraction.left_dims, contraction.right, contraction.right_dims),
            (contraction.right, contraction.right_dims, contraction.left, contraction.left_dims),
        )
        for own, own_dims, other, other_dims in sides:
            if own not in provenance:
                continue
            for dim, sources in enumerate(provenance[own]):
                _assign(by_dim, sources, Role.READER if dim in own_dims else Role.WRITER)
            if other not in provenance:
                readings += [
                    Reading(call, other, other_dim, *source)
                    for own_dim, other_dim in zip(own_dims, other_dims, strict=True)
                    for source in provenance[own][own_dim]
                ]
    return readings


def _per_channel_roles(
    call: OpCall, traced: Sequence[Tensor], provenance: dict[Tensor, Provenance], by_dim: dict[Dim, Role]
) -> None:
    if not traced:
        return
    # What is added to the channels writes them; what multiplies or normalises them acts on each alone.
    role = Role.WRITER if call.contractions or adds(call.func) else Role.PER_CHANNEL
    for tensor in traced:
        if not any(tensor is contraction.left or tensor is contraction.right for contraction in call.contractions):
            for sources in provenance[tensor]:
                _assign(by_dim, sources, role)


def _through(
    space: FactorSpace, call: OpCall, inputs: list[Tensor], output: Tensor, provenance: dict[Tensor, Provenance]
) -> Provenance:
    """Follow parameter dims through an op on parameters alone: exactly for movements, broadly for the rest."""
    family = family_of(call.func)
    if len(inputs) == 1:
        source = provenance[inputs[0]]
        if family == Movement(Move.PERMUTATION):
            return tuple(source[dim] for dim in _permuted(call, len(source)))
        shape = tuple(map(axis_size, call.axes[inputs[0]]))
        if tuple(output.shape) == shape and len(shape) == len(source):
            return source
        is_view = family in (Movement(Move.RESHAPE), Movement(Move.UNIT_DIMS))
        if is_view and output.numel() == prod(shape) > 0 and len(shape) == len(source):
            given, made = call.axes[inputs[0]], call.output_axes[0]
            return _reshaped(source, _sized(space, given), _sized(space, made))
    if isinstance(family, WeightNorm) and output.dim() == call.arguments["v"].dim():
        direction, gain = (provenance[call.arguments[part]] for part in ("v", "g"))
        axes = call.axes[call.arguments["g"]]
        lengths = [gain[dim] if dim < len(axes) and axes[dim] != ONE else frozenset() for dim in range(output.dim())]
        return tuple(one | other for one, other in zip(direction, lengths, strict=True))
    if isinstance(family, FakeQuantization) and call.arguments["self"] in provenance:
        result = list(provenance[call.arguments["self"]])
        if family.axis and call.arguments["scale"].numel() > 1:
            result[call.arguments[family.axis]] |= provenance[call.arguments["scale"]][0]
        return tuple(result)
    if isinstance(family, Product) and len(inputs) == 2:
        return _of_product(family, *(provenance[call.arguments[name]] for name in (family.left, family.right)))
    # A number has no dims to give.
    inputs = [tensor for tensor in inputs if provenance[tensor]]
    # Broadcasting aligns from the last dim; where that does not fit, any dim may come from any other.
    same_rank = all(len(provenance[tensor]) == output.dim() for tensor in inputs)
    if same_rank and family != Movement(Move.RESHAPE):
        columns = zip(*(provenance[tensor] for tensor in inputs), strict=True)
        return tuple(frozenset().union(*column) for column in columns)
    everything: frozenset[Dim] = frozenset().union(*(dims for tensor in inputs for dims in provenance[tensor]))
    return (everything,) * output.dim()


def _sized(space: FactorSpace, axes: Axes) -> list[tuple[int, Factors]]:
    return [(axis_size(axis), frozenset(space.factors(axis))) for axis in axes]


def _reshaped(source: Provenance, old: Sequence[tuple[int, Factors]], new: Sequence[tuple[int, Factors]]) -> Provenance:
    """Follow parameter dims through a view, by sizes and factors of the dims: those that share a factor are one.

    Where there is none, what is divided or put together goes to all dims of that block.
    """
    result = [
        frozenset[Dim]().union(*(dims for dims, (_, before) in zip(source, old, strict=True) if before & after))
        for _, after in new
    ]
    own = [dim for dim, (size, _) in enumerate(old) if size > 1]
    other = [dim for dim, (size, _) in enumerate(new) if size > 1]
    sizes, others = [old[dim][0] for dim in own], [new[dim][0] for dim in other]
    i = j = 0
    while i < len(own):
        first_i, first_j = i, j
        i, j = end_of_block(sizes, i, others, j)
        fixed = frozenset[Dim]().union(*(source[k] for k in own[first_i:i] if not old[k][1]))
        for dim in other[first_j:j]:
            result[dim] |= fixed
    return tuple(result)


def _permuted(call: OpCall, rank: int) -> list[int]:
    """Return the dim of its operand that each dim of a permutation's result is."""
    arguments, order = call.arguments, list(range(rank))
    if "dims" in arguments:
        return list(arguments["dims"])
    i, j = (arguments["dim0"], arguments["dim1"]) if "dim0" in arguments else (0, -1)
    if order:
        order[i], order[j] = order[j], order[i]
    return order


def _of_product(family: Product, left: Provenance, right: Provenance) -> Provenance:
    """Return the parameter dims that each dim of a product of parameters comes from."""
    sides = [dict(zip(letters, dims, strict=True)) for letters, dims in zip(family.terms, (left, right), strict=False)]
    return tuple(frozenset[Dim]().union(*(side.get(letter, ()) for side in sides)) for letter in family.terms[2])
