"""What an op does, declared once beside its rule: growth, costs, roles, weights, bases and rewriting read it here.

A family says by which names an op takes its operands and what it makes of them. An op that belongs to none is known by
its rule alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch._ops import OpOverload

from fxwidth.rules.op_names import Op, op_name, rule_name


@dataclass(frozen=True)
class Product:
    """A sum of products of two operands, and what is added to it.

    Attributes:
        left: the name of the first operand.
        right: the name of the second.
        formula: which dims they share and which are summed over, as in einsum, "ik,kj->ij".
        added: the name of the operand that is added to the result, broadcast.
    """

    left: str
    right: str
    formula: str
    added: str | None = None

    def __post_init__(self) -> None:
        left, right, result = self.terms
        letters = [*left, *right, *result]
        fit = all(len(set(term)) == len(term) for term in self.terms) and "".join(letters).isalpha()
        # A dim of one operand alone that is not in the result would be summed up without a product.
        if not fit or any((letter in left) + (letter in right) + (letter in result) < 2 for letter in letters):
            raise ValueError(f'{self.formula!r} is no sum of products of two operands, such as "ik,kj->ij"')

    @cached_property
    def terms(self) -> tuple[str, str, str]:
        """The letters of the left operand, the right one, and the result."""
        operands, arrow, result = self.formula.partition("->")
        left, comma, right = operands.partition(",")
        if not arrow or not comma:
            raise ValueError(f'{self.formula!r} is no formula of two operands, such as "ik,kj->ij"')
        return left, right, result

    @cached_property
    def summed(self) -> tuple[str, ...]:
        """The letters that are summed over."""
        left, _, result = self.terms
        return tuple(letter for letter in left if letter not in result)

    @cached_property
    def summed_dims(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The dims of either operand that are summed over."""
        left, right, _ = self.terms
        return tuple(map(left.index, self.summed)), tuple(map(right.index, self.summed))

    @cached_property
    def is_of_matrices(self) -> bool:
        """Tell whether it multiplies matrices, or batches of them.

        That is [*batch, i, k] with [*batch, k, j] to [*batch, i, j]; either matrix may come transposed.
        """
        left, right, result = self.terms
        batch = "".join(letter for letter in left if letter in right and letter in result)
        rows = [letter for letter in left if letter not in right]
        columns = [letter for letter in right if letter not in left]
        if (len(rows), len(columns), len(self.summed)) != (1, 1, 1) or result != batch + rows[0] + columns[0]:
            return False
        return left.startswith(batch) and right.startswith(batch)


@dataclass(frozen=True)
class GroupedProduct:
    """Rows multiplied with one of several matrices each, "ik,gkj->ij".

    Attributes:
        left: the name of the rows.
        right: the name of the matrices.
    """

    left: str
    right: str


@dataclass(frozen=True)
class Convolution:
    """A convolution, transposed or not, of `input` with `weight`, in `groups`."""


@dataclass(frozen=True)
class Attention:
    """softmax(query key^T * scale + mask) value."""


@dataclass(frozen=True)
class Cell:
    """A step of a recurrent layer from the sums of its gates."""


class NormKind(Enum):
    """Over what a norm takes statistics: samples and positions, the channels of each sample, or groups of these."""

    BATCH = auto()
    LAYER = auto()
    RMS = auto()
    GROUP = auto()


@dataclass(frozen=True)
class Norm:
    """A normalisation of `input` by its own statistics, or by running ones, with a gain `weight`.

    Attributes:
        kind: over what the statistics are taken.
        bias: the name of what is added; an RMS norm has none.
        mean: the name of the running mean; only batch norms have one.
        variance: the name of the running variance.
        eps: the name of what is added to the variance.
        training: the name of the argument that says whether a batch norm normalises by its own batch, or the answer.
    """

    kind: NormKind
    bias: str = "bias"
    mean: str = ""
    variance: str = ""
    eps: str = "eps"
    training: str | bool = False

    def by_own_batch(self, arguments: Mapping[str, Any]) -> bool:
        """Tell whether a call of a batch norm normalises by the statistics of its own batch."""
        told = self.training if isinstance(self.training, bool) else bool(arguments[self.training])
        return told or arguments.get(self.mean) is None


@dataclass(frozen=True)
class WeightNorm:
    """Slices of a weight `v` scaled to the lengths `g`."""


@dataclass(frozen=True)
class Reduction:
    """A reduction of `self` over some dims.

    Attributes:
        kind: what it makes of the entries, as told to users.
        linear: whether it is a sum of them, each times a number.
        zero_of_zeros: whether zeros give zero.
        extremum: whether it is one of the entries.
    """

    kind: str
    linear: bool = False
    zero_of_zeros: bool = False
    extremum: bool = False


class Move(Enum):
    """What a movement does with entries."""

    COPY = auto()
    """The same entries in the same places."""
    CAST = auto()
    """The same in another dtype."""
    RESHAPE = auto()
    """The same in the same order, under another shape."""
    RESHAPE_BY_STRIDES = auto()
    STRIDES = auto()
    PERMUTATION = auto()
    """Dims in another order."""
    UNIT_DIMS = auto()
    """Dims of size one come or go."""
    EXPANSION = auto()
    """One entry shown several times."""
    REPETITION = auto()
    PART = auto()
    SPLIT = auto()
    """All of it, in several parts along one dim that stays."""
    REORDERING = auto()
    """Entries of a dim in another order."""
    WINDOWS = auto()
    JOIN = auto()
    """Several tensors side by side."""


