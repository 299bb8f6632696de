"""Sharing a budget among groups: least summed error under a bound on a polynomial cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fxwidth.costs import Polynomial
from fxwidth.factors import Factor

Widths = dict[Factor, int]

_BISECTIONS = 40
_EXACT_PRICE = 1.001
_SWEEPS = 30
_EXCHANGES = 20
# A step that costs more than this share of the bound is a large one.
_COARSE = 0.03


@dataclass(frozen=True, eq=False)
class Choice:
    """The widths one group may take, ascending, and the error of each, which never rises with the width."""

    factor: Factor
    widths: npt.NDArray[np.int64]
    errors: npt.NDArray[np.float64]

    def error(self, width: int) -> float:
        """Return the error at one of the widths."""
        return float(self.errors[np.searchsorted(self.widths, width)])


def allocate(choices: Sequence[Choice], cost: Polynomial, bound: int) -> Widths:
    """Return widths of little summed error whose cost is at most a bound that the smallest widths meet.

    The Lagrangian, error + price * cost, is minimised by coordinate descent and the price bisected; what is left of
    the budget then goes, step by step, to the group that gains most by it. Where one step of a group is a large part of
    the budget no price may lead to the best widths: there the neighbouring widths are tried, all others made anew.

    Source: H. Everett, Generalized Lagrange Multiplier Method for Solving Problems of Optimum Allocation of Resources
        (1963).
    """
    best = _by_price(choices, cost, bound)
    for _ in range(_EXCHANGES):
        rivals = [_by_price(fixed, cost, bound) for fixed in _coarse_steps(choices, cost, bound, best)]
        rival = min(rivals, key=lambda widths: _total(choices, widths), default=best)
        if _total(choices, rival) > _total(choices, best) - 1e-9:
            break
        best = rival
    return best


def _coarse_steps(choices: Sequence[Choice], cost: Polynomial, bound: int, widths: Widths) -> Iterator[list[Choice]]:
    """Yield the choices with one group held at the next or the last width, where that is a large step."""
    smallest = {choice.factor: int(choice.widths[0]) for choice in choices}
    for number, choice in enumerate(choices):
        place = int(np.searchsorted(choice.widths, widths[choice.factor]))
        for other in (place - 1, place + 1):
            if not 0 <= other < len(choice.widths):
                continue
            width = int(choice.widths[other])
            step = abs(cost({**widths, choice.factor: width}) - cost(widths))
            if step > _COARSE * bound and cost({**smallest, choice.factor: width}) <= bound:
                held = Choice(choice.factor, choice.widths[[other]], choice.errors[[other]])
                yield [*choices[:number], held, *choices[number + 1 :]]


def _by_price(choices: Sequence[Choice], cost: Polynomial, bound: int) -> Widths:
    """Return the best widths that a price on the cost leads to, filled up to the bound."""
    best = {choice.factor: int(choice.widths[0]) for choice in choices}
    scale = 1.0 / max(1, cost({}))
    low, high = None, None
    price = 1.0
    for _ in range(_BISECTIONS):
        widths = _descend(choices, cost, price * scale)
        if cost(widths) <= bound:
            high = price
            if _total(choices, widths) <= _total(choices, best):
                best = widths
        else:
            low = price
        if low is None:
            price /= 10
        elif high is None:
            price *= 10
        else:
            price = float(np.sqrt(low * high))
            if high / low < _EXACT_PRICE:
                break
    return _fill(choices, cost, bound, best)


def _total(choices: Iterable[Choice], widths: Widths) -> float:
    return sum(choice.error(widths[choice.factor]) for choice in choices)


def _descend(choices: Sequence[Choice], cost: Polynomial, price: float) -> Widths:
    """Set one group after another to its best width at a price, until none moves."""
    widths = {choice.factor: int(choice.widths[-1]) for choice in choices}
    stale = set(widths)
    for _ in range(_SWEEPS):
        for choice in choices:
            if choice.factor not in stale:
                continue
            stale.discard(choice.factor)
            # argmin takes the first of equals, the smallest width: what costs no error is not kept.
            place = int(np.argmin(choice.errors + price * _costs(choice, cost, widths)))
            width = int(choice.widths[place])
            if width != widths[choice.factor]:
                widths[choice.factor] = width
                stale |= cost.neighbours(choice.factor) & widths.keys()
        if not stale:
            break
    return widths


def _costs(choice: Choice, cost: Polynomial, widths: Widths) -> npt.NDArray[np.float64]:
    coefficients = cost.along(choice.factor, widths)
    return np.asarray(np.polyval(coefficients[::-1], choice.widths), dtype=np.float64)


def _fill(choices: Sequence[Choice], cost: Polynomial, bound: int, widths: Widths) -> Widths:
    """Widen groups, best gain per cost first, as far as the bound allows."""
    widths = dict(widths)
    left = bound - cost(widths)
    by_factor = {choice.factor: choice for choice in choices}
    costs: dict[Factor, Any] = {}
    while True:
        best: tuple[float, Factor, int] | None = None
        for factor, choice in by_factor.items():
            if factor not in costs:
                costs[factor] = _costs(choice, cost, widths)
            place = int(np.searchsorted(choice.widths, widths[factor]))
            extra = costs[factor][place + 1 :] - costs[factor][place]
            gain = choice.errors[place] - choice.errors[place + 1 :]
            rate = np.where((extra <= left) & (gain > 1e-12), gain / np.maximum(extra, 1.0), 0.0)
            if len(rate) and rate.max() > (best[0] if best else 0.0):
                step = int(rate.argmax())
                best = float(rate[step]), factor, int(choice.widths[place + 1 + step])
        if best is None:
            return widths
        _, factor, width = best
        widths[factor] = width
        left = bound - cost(widths)
        for other in cost.neighbours(factor):
            costs.pop(other, None)
