"""Widths under bounds on costs, against all combinations of them where there are few."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxwidth.axes.factors import Factor
from fxwidth.axes.polynomials import Polynomial
from fxwidth.planning import allocation
from fxwidth.planning.allocation import Choice, Widths, allocate

# Whether combinations are looked at one by one, where there are few, or widths are always found by prices.
WAYS = pytest.mark.parametrize("combinations", [0, 2**16], ids=["prices", "combinations"])


@dataclass(frozen=True)
class Problem:
    """What `allocate` is given."""

    choices: list[Choice]
    bounds: list[tuple[Polynomial, float]]

    def fits(self, widths: Widths) -> bool:
        return all(cost(widths) <= limit for cost, limit in self.bounds)

    def error(self, widths: Widths) -> float:
        return sum(choice.error(widths[choice.factor]) for choice in self.choices)

    def all_that_fit(self) -> list[Widths]:
        factors = [choice.factor for choice in self.choices]
        ways = itertools.product(*(choice.widths.tolist() for choice in self.choices))
        return [widths for way in ways if self.fits(widths := dict(zip(factors, way, strict=True)))]

    def neighbours(self, widths: Widths) -> list[tuple[Widths, int, int]]:
        """Return the widths that differ in one group alone, with the width that it has and the other one."""
        return [
            ({**widths, choice.factor: other}, widths[choice.factor], other)
            for choice in self.choices
            for other in choice.widths.tolist()
        ]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Draw some groups whose errors fall in steps and stay the same in between, and costs that are shared by pairs."""
    choices = []
    for number in range(draw(st.integers(1, 3))):
        steps = draw(st.lists(st.sampled_from([0, 0, 1, 2, 5]), min_size=1, max_size=6))
        gaps = draw(st.lists(st.integers(1, 3), min_size=len(steps), max_size=len(steps)))
        # Where the largest width is less than that of the group, something is lost there too.
        errors = np.array(steps, dtype=np.float64)[::-1].cumsum()[::-1] - draw(st.sampled_from([0, steps[-1]]))
        widths = np.cumsum(gaps)
        choices.append(Choice(Factor(int(widths[-1]), f"group {number}"), widths, errors))
    factors = [choice.factor for choice in choices]
    pairs: list[tuple[Factor, ...]] = [tuple(sorted(pair, key=id)) for pair in itertools.pairwise(factors)]
    bounds = []
    for _ in range(draw(st.integers(1, 2))):
        terms = {(): draw(st.integers(0, 4)), **{(factor,): draw(st.integers(1, 4)) for factor in factors}}
        cost = Polynomial({**terms, **{pair: draw(st.integers(0, 2)) for pair in pairs}})
        least, full = (cost({choice.factor: int(choice.widths[place]) for choice in choices}) for place in (0, -1))
        bounds.append((cost, draw(st.integers(int(least), int(full) + 2))))
    return Problem(choices, bounds)


def allocated(problem: Problem, combinations: int) -> Widths:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "_COMBINATIONS", combinations)
        return allocate(problem.choices, problem.bounds)


@WAYS
@given(problem=problems())
@settings(max_examples=150)
def test_bounds_are_met_and_nothing_is_wasted(problem: Problem, combinations: int) -> None:
    found = allocated(problem, combinations)
    assert problem.fits(found)
    for widths, own, other in problem.neighbours(found):
        if other > own:
            # What is left is spent.
            assert not problem.fits(widths) or problem.error(widths) >= problem.error(found)
        elif other < own:
            # What costs no error is saved.
            assert problem.error(widths) > problem.error(found)


@given(problem=problems())
@settings(max_examples=150)
def test_of_few_combinations_the_best_is_found(problem: Problem) -> None:
    found = allocated(problem, 2**16)
    assert problem.error(found) == min(map(problem.error, problem.all_that_fit()))


@given(problem=problems())
@settings(max_examples=150)
def test_by_prices_one_group_gets_what_is_best(problem: Problem) -> None:
    choice = problem.choices[0]
    alone = Problem([choice], [(Polynomial({(choice.factor,): 2}), limit) for _, limit in problem.bounds])
    if alone.fits({choice.factor: int(choice.widths[0])}):
        assert alone.error(allocated(alone, 0)) == min(map(alone.error, alone.all_that_fit()))
