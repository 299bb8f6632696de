"""How new channels pass an op: one table by ops, and one by their families."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from fxwidth.growth.call_view import CallView
from fxwidth.growth.states import ALL_ZERO, CONSTANT, State, meet, passed
from fxwidth.rules.family_table import FAMILIES
from fxwidth.rules.op_families import Family
from fxwidth.rules.op_names import Op, op_name
from fxwidth.rules.registry import POINTWISE

NO_TRANSFER = "how new channels pass it is not known"

Result = Sequence[Sequence[State]]

Transfer = Callable[[CallView], Result]

TRANSFERS: dict[str, Transfer] = {}

FAMILY_TRANSFERS: dict[type[Family], Transfer] = {}


def transfer(*ops: Op) -> Callable[[Transfer], Transfer]:
    """Register how new channels pass ops, named as for `rule`; that goes before what is known of their family."""

    def register(function: Transfer) -> Transfer:
        for name in map(op_name, ops):
            if name in TRANSFERS:
                raise ValueError(f"there is a transfer for {name} already")
            TRANSFERS[name] = function
        return function

    return register


def family_transfer(*families: type[Family]) -> Callable[[Transfer], Transfer]:
    """Register how new channels pass all ops of some families."""

    def register(function: Transfer) -> Transfer:
        for family in families:
            if family in FAMILY_TRANSFERS:
                raise ValueError(f"there is a transfer for {family.__name__} already")
            FAMILY_TRANSFERS[family] = function
        return function

    return register


def transfer_of(name: str) -> Transfer | None:
    """Return how new channels pass an op of the given name, or None."""
    found = TRANSFERS.get(name)
    # What acts on each element alone is told by its numbers.
    if found is not None or name in POINTWISE:
        return found
    family = FAMILIES.get(name)
    return None if family is None else FAMILY_TRANSFERS.get(type(family))


def follow(c: CallView, source: Tensor, kept: State = ALL_ZERO) -> Result:
    """Pair the dims that carry the factor in order; where their numbers differ, each result has what all sources have.

    `kept` is what the op leaves standing: all of it for a copy, `ZERO` alone where f(0) = 0 is all that is known.
    """
    states, into = c.states(source), c.carrying(source)
    simple = not any(c.facts.repeats(c.axes(source)[dim]) for dim in into)
    rows = []
    for output, axes in c.outputs:
        onto = [dim for dim, axis in enumerate(axes) if c.facts.carries(axis)]
        paired = dict(zip(onto, into, strict=True)) if simple and len(onto) == len(into) else None
        shared = meet(states[dim] for dim in into)
        row = [CONSTANT] * len(axes)
        for dim in onto:
            state = states[paired[dim]] if paired is not None else shared
            # Of a reduction's results the integers are positions, which are not zero where the values are.
            own = kept if kept == ALL_ZERO or output.dtype.is_floating_point else State.ANY
            row[dim] = passed(state, own) if into else c.refuse("it makes the channels itself")
        rows.append(row)
    return rows
