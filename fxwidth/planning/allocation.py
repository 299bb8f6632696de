"""Sharing budgets among groups: least summed error under bounds on polynomial costs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from fxwidth.axes.factors import Factor
from fxwidth.axes.polynomials import Polynomial

Widths = dict[Factor, int]
Bounds = Sequence[tuple[Polynomial, float]]

_BISECTIONS = 40
_EXACT_PRICE = 1.001
_SWEEPS = 30
_EXCHANGES = 20
# A step that costs more than this share of a bound is a large one.
_COARSE = 0.03
# How often the prices of several costs are weighed against each other, and how sharply.
_WEIGHINGS, _SHARPNESS = 12, 4.0
_ROUNDING = 1e-9
# How many exchanges of a step of one group against steps of others are tried at most.
_TRIES = 200
# Up to so many combinations of widths all are looked at.
_COMBINATIONS = 2**16


@dataclass(frozen=True, eq=False)
class Choice:
    """The widths one group may take, ascending, and the error of each, which never rises with the width."""

    factor: Factor
    widths: npt.NDArray[np.int64]
    errors: npt.NDArray[np.float64]

    def error(self, width: int) -> float:
        """Return the error at one of the widths."""
        return float(self.errors[np.searchsorted(self.widths, width)])


def allocate(choices: Sequence[Choice], bounds: Bounds) -> Widths:
    """Return widths of little summed error whose costs stay within bounds that the smallest widths meet.

    The Lagrangian, error + price * cost, is minimised by coordinate descent and the price bisected; what is left of
    the budget then goes, step by step, to the group that gains most by it, and steps are exchanged between groups.
    Several costs are added up, each relative to its bound, with weights that go to those that bind. Where one step of a
    group is a large part of a bound no price may lead to the best widths: there the neighbouring widths are tried, all
    others made anew. Where there are few combinations, all of them are looked at instead.

    Args:
        choices: what each group may take.
        bounds: each cost, which rises with every width, and the most it may be.

    Source: H. Everett, Generalized Lagrange Multiplier Method for Solving Problems of Optimum Allocation of Resources
        (1963).
    """
    problem = _Problem([(cost, max(1e-300, float(limit))) for cost, limit in bounds])
    if prod(len(choice.widths) for choice in choices) <= _COMBINATIONS:
        return _best_of_all(choices, problem)
    best = _weighed(choices, problem)
    for _ in range(_EXCHANGES):
        steps = _coarse_steps(choices, problem, best)
        rivals = [_by_price(fixed, problem) for fixed in steps]
        rival = min(rivals, key=lambda widths: _total(choices, widths), default=best)
        if _total(choices, rival) > _total(choices, best) - _ROUNDING:
            break
        best = rival
    return _exchanged(choices, problem, best)


def _best_of_all(choices: Sequence[Choice], problem: _Problem) -> Widths:
    """Return the first of all combinations of widths that has the least error within the bounds."""
    grids = np.ix_(*(choice.widths.astype(np.float64) for choice in choices))
    widths = {choice.factor: grid for choice, grid in zip(choices, grids, strict=True)}
    errors = np.asarray(sum(np.ix_(*(choice.errors for choice in choices)), np.zeros(())))
    for cost, limit in problem.bounds:
        errors = np.where(cost(widths) > limit, np.inf, errors)
    places = np.unravel_index(int(errors.argmin()), errors.shape)
    return {choice.factor: int(choice.widths[place]) for choice, place in zip(choices, places, strict=True)}


def _exchanged(choices: Sequence[Choice], problem: _Problem, best: Widths) -> Widths:
    """Return widths that no step of one group, paid for or spent by the others, makes better; or a number of tries."""
    tries, queue = _TRIES, deque((choice, step) for choice in choices for step in (-1, 1))
    while queue and tries:
        choice, step = queue.popleft()
        place = int(np.searchsorted(choice.widths, best[choice.factor])) + step
        if not 0 <= place < len(choice.widths):
            continue
        tries -= 1
        held = {**best, choice.factor: int(choice.widths[place])}
        others = [other for other in choices if other is not choice]
        rival = _fill(others, problem, _trim(others, problem, held))
        if problem.met(rival) and _total(choices, rival) < _total(choices, best) - _ROUNDING:
            best = rival
            queue = deque((other, side) for other in choices for side in (-1, 1))
    return best


def _trim(choices: Sequence[Choice], problem: _Problem, widths: Widths) -> Widths:
    """Narrow groups, least loss per cost first, until the bounds are met or nothing is left to narrow.

    The last step is the one of least loss among those that are enough.
    """
    widths = dict(widths)
    while not problem.met(widths):
        steps: list[tuple[bool, float, Widths]] = []
        for choice in choices:
            place = int(np.searchsorted(choice.widths, widths[choice.factor]))
            if not place:
                continue
            narrower = {**widths, choice.factor: int(choice.widths[place - 1])}
            saved = problem.cost(widths) - problem.cost(narrower)
            if saved > 0:
                loss, is_enough = float(choice.errors[place - 1] - choice.errors[place]), problem.met(narrower)
                steps.append((not is_enough, loss if is_enough else loss / saved, narrower))
        if not steps:
            break
        widths = min(steps, key=lambda step: step[:2])[2]
    return widths


class _Problem:
    """The bounds, and one cost made of all by weights."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.weigh([1.0] * len(bounds))

    def weigh(self, weights: Sequence[float]) -> None:
        """Make the combined cost, of which one is the whole budget."""
        total = sum(weights)
        self.weights = [weight / total for weight in weights]
        pairs = zip(self.weights, self.bounds, strict=True)
        self.cost = Polynomial.sum((weight / limit, cost) for weight, (cost, limit) in pairs)

    def shares(self, widths: Mapping[Factor, int]) -> list[float]:
        """Return how much of each bound is used."""
        return [cost(widths) / limit for cost, limit in self.bounds]

    def met(self, widths: Mapping[Factor, int]) -> bool:
        """Tell whether all bounds are kept."""
        return all(cost(widths) <= limit for cost, limit in self.bounds)


