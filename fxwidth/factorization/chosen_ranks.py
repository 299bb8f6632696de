"""Which layers become two, and of which rank: by a bound of the error of each, or of a cost of all together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fxwidth.errors import FxwidthError
from fxwidth.selection.error_curves import Errors, logarithmic


@dataclass(frozen=True)
class Candidate:
    """A layer that may become two.

    Attributes:
        name: the path of its weight.
        inputs: its columns.
        outputs: its rows.
        unit: what each entry of its weight costs: one parameter, or so many flops.
        lost: the share of its outputs that is lost at each rank, [ranks + 1].
    """

    name: str
    inputs: int
    outputs: int
    unit: int
    lost: Errors

    @property
    def largest(self) -> int:
        """The largest rank at which two layers have fewer parameters than one, or zero."""
        most = (self.inputs * self.outputs - 1) // (self.inputs + self.outputs)
        return min(most, len(self.lost) - 1)

    def cost(self, rank: int | None) -> int:
        """Return what it costs at a rank; None for one layer."""
        entries = self.inputs * self.outputs if rank is None else rank * (self.inputs + self.outputs)
        return self.unit * entries


def ranks_for_error(candidates: Sequence[Candidate], error: float) -> dict[str, int]:
    """Return the least rank of each layer that loses no more than a share of its outputs, where that saves parameters.

    Args:
        candidates: the layers.
        error: the largest share.
    """
    found: dict[str, int] = {}
    for one in candidates:
        rank = max(1, int(np.argmax(one.lost <= error)))
        if rank <= one.largest:
            found[one.name] = rank
    return found


def ranks_for_cost(candidates: Sequence[Candidate], present: int, limit: float, told: str) -> dict[str, int]:
    """Return the ranks at which all layers together lose least, as the error curves of groups count it, within a cost.

    Each layer takes what is best for it at one price of a unit of cost; the lowest price is sought at which all of them
    stay within the bound, and what is left over goes to those that gain most by it.

    Args:
        candidates: the layers.
        present: what the network costs now.
        limit: what it may cost.
        told: the bound, as it was given.

    Raises:
        FxwidthError: the bound is out of reach.

    Source: H. Everett, Generalized Lagrange Multiplier Method (1963).
    """
    if present <= limit:
        return {}
    choices = [_Choices.of(one) for one in candidates]
    least = present - sum(int(one.savings.max()) for one in choices)
    if least > limit:
        raise FxwidthError(
            f"{told} is out of reach: with every layer that may become two at rank 1, {least:,} remain. Raise it, or "
            "run PlanWidths and ResizeWidths too, which narrow the other layers."
        )
    wanted = present - limit
    # Above the highest price every layer is at its least cost.
    low, high = 0.0, 1.0
    while sum(one.saved(high) for one in choices) < wanted:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(one.saved(middle) for one in choices) >= wanted else (middle, high)
    chosen = [one.best(high) for one in choices]
    _spend(choices, chosen, wanted)
    return {
        own.name: int(one.ranks[place])
        for own, one, place in zip(candidates, choices, chosen, strict=True)
        if one.ranks[place] > 0
    }


@dataclass(frozen=True)
class _Choices:
    """What a layer may become: itself first, as rank 0, then two layers of every rank that saves something.

    Attributes:
        ranks: of each choice.
        savings: what it saves.
        errors: what it loses.
    """

    ranks: np.ndarray
    savings: np.ndarray
    errors: np.ndarray

    @staticmethod
    def of(candidate: Candidate) -> _Choices:
        ranks = np.arange(0, candidate.largest + 1)
        whole = candidate.cost(None)
        savings = np.array([0, *(whole - candidate.cost(int(rank)) for rank in ranks[1:])])
        errors = np.array([0.0, *logarithmic(candidate.lost)[1 : candidate.largest + 1]])
        return _Choices(ranks, savings, errors)

    def best(self, price: float) -> int:
        return int(np.argmin(self.errors - price * self.savings))

    def saved(self, price: float) -> int:
        return int(self.savings[self.best(price)])


def _spend(choices: Sequence[_Choices], chosen: list[int], wanted: float) -> None:
    """Give what has been saved beyond what is wanted back, to the layers that gain most by a unit of it."""
    spare = sum(int(one.savings[place]) for one, place in zip(choices, chosen, strict=True)) - wanted
    while True:
        best: tuple[float, int, int] | None = None
        for number, (one, place) in enumerate(zip(choices, chosen, strict=True)):
            cost = one.savings[place] - one.savings
            gain = one.errors[place] - one.errors
            for better in np.flatnonzero((cost > 0) & (cost <= spare) & (gain > 0)):
                rate = float(gain[better] / cost[better])
                if best is None or rate > best[0]:
                    best = rate, number, int(better)
        if best is None:
            return
        _, number, other = best
        spare -= int(choices[number].savings[chosen[number]] - choices[number].savings[other])
        chosen[number] = other
