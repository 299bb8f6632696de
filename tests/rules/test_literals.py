"""The literals of ops: a rule must heed each of them, whatever its number."""

from __future__ import annotations

import numpy as np
import pytest

from fxwidth.axes.factors import axis_size
from fxwidth.errors import FxwidthError
from fxwidth.rules.registry import RULES, rule_name
from tests.oracles.literal_variants import variants
from tests.oracles.rules import check_permutations, check_prescription, make_probe, removal
from tests.oracles.sample_calls import Sample
from tests.oracles.samples import ROWS

# The kernels of norms, weight norms, Fourier transforms and packed sequences do not check their numbers, and read any
# memory.
FAMILIES = ("attention", "contraction", "indexing", "matrices", "movement", "reduction", "slicing", "spatial", "views")
FAMILIES += ("writes",)
# Nor do these: a stride of zero ends the process, and so does, with torch 2.11, an offset where there is none.
UNCHECKED = ("torchvision::deform_conv2d", "_embedding_bag", "_embedding_bag_forward_only")


def _rows() -> list[Sample]:
    rules = ((row, RULES.get(rule_name(row.overload()))) for row in ROWS if row.by_value and "fxwidth::" not in row.op)
    rules = (pair for pair in rules if pair[0].op not in UNCHECKED)
    return [row for row, rule in rules if rule is not None and rule.__module__.rpartition(".")[2] in FAMILIES]


def check_other_literals(sample: Sample) -> int:
    """Assert that a rule is right with other literals, and return with how many."""
    checked = 0
    for change, variant in variants(sample):
        try:
            probe = make_probe(variant)
        except FxwidthError:
            continue  # fake tensors refuse what the kernel lets pass
        if [tuple(map(axis_size, axes)) for axes in probe.result_axes] != [result.shape for result in probe.results]:
            # Fake tensors tell another shape than the kernel, as torch 2.11's for nansum over []: all is pinned.
            assert not list(probe.factors()), f"{sample.op} with {change}: what is not known is not pinned"
            continue
        generator = np.random.default_rng(0)
        try:
            check_permutations(probe)
            check_prescription(probe, {factor: removal(factor, generator) for factor in probe.factors()})
            for factor in probe.factors():
                check_prescription(probe, {factor: removal(factor, generator)})
        except Exception as error:
            raise AssertionError(f"{sample.op} with {change}: {error}") from error
        checked += 1
    return checked


@pytest.mark.parametrize("sample", _rows(), ids=[f"{row.op}-{i}" for i, row in enumerate(_rows())])
def test_other_literals(sample):
    check_other_literals(sample)


def test_literals_are_varied():
    """The variants are no empty list: strides, sizes, dims, bounds and counts all have some."""
    told = {change.partition("=")[0] for row in _rows() for change, _ in variants(row)}
    assert {"size", "stride", "storage_offset", "dim", "dims", "start", "end", "step", "groups", "pad"} <= told
