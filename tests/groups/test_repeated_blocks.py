"""Rows of repeated blocks are one, and nothing else is."""

from __future__ import annotations

import doctest

from hypothesis import given
from hypothesis import strategies as st

from fxwidth.groups import repeated_blocks
from fxwidth.groups.repeated_blocks import folded


def test_the_example_runs() -> None:
    assert doctest.testmod(repeated_blocks).failed == 0


def test_a_number_in_the_name_of_a_layer_is_no_block() -> None:
    assert [name for name, _, _ in folded([("conv1", 8), ("conv2", 8)])] == ["conv1", "conv2"]


def test_blocks_with_a_gap_tell_it() -> None:
    rows = [(f"layers.{i}.up", 8 if i != 2 else 4) for i in range(5)]
    assert [name for name, _, _ in folded(rows)] == ["layers.0..1,3..4.up", "layers.2.up"]


def test_of_two_numbers_that_vary_the_one_of_more_values_is_folded() -> None:
    rows = [(f"stages.{i}.blocks.{j}.up", 8) for i in range(2) for j in range(3)]
    assert [name for name, _, _ in folded(rows)] == ["stages.0.blocks.0..2.up", "stages.1.blocks.0..2.up"]


PARTS = st.lists(st.sampled_from(["a", "b1", "0", "1", "7", "x_2"]), min_size=1, max_size=3).map(".".join)


@given(st.lists(st.tuples(PARTS, st.integers(0, 1)), unique_by=lambda row: row[0], max_size=20))
def test_every_row_is_in_one_folded_row_of_its_kind(rows: list[tuple[str, int]]) -> None:
    found = folded(rows)
    assert sorted((name, rest) for _, rest, names in found for name in names) == sorted(rows)
    places = {name: place for place, (name, _) in enumerate(rows)}
    assert [places[names[0]] for _, _, names in found] == sorted(places[names[0]] for _, _, names in found)
    assert len({(name, rest) for name, rest, _ in found}) == len(found)
