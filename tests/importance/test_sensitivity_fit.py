"""Rates of the loss per group from few and noisy probes."""

from __future__ import annotations

import numpy as np
import pytest

from fxwidth.importance.sensitivity_fit import Rise, rates_of

RATES = {"a": 0.3, "b": 1.0, "c": 2.0, "d": 5.0}
ERRORS = (0.2, 0.5)


def probed(power: float, noise: float = 0.0, seed: int = 0) -> dict[str, list[Rise]]:
    """Return probes of groups whose loss rises by (rate * error)^power."""
    generator = np.random.default_rng(seed)
    rises = {}
    for name, rate in RATES.items():
        true = [(rate * error) ** power for error in ERRORS]
        rises[name] = [Rise(e, r + noise * generator.normal(), noise) for e, r in zip(ERRORS, true, strict=True)]
    return rises


@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
def test_rates_follow_from_exact_rises_whatever_their_power(power: float) -> None:
    rates = rates_of(probed(power))
    ratios = [rates[name] / rates["b"] for name in RATES]
    assert ratios == pytest.approx(list(RATES.values()), rel=1e-9)


def test_how_groups_add_up_tells_the_power_that_one_group_hides() -> None:
    # Small rises drown in noise; large ones and that of all together are sure.
    rises = probed(3.0)
    hidden = {name: [Rise(small.error, small.mean + 1e-3, 1e-3), large] for name, (small, large) in rises.items()}
    together = sum(RATES[name] * ERRORS[0] for name in RATES) ** 3
    ratios = [rates_of(hidden, together)[name] / rates_of(hidden, together)["b"] for name in RATES]
    assert ratios == pytest.approx(list(RATES.values()), rel=1e-6)
    assert rates_of(hidden)["d"] / rates_of(hidden)["b"] > 1.05 * RATES["d"]


def test_in_proportion_they_are_in_units_of_the_loss() -> None:
    assert rates_of(probed(1.0)) == pytest.approx(RATES)
    (rate,) = rates_of({"a": [Rise(0.5, 0.3, 0.1)]}).values()
    assert rate == pytest.approx(0.6)


def test_noise_draws_them_together() -> None:
    def spread(noise: float) -> float:
        rates = rates_of(probed(2.0, noise))
        return float(np.log(list(rates.values())).std())

    assert spread(0.0) > spread(0.3) > spread(30.0)
    assert spread(30.0) < 1e-9


def test_on_average_they_come_nearer_to_the_truth_than_without() -> None:
    generator = np.random.default_rng(0)
    drawn, taken = [], []
    for _ in range(40):
        true = np.exp(0.3 * generator.normal(size=12))
        rises = {k: [Rise(1.0, rate + 0.3 * generator.normal(), 0.3)] for k, rate in enumerate(true)}
        sure = {k: [Rise(1.0, max(one.mean, 0.3), 1e-9)] for k, (one,) in rises.items()}
        for found, misses in ((rates_of(rises), drawn), (rates_of(sure), taken)):
            misses.append(float((np.log(list(found.values())) - np.log(true)).std()))
    assert np.mean(drawn) < 0.9 * np.mean(taken)


def test_negative_rises_and_groups_without_probes() -> None:
    rises = {**probed(1.0), "lower": [Rise(0.5, -0.1, 0.2)], "silent": [Rise(0.5, 0.0, 0.0)], "unknown": []}
    rates = rates_of(rises)
    typical = float(np.median([rates[name] for name in (*RATES, "lower")]))
    # What may be noise may matter as much as the noise lets it; what is sure not to matter gets the least.
    assert 0.1 * typical < rates["lower"] < typical
    assert rates["silent"] == pytest.approx(0.05 * typical)
    assert rates["unknown"] == pytest.approx(typical)


def test_without_any_rise_all_are_alike() -> None:
    assert rates_of({"a": [Rise(0.5, -1.0, 0.0)], "b": []}) == {"a": 1.0, "b": 1.0}
