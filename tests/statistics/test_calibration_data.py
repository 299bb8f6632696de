"""What is kept of the batches that pass by."""

from __future__ import annotations

import torch

from fxwidth.statistics.gathered_batches import Gathered


def test_a_reservoir_keeps_some_of_all_that_passed_by() -> None:
    """Each batch is kept with the same probability: over many reservoirs their mean place is the middle."""
    count, places = 200, []
    reservoir = Gathered(samples=40)
    for _ in range(30):
        reservoir.batches.clear()
        reservoir._seen = 0
        for place in range(count):
            reservoir.add(torch.full((2, 3), float(place)))
            assert len(reservoir.batches) == min(place + 1, 20)
        places += [float(batch[0, 0]) for batch in reservoir]
    mean = sum(places) / len(places)
    # The mean of 600 places out of 200, each with a standard deviation of 200 / sqrt(12).
    assert abs(mean - (count - 1) / 2) < 4 * count / 12**0.5 / len(places) ** 0.5
    assert len(set(places)) > 0.9 * count


def test_a_reservoir_of_large_batches_keeps_a_few_of_them() -> None:
    reservoir = Gathered(samples=8)
    for _ in range(50):
        reservoir.add(torch.zeros(64, 3))
    assert len(list(reservoir)) == 4