@dataclass(frozen=True)
class Movement:
    """Entries of `self`, or of several tensors, moved without being computed with."""

    kind: Move


@dataclass(frozen=True)
class LookUp:
    """Entries of a table at places that another operand holds.

    Attributes:
        table: the name of the table.
        index: the name of the places.
        slices: whether whole slices are looked up, so that all other dims of the table stay.
    """

    table: str
    index: str
    slices: bool = True


@dataclass(frozen=True)
class Positions:
    """An op over positions that treats all channels alike.

    Attributes:
        linear: whether results are sums of entries, each times a number; else the largest of them.
        within: whether results lie between the least and the largest entry.
    """

    linear: bool
    within: bool = False


class Arithmetic(Enum):
    """What an elementwise op makes of its two operands."""

    SUM = auto()
    DIFFERENCE = auto()
    PRODUCT = auto()
    QUOTIENT = auto()
    CHOICE = auto()
    """One of them, entry by entry."""
    WRITE = auto()
    """The second, in the place of the first."""


@dataclass(frozen=True)
class Elementwise:
    """An op on pairs of entries of `self` and another operand."""

    kind: Arithmetic


Family = (
    Product
    | GroupedProduct
    | Convolution
    | Attention
    | Cell
    | Norm
    | WeightNorm
    | Reduction
    | Movement
    | LookUp
    | Positions
    | Elementwise
)
_Family = TypeVar("_Family", bound=Family)

FAMILIES: dict[str, Family] = {}


def declare(family: Family, *ops: Op) -> None:
    """Say to which family ops belong.

    Raises:
        ValueError: that has been said of one of them already, or it has no operand of a name that the family gives.
    """
    names = [op_name(op) for op in ops]
    for name in names:
        if name in FAMILIES:
            raise ValueError(f"{name} is declared already")
        _check_names(family, name)
    FAMILIES.update(dict.fromkeys(names, family))


def family_of(func: OpOverload) -> Family | None:
    """Return the family of an op, if it is declared."""
    return FAMILIES.get(rule_name(func))


def as_family(func: OpOverload, kind: type[_Family]) -> _Family | None:
    """Return the family of an op if it is one of a kind."""
    family = FAMILIES.get(rule_name(func))
    return family if isinstance(family, kind) else None


def _check_names(family: Family, name: str) -> None:
    namespace, _, own = name.rpartition("::")
    packet = getattr(getattr(torch.ops, namespace or "aten"), own, None)
    if packet is None:
        return  # of a library that is not loaded
    for wanted in _operand_names(family):
        overloads = [getattr(packet, overload) for overload in packet.overloads()]
        if not any(argument.name == wanted for overload in overloads for argument in overload._schema.arguments):
            raise ValueError(f"{name} has no argument {wanted!r}: {overloads[0]._schema}")


def _operand_names(family: Family) -> Iterable[str]:
    match family:
        case Product():
            return filter(None, (family.left, family.right, family.added))
        case GroupedProduct():
            return family.left, family.right
        case Norm():
            training = family.training if isinstance(family.training, str) else ""
            return filter(None, ("input", "weight", family.bias, family.mean, family.variance, family.eps, training))
        case LookUp():
            return family.table, family.index
        case WeightNorm():
            return "v", "g"
        case Convolution():
            return "input", "weight", "bias", "transposed", "groups"
        case Attention():
            return "query", "key", "value"
        case _:
            return ()


# -- questions that several packages ask -------------------------------------------------------------------------------


def is_move(func: OpOverload, *kinds: Move) -> bool:
    """Tell whether an op is a movement of one of some kinds."""
    family = FAMILIES.get(rule_name(func))
    return isinstance(family, Movement) and family.kind in kinds


def is_arithmetic(func: OpOverload, *kinds: Arithmetic) -> bool:
    """Tell whether an op is elementwise and of one of some kinds."""
    family = FAMILIES.get(rule_name(func))
    return isinstance(family, Elementwise) and family.kind in kinds


def takes_rows(func: OpOverload, argument: str) -> bool:
    """Tell whether an operand of a product is given rows that are samples, and has an own entry for each output.

    What is added to the result along its last dim then has one entry for each of these.
    """
    match FAMILIES.get(rule_name(func)):
        case Convolution():
            return argument == "weight"
        case GroupedProduct(right=right):
            return argument == right
        case Product() as product:
            return argument == product.right and product.is_of_matrices
        case _:
            return False


def channel_norm(func: OpOverload) -> Norm | None:
    """Return the family of a layer or RMS norm: its statistics are over the channels of each sample."""
    norm = as_family(func, Norm)
    return norm if norm is not None and norm.kind in (NormKind.LAYER, NormKind.RMS) else None


def running_norm(func: OpOverload) -> Norm | None:
    """Return the family of a batch norm that may normalise by running statistics."""
    norm = as_family(func, Norm)
    return norm if norm is not None and norm.kind is NormKind.BATCH and norm.training is not True else None


def adds(func: OpOverload) -> bool:
    """Tell whether what an op takes beside the channels becomes a part of them, and does not scale them."""
    match FAMILIES.get(rule_name(func)):
        case Elementwise(kind):
            return kind not in (Arithmetic.PRODUCT, Arithmetic.QUOTIENT)
        case Movement(kind):
            return kind is Move.JOIN
        case LookUp(slices=slices):
            return slices
        case Cell():
            return True
        case _:
            return False