def _weighed(choices: Sequence[Choice], problem: _Problem) -> Widths:
    """Return the best widths over several weights of the costs; the problem keeps the weights that led there."""
    best = _by_price(choices, problem)
    kept, weights = problem.weights, problem.weights
    for _ in range(_WEIGHINGS if len(weights) > 1 else 0):
        shares = problem.shares(_by_price(choices, problem, fills=False))
        weights = [max(1e-6, weight * share**_SHARPNESS) for weight, share in zip(weights, shares, strict=True)]
        problem.weigh(weights)
        weights = problem.weights
        rival = _by_price(choices, problem)
        if _total(choices, rival) < _total(choices, best):
            best, kept = rival, weights
    problem.weigh(kept)
    return best


def _coarse_steps(choices: Sequence[Choice], problem: _Problem, widths: Widths) -> Iterator[list[Choice]]:
    """Yield the choices with one group held at the next or the last width, where that is a large step."""
    smallest = {choice.factor: int(choice.widths[0]) for choice in choices}
    before = problem.shares(widths)
    for number, choice in enumerate(choices):
        place = int(np.searchsorted(choice.widths, widths[choice.factor]))
        for other in (place - 1, place + 1):
            if not 0 <= other < len(choice.widths):
                continue
            width = int(choice.widths[other])
            after = problem.shares({**widths, choice.factor: width})
            is_large = max(abs(one - two) for one, two in zip(after, before, strict=True)) > _COARSE
            if is_large and problem.met({**smallest, choice.factor: width}):
                held = Choice(choice.factor, choice.widths[[other]], choice.errors[[other]])
                yield [*choices[:number], held, *choices[number + 1 :]]


def _by_price(choices: Sequence[Choice], problem: _Problem, *, fills: bool = True) -> Widths:
    """Return the best widths that a price on the cost leads to, filled up to the bounds."""
    best = {choice.factor: int(choice.widths[0]) for choice in choices}
    low, high = None, None
    price = 1.0
    for _ in range(_BISECTIONS):
        widths = _descend(choices, problem.cost, price)
        if problem.met(widths):
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
    return _fill(choices, problem, best) if fills else best


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


def _fill(choices: Sequence[Choice], problem: _Problem, widths: Widths) -> Widths:
    """Widen groups, best gain per cost first, as far as the bounds allow."""
    widths = dict(widths)
    left = [limit - cost(widths) for cost, limit in problem.bounds]
    by_factor = {choice.factor: choice for choice in choices}
    steps: dict[Factor, tuple[float, int]] = {}
    while True:
        for factor, choice in by_factor.items():
            if factor not in steps:
                steps[factor] = _best_step(choice, problem, widths, left)
        best = max(((*step, factor) for factor, step in steps.items()), key=lambda step: step[0], default=None)
        if best is None or best[0] <= 0:
            return widths
        rate, width, factor = best
        # What is left has changed since the step was found: it may not fit any more.
        fresh = _best_step(by_factor[factor], problem, widths, left)
        if fresh != (rate, width):
            steps[factor] = fresh
            continue
        widths[factor] = width
        left = [limit - cost(widths) for cost, limit in problem.bounds]
        for other in {factor}.union(*(cost.neighbours(factor) for cost, _ in problem.bounds)):
            steps.pop(other, None)


def _best_step(choice: Choice, problem: _Problem, widths: Widths, left: Sequence[float]) -> tuple[float, int]:
    """Return the gain per cost of the best wider width that fits, and that width."""
    place = int(np.searchsorted(choice.widths, widths[choice.factor]))
    gain = choice.errors[place] - choice.errors[place + 1 :]
    fits = gain > 1e-12
    price = np.zeros(len(gain))
    for weight, (cost, limit), room in zip(problem.weights, problem.bounds, left, strict=True):
        costs = _costs(choice, cost, widths)
        extra = costs[place + 1 :] - costs[place]
        fits &= extra <= room + _ROUNDING * limit * (extra != np.round(extra))
        price += weight * extra / limit
    rate = np.where(fits, gain / np.maximum(price, 1e-12), 0.0)
    if not len(rate) or rate.max() <= 0:
        return 0.0, int(choice.widths[place])
    step = int(rate.argmax())
    return float(rate[step]), int(choice.widths[place + 1 + step])
