"""What an op does, declared once beside its rule: growth, costs, roles, weights, bases and rewriting read it here.

A family says by which names an op takes its operands and what it makes of them. An op that belongs to none is known by
its rule alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from functools import cached_property
from typing import Any


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
class SampledConvolution:
    """A convolution of `input` with `weight` at places between the positions, which other operands tell."""


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
class Bags:
    """Sums, means or extremes of rows of a table, several for each result.

    Attributes:
        table: the name of the table.
        index: the name of the numbers of its rows.
    """

    table: str
    index: str


@dataclass(frozen=True)
class Distances:
    """How far rows of `x1` are from rows of `x2`."""


@dataclass(frozen=True)
class FakeQuantization:
    """Entries of `self` rounded to multiples of `scale`, as they would be stored in a few bits.

    Attributes:
        axis: the name of the dim whose slices have a scale and a zero point each, where there is not one for all.
    """

    axis: str = ""


@dataclass(frozen=True)
class Matrices:
    """Linear algebra on the last two dims, for each matrix of a batch alone.

    Attributes:
        regular: whether there is no result for some matrices, such as zeros.
    """

    regular: bool = False


@dataclass(frozen=True)
class ChannelCopies:
    """Channels of `self` along `dim`, copied to where the numbers in `table` say; each side has a width of its own."""


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
    | SampledConvolution
    | Attention
    | Cell
    | Norm
    | WeightNorm
    | Reduction
    | Movement
    | LookUp
    | Bags
    | Distances
    | FakeQuantization
    | Matrices
    | ChannelCopies
    | Positions
    | Elementwise
)
