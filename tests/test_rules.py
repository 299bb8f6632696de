"""Every op rule, judged by the op itself."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from tests.rule_oracle import (
    check_permutations,
    check_prescription,
    coupled_without_need,
    growth,
    make_probe,
    removal,
)
from tests.samples import ROWS, Sample

import fxwidth.rules  # noqa: F401 - fills the table of rules
from fxwidth.rules.registry import POINTWISE, PRESCRIPTIONS, RULES
from fxwidth.tape import functional_name

SIZES = (None, 8)
probe_of = functools.cache(make_probe)


def _ids(rows: list[Sample]) -> list[str]:
    return [f"{row.op}-{i}" for i, row in enumerate(rows)]


by_row = pytest.mark.parametrize("sample", ROWS, ids=_ids(ROWS))
by_size = pytest.mark.parametrize("equal", SIZES, ids=["distinct", "equal"])


def test_every_rule_has_a_row():
    sampled = {_registered_name(row) for row in ROWS}
    assert not (set(RULES) | POINTWISE) - sampled
    assert set(PRESCRIPTIONS) <= set(RULES)


def _registered_name(row: Sample) -> str:
    func = row.overload()
    name = functional_name(func)
    return name if func.namespace == "aten" else f"{func.namespace}::{name}"


@by_size
@by_row
def test_factors_stay_as_free_as_the_op_allows(sample, equal):
    probe = probe_of(sample, equal)
    assert (len(probe.factors()), probe.fixed_dims()) == (sample.free, sample.pinned)


@by_size
@by_row
def test_permuting_a_factor_permutes_the_results(sample, equal):
    probe = probe_of(sample, equal)
    if sample.by_value:
        check_permutations(probe)


@by_row
def test_prescriptions_fit_removals_and_growth(sample):
    probe = probe_of(sample)
    generator = np.random.default_rng(0)
    for change in (removal, growth):
        check_prescription(probe, {factor: change(factor, generator) for factor in probe.factors()})
        for factor in probe.factors():
            check_prescription(probe, {factor: change(factor, generator)})


@by_row
def test_no_dim_is_coupled_without_need(sample):
    probe = probe_of(sample)
    if sample.by_value and not sample.cautious:
        assert coupled_without_need(probe) == []
