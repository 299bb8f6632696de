"""The oracle sees wrong rules: what they do not couple, or leave free, is permuted alone, and the results tell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from fxwidth.axes.factors import Axis
from fxwidth.rules.registry import RULES, Rule, RuleContext
from tests.oracles.rules import check_permutations, check_prescription, growth, make_probe, removal
from tests.oracles.sample_calls import Sample
from tests.oracles.samples import ROWS


def careless(operand: str) -> Rule:
    """Return a rule by which results have the axes of one operand, where sizes agree, and nothing is coupled."""

    def apply(c: RuleContext) -> Sequence[Sequence[Axis]]:
        axes = dict(enumerate(zip(c.axes(operand), c.shape(operand), strict=True)))
        return [
            [
                axes[dim][0] if dim in axes and axes[dim][1] == size else c.fixed(size)
                for dim, size in enumerate(output.shape)
            ]
            for output in c.outputs
        ]

    return apply


def is_seen(sample: Sample) -> bool:
    """Tell whether the oracle finds fault with a sample call."""
    probe = make_probe(sample)
    generator = np.random.default_rng(0)
    try:
        check_permutations(probe)
        for change in (removal, growth):
            for factor in probe.factors():
                check_prescription(probe, {factor: change(factor, generator)})
    except (AssertionError, RuntimeError, IndexError):
        return True
    return False


FAULTS = {
    "index_add": careless("self"),
    "index_copy": careless("self"),
    "index_reduce": careless("source"),
    "index_fill": careless("self"),
    "scatter": careless("self"),
    "scatter_add": careless("src"),
    "scatter_reduce": careless("index"),
    "segment_reduce": careless("data"),
    "index_put": careless("self"),
    "masked_scatter": careless("self"),
    "_fft_r2c": careless("self"),
    "_fft_c2c": careless("self"),
    "_fft_c2r": careless("self"),
    "view_as_complex": careless("self"),
    "affine_grid_generator": careless("theta"),
    "linalg_inv_ex": careless("A"),
    "_linalg_solve_ex": careless("A"),
    "linalg_qr": careless("A"),
    "_linalg_svd": careless("A"),
    "diag_embed": careless("self"),
    "diagonal": careless("self"),
    "logcumsumexp": careless("self"),
    "_trilinear": careless("i1"),
    "_cdist_forward": careless("x1"),
    "_sparse_addmm": careless("self"),
    "torchvision::deform_conv2d": careless("input"),
    "_embedding_bag": careless("weight"),
    "fake_quantize_per_channel_affine_cachemask": careless("self"),
    "_fused_moving_avg_obs_fq_helper": careless("self"),
}


@pytest.mark.parametrize("op", FAULTS)
def test_planted_faults_are_found(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row for row in ROWS if row.op.split(".")[0] == op and row.by_value]
    assert rows
    assert not any(map(is_seen, rows))
    monkeypatch.setitem(RULES, op, FAULTS[op])
    assert any(map(is_seen, rows))
