"""What is known of the new channels of a tensor, and why an op refuses them.

Growth is decided by abstract interpretation of the tape: every dim that carries the growing factor has a `State`. A
*transfer* says which states an op's results have, and refuses where new channels would reach old ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntFlag

from torch import Tensor


class State(IntFlag):
    """What holds for the new entries of a tensor along one dim, at all its other coordinates; nothing is `ANY`."""

    ANY = 0
    ZERO = 1
    """They are zero."""
    MEAN = 2
    """Each is the mean of the old entries over the growing factor."""
    UNIFORM = 4
    """All entries along the growing factor are equal, old and new."""
    WEIGHTED = 8
    """Each is the mean of the old entries, each times its entry of a certain per-channel scale."""


CONSTANT = State.MEAN | State.UNIFORM
"""A dim that does not carry the factor: the same value stands beside all its channels."""
ALL_ZERO = State.ZERO | State.MEAN | State.UNIFORM | State.WEIGHTED
"""Old and new entries are zero, or nothing has been written yet."""

States = tuple[State, ...]


class RefusedError(Exception):
    """New channels would change the function here; the text is the clause that says why."""


class ProductRefusedError(RefusedError):
    """Two operands are multiplied and summed over the factor, and neither has zeros in its new channels."""

    def __init__(self, reason: str, left: Tensor, right: Tensor) -> None:
        super().__init__(reason)
        self.left = left
        self.right = right


class DirectionlessError(RefusedError):
    """New slices of a weight are zero and would be divided by their norm; were their length zero, they need not be."""

    def __init__(self, reason: str, direction: Tensor, length: Tensor, dim: int) -> None:
        super().__init__(reason)
        self.direction = direction
        self.length = length
        self.dim = dim


class NormedWriterError(RefusedError):
    """New slices of a weight would be seen by a norm over the whole weight; were they zero, they would not."""

    def __init__(self, reason: str, weight: Tensor) -> None:
        super().__init__(reason)
        self.weight = weight


# -- what states become ----------------------------------------------------------------------------------------------


def meet(states: Iterable[State]) -> State:
    """Return what holds for all of several states; for none of them, what holds for memory nobody wrote to."""
    result = ALL_ZERO
    for state in states:
        result &= state
    return result


def multiplied(one: State, other: State) -> State:
    """Return the state of products, channel by channel."""
    result = (one | other) & State.ZERO
    if one & State.UNIFORM:
        result |= other
    if other & State.UNIFORM:
        result |= one
    return result


def of_number(value: object) -> State:
    """Return the state of channels that all hold one number."""
    return ALL_ZERO if isinstance(value, (int, float)) and value == 0 else CONSTANT


def passed(state: State, kept: State) -> State:
    """Return what an op that acts on all channels alike leaves standing; entries that are all equal stay so."""
    return (state & kept) | (state & CONSTANT if state & State.UNIFORM else State.ANY)
