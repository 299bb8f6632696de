"""Random axes: a plan says what a dimension is made of, and can be built in any number of spaces."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from fxwidth.axes.factor_space import FactorSpace
from fxwidth.axes.factors import Axis, Factor, constant
from fxwidth.axes.index_maps import NEW, Indices


@dataclass(frozen=True)
class Plan:
    """A factor, a constant, a sum or a product of plans."""

    kind: str
    size: int
    parts: tuple[Plan, ...] = ()

    def build(self, space: FactorSpace) -> Axis:
        if self.kind == "factor":
            return space.fresh(self.size, f"f{self.size}")
        if self.kind == "constant":
            return constant(self.size)
        parts = [part.build(space) for part in self.parts]
        return space.concatenation(parts) if self.kind == "sum" else space.product(*parts)


def divisors(size: int) -> list[int]:
    return [n for n in range(2, size) if size % n == 0]


@st.composite
def plans(draw: Any, size: int, depth: int = 3, constants: bool = True) -> Plan:
    """Return a plan of a given size."""
    kinds = ["factor", "factor"]
    kinds += ["constant"] * constants
    if depth > 0 and size > 1:
        kinds += ["sum"]
        kinds += ["product"] * bool(divisors(size)) * 2
    kind = draw(st.sampled_from(kinds))
    if kind == "sum":
        left = draw(st.integers(1, size - 1))
        sizes = (left, size - left)
    elif kind == "product":
        major = draw(st.sampled_from(divisors(size)))
        sizes = (major, size // major)
    else:
        return Plan(kind, size)
    return Plan(kind, size, tuple(draw(plans(part, depth - 1, constants)) for part in sizes))


SIZES = st.sampled_from([1, 2, 6, 7, 12, 16, 24, 30, 36])


@st.composite
def pairs(draw: Any, constants: bool = True) -> tuple[Plan, Plan]:
    """Return two plans of one size."""
    size = draw(SIZES)
    return draw(plans(size, 3, constants)), draw(plans(size, 3, constants))


@st.composite
def kept_indices(draw: Any, factors: list[Factor], grow: bool = False) -> dict[Factor, Indices]:
    """Return old indices of some factors, in order, with new ones behind or between where `grow` allows them."""
    kept = {}
    for factor in factors:
        if draw(st.booleans()):
            chosen = draw(st.lists(st.integers(0, factor.size - 1), min_size=1, unique=True).map(sorted))
            if grow:
                for place in draw(st.lists(st.integers(0, len(chosen)), max_size=2)):
                    chosen.insert(place, NEW)
            kept[factor] = np.array(chosen, dtype=np.int64)
    return kept


def layout(space: FactorSpace, axis: Axis) -> tuple[tuple[tuple[Factor, int], ...], ...]:
    """Return, for each position of an axis, which index of which factors it has: the meaning of an axis."""

    def walk(part: Axis) -> list[tuple[tuple[Factor, int], ...]]:
        positions: list[tuple[tuple[Factor, int], ...]] = []
        for term in part:
            rows: list[tuple[tuple[Factor, int], ...]] = [()]
            for element in term:
                if isinstance(element, Factor):
                    inner = [((element, i),) for i in range(element.size)]
                else:
                    inner = [()] * element if isinstance(element, int) else walk(element)
                rows = [row + own for row in rows for own in inner]
            positions += rows
        return positions

    return tuple(walk(space.normalise(axis)))


def numbered(positions: tuple[tuple[tuple[Factor, int], ...], ...]) -> list[list[tuple[int, int]]]:
    """Return a layout with factors numbered by first occurrence, so that layouts of two spaces can be compared."""
    numbers: dict[Factor, int] = {}
    return [[(numbers.setdefault(factor, len(numbers)), index) for factor, index in row] for row in positions]


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail, rather than hang, where an algorithm does not end."""

    def stop(*_: object) -> None:
        raise AssertionError(f"not done within {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
