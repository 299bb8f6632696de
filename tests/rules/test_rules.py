"""Every op rule, judged by the op itself."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import fxwidth.rules  # noqa: F401 - fills the table of rules
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.rules.registry import LITERAL_RULES, POINTWISE, RULES, resized_call, rule_name
from tests.oracles.rules import (
    check_permutations,
    check_prescription,
    coupled_without_need,
    growth,
    make_probe,
    removal,
    run_prescribed,
    same,
    take,
)
from tests.oracles.sample_calls import Sample
from tests.oracles.samples import ROWS, TOLD_BY_LATER_TORCH

SIZES = (None, 8)
probe_of = functools.cache(make_probe)


def _ids(rows: list[Sample]) -> list[str]:
    return [f"{row.op}-{i}" for i, row in enumerate(rows)]


by_row = pytest.mark.parametrize("sample", ROWS, ids=_ids(ROWS))
by_size = pytest.mark.parametrize("equal", SIZES, ids=["distinct", "equal"])


# Kernels that take no float64: another op with the same rule stands for them.
JUDGED_ELSEWHERE = {"_grouped_mm"}


def test_every_rule_has_a_row():
    sampled = {_registered_name(row) for row in ROWS}
    assert (set(RULES) | POINTWISE) - sampled == JUDGED_ELSEWHERE | TOLD_BY_LATER_TORCH
    assert set(LITERAL_RULES) <= set(RULES)


# Ops that the CPU takes apart, so that only a GPU shows them whole.
WHOLE_ON_GPU = {"_fused_rms_norm"}


def test_every_rule_is_reached():
    """A composite op is taken apart before any rule sees it: a rule for it would be dead."""
    seen = {rule_name(call.func) for row in ROWS for call in probe_of(row).analysis.calls}
    assert (set(RULES) | POINTWISE) - seen == WHOLE_ON_GPU | JUDGED_ELSEWHERE | TOLD_BY_LATER_TORCH


def _registered_name(row: Sample) -> str:
    return rule_name(row.overload())


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


WHOLE = {
    "native_group_norm": "the groups of a group norm do not see each other",
    "convolution": "nor do those of a convolution",
}


@pytest.mark.parametrize("op", WHOLE)
def test_whole_groups_can_go(op):
    """The literal `groups` must follow: with the old one, other channels would make up a group."""
    checked = 0
    for sample in (row for row in ROWS if row.op == op):
        probe = make_probe(sample)
        for factor in probe.factors():
            maps = IndexMaps(probe.analysis.space, {factor: np.array([factor.size - 1])})
            old, new = probe.call.arguments, resized_call(probe.call, maps)[1]
            key = "group" if op == "native_group_norm" else "groups"
            if new[key] == old[key]:
                continue
            assert new[key] == old[key] // factor.size
            operands = [take(*pair, maps) for pair in zip(probe.operands, probe.operand_axes, strict=True)]
            assert same(run_prescribed(probe, maps, operands)[:1], [take(probe.results[0], probe.result_axes[0], maps)])
            checked += 1
    assert checked >= 2


def test_a_dim_narrowed_to_one_is_not_squeezed_for_it():
    (probe,) = [make_probe(row) for row in ROWS if row.op == "squeeze"]
    factor = probe.factors()[0]
    (result,) = run_prescribed(
        probe,
        maps := IndexMaps(probe.analysis.space, {factor: np.array([1])}),
        [take(*pair, maps) for pair in zip(probe.operands, probe.operand_axes, strict=True)],
    )
    assert tuple(result.shape) == (1, probe.results[0].shape[1])
