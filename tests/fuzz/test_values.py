"""Random networks judged by what is known of their values, without the package's rules and prescriptions."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.fuzz.networks import Program, seeded_program
from tests.oracles.values import READ_BY_PARAMETERS, check_copies, check_growth, check_training


def over_seeds(check: Callable[[Program], object], start: int, count: int, **ops: tuple[str, ...]) -> None:
    for seed in range(start, start + count):
        program = seeded_program(seed, **ops)
        try:
            check(program)
        except Exception as error:
            raise AssertionError(f"the network of seed {seed} fails: {error}\n{program}") from error


@pytest.mark.parametrize("start", range(50_000, 50_020, 5))
def test_growth_is_exact_at_other_batches_and_in_training(start: int) -> None:
    over_seeds(check_growth, start, 5)


@pytest.mark.parametrize("seed", [10_909, 13_786, 14_037])
def test_what_a_node_takes_from_another_that_was_rewritten_is_known(seed: int) -> None:
    """Chunks, and numbers from the shape, of what has been taken apart into ATen ops before."""
    check_growth(seeded_program(seed))


@pytest.mark.parametrize("start", range(51_000, 51_020, 5))
def test_halved_networks_train(start: int) -> None:
    over_seeds(check_training, start, 5)


@pytest.mark.parametrize("start", range(52_000, 52_020, 5))
def test_copies_are_dropped_exactly(start: int) -> None:
    over_seeds(check_copies, start, 5, ops=READ_BY_PARAMETERS)


def test_copies_are_all_that_is_dropped_exactly() -> None:
    """One channel more and the function is another one: copies are no easy case."""
    with pytest.raises(AssertionError, match="outputs differ by"):
        over_seeds(lambda program: check_copies(program, fewer=1), 52_000, 3, ops=READ_BY_PARAMETERS)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(53_000, 54_000, 100))
def test_growth_of_many_is_exact(start: int) -> None:
    over_seeds(check_growth, start, 100)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(54_000, 55_000, 100))
def test_many_halved_networks_train(start: int) -> None:
    over_seeds(check_training, start, 100)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(55_000, 56_000, 100))
def test_copies_of_many_are_dropped_exactly(start: int) -> None:
    over_seeds(check_copies, start, 100, ops=READ_BY_PARAMETERS)
