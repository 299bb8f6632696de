"""What a sample call of an op is, and the operands it may have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

SIZES = {"n": 2, "a": 3, "b": 4, "c": 5, "d": 6, "e": 7, "h": 9, "w": 10}


class Sizes:
    """Named sizes."""

    def __init__(self, equal: int | None = None) -> None:
        for name, size in SIZES.items():
            setattr(self, name, equal or size)

    def __getattr__(self, name: str) -> int:
        raise AttributeError(name)


@dataclass(frozen=True)
class Operand:
    """A tensor among the arguments: its shape, and the range of its values where they are integers, or these."""

    shape: tuple[int, ...]
    below: int | None = None
    dtype: torch.dtype = torch.float64
    values: tuple[int, ...] = ()
    is_sparse: bool = False
    is_regular: bool = False

    def make(self) -> torch.Tensor:
        if self.values:
            return torch.tensor(self.values, dtype=self.dtype).view(self.shape)
        if self.dtype == torch.bool:
            return torch.rand(self.shape) < 0.5
        if self.below is not None:
            return torch.randint(self.below, self.shape, dtype=self.dtype)
        if self.dtype.is_complex:
            return torch.rand(self.shape, dtype=self.dtype)
        # Away from zero and one, so that every pointwise op is defined and no two entries are alike.
        made = torch.rand(self.shape, dtype=self.dtype) * 0.8 + 0.1
        if self.is_regular:
            return made @ made.mT + torch.eye(self.shape[-1], dtype=self.dtype)
        return made.to_sparse() if self.is_sparse else made


def t(*shape: int) -> Operand:
    return Operand(shape)


def z(*shape: int) -> Operand:
    return Operand(shape, None, torch.complex128)


def index(below: int, *shape: int) -> Operand:
    return Operand(shape, below, torch.int64)


def scales(*shape: int) -> Operand:
    return Operand(shape, None, torch.float32)


def zeros(*shape: int) -> Operand:
    """An operand of whole numbers that are zero, of the kind that quantization takes."""
    return Operand(shape, 1, torch.int32)


def sparse(*shape: int) -> Operand:
    return Operand(shape, is_sparse=True)


def regular(*shape: int) -> Operand:
    """Symmetric matrices of the last size, [*shape, last], whose eigenvalues are above one."""
    return Operand((*shape, shape[-1]), is_regular=True)


def pivots(*shape: int) -> Operand:
    """With which row each row is exchanged, itself or one below: others for each matrix."""
    *lead, size = shape
    exchanged = (row + 1 + matrix % (size - row) for matrix in range(prod(lead)) for row in range(size))
    return Operand(shape, None, torch.int32, tuple(exchanged))


def counts(*values: int) -> Operand:
    return Operand((len(values),), None, torch.int64, values)


def mask(*shape: int) -> Operand:
    return Operand(shape, None, torch.bool)


def marks(*values: int) -> Operand:
    return Operand((len(values),), None, torch.bool, values)


Arguments = Callable[[Any], list[Any]]


@dataclass(frozen=True, eq=False)
class Sample:
    """A call, how many factors must be free in it, and how many operand dims must be fixed.

    `by_value` is False where results are random, or the CPU lacks the kernel; `cautious` is True where the rule fixes
    or couples what a lenient kernel would let go: positions, and statistics that are not read. `names_channels` is True
    where numbers among the arguments name channels, and go with these as the literal rule says.
    """

    op: str
    free: int
    pinned: int
    arguments: Arguments
    keywords: dict[str, Any]
    by_value: bool
    cautious: bool
    names_channels: bool = False

    def overload(self) -> Any:
        namespace, _, name = self.op.rpartition("::")
        packet, _, overload = name.partition(".")
        return getattr(getattr(getattr(torch.ops, namespace or "aten"), packet), overload or "default")
