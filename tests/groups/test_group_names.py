"""Folded names stand for all their blocks, and the nearest names are proposed for those that no group has."""

from __future__ import annotations

import doctest
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxwidth
from fxwidth import FxwidthError
from fxwidth.groups import group_names
from fxwidth.groups.group_names import LEGEND, named, near_names
from fxwidth.groups.repeated_blocks import folded
from tests.groups.test_repeated_blocks import PARTS


def test_the_examples_run() -> None:
    assert doctest.testmod(group_names).failed == 0


@given(st.lists(st.tuples(PARTS, st.integers(0, 1)), unique_by=lambda row: row[0], max_size=20))
def test_a_folded_name_stands_for_its_blocks_and_no_others(rows: list[tuple[str, int]]) -> None:
    names = [name for name, _ in rows]
    for name, _, blocks in folded(rows):
        assert sorted(named(name, names)) == sorted(blocks)


def test_a_folded_name_may_be_a_pattern_too() -> None:
    names = ["a.0.up", "a.1.up", "a.2.up", "a.2.down", "a.01.up", "b.1.up"]
    assert named("a.1..2.*", names) == ["a.1.up", "a.2.up", "a.2.down", "a.01.up"]
    assert named("*.0..1.up", names) == ["a.0.up", "a.1.up", "a.01.up", "b.1.up"]
    assert named("a.7..999999999999.up", names) == []


def blocks(count: int = 3) -> fxwidth.WidthGraph:
    torch.manual_seed(0)
    body = [nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(count)]
    net = nn.Sequential(nn.Sequential(*body), nn.Linear(8, 4))
    return fxwidth.analyze(fxwidth.trace(net, torch.randn(2, 8)))


def test_options_take_the_names_that_a_table_shows() -> None:
    graph = blocks()
    rows = graph.folded_rows()
    assert any(len(names) > 1 for _, _, names in rows)
    free = {group.name for group in graph.free}
    for name, _, names in rows:
        if not free.intersection(names):
            continue
        chosen = {option: dict(fxwidth.plan(graph, ratio=0.5, **{option: name})) for option in ("only", "keep")}
        assert set(chosen["only"]) == free.intersection(names)
        assert set(chosen["keep"]) == free.difference(names)
        assert set(fxwidth.spectrum(graph, errors=False, only=name)) == free.intersection(names)
    assert set(fxwidth.plan(graph, ratio=0.5, within="0.0..1")) == {"0.0.0", "0.0.2", "0.1.0"}
    same = fxwidth.plan(graph, params=0.6, same_width=["0.0..2.0"])
    assert len({same[f"0.{i}.0"] for i in range(3)}) == 1


def test_one_group_is_asked_for_by_one_name() -> None:
    with pytest.raises(
        FxwidthError, match=r"'0\.0\.\.2\.0' stands for 3 channel groups \('0\.0\.0', .*give one of them"
    ):
        blocks()["0.0..2.0"]
    with pytest.raises(FxwidthError, match=r"stands for 4 channel groups \('0\.0\.0', '0\.1\.0', '0\.2\.0', \.\.\.\)"):
        blocks(4)["0.0..3.0"]


def test_tables_say_what_their_names_are() -> None:
    graph = blocks()
    for table in (graph.table(), graph.table(folds=True)):
        assert table.below == (LEGEND,)
    assert LEGEND in graph._repr_html_()


class Named(nn.Module):
    """A network whose last layer is called by some path."""

    def __init__(self, last: str) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten())
        *path, name = last.split(".")
        owner: nn.Module = self
        for part in path:
            owner.add_module(part, nn.Sequential())
            owner = owner.get_submodule(part)
        owner.add_module(name, nn.Linear(8 * 16, 4))
        self.last = last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule(self.last)(self.features(x))


LAST = ("fc", "head", "heads.head", "classifier", "classifier.1", "lm_head", "last_linear", "to_logits")


@pytest.mark.parametrize("last", LAST)
def test_the_last_layer_is_proposed_by_any_of_its_usual_names(last: str) -> None:
    graph = fxwidth.analyze(fxwidth.trace(Named(last), torch.randn(2, 3, 8, 8)))
    for typed in ("head", "fc", "classifier", "clasifier", "heads.haed", "model.fc", "logits"):
        if typed in graph:
            continue
        with pytest.raises(FxwidthError) as caught:
            fxwidth.plan(graph, params=0.5, keep=typed)
        near = re.findall(r"'([^']*)'", str(caught.value).partition("did you mean")[2])
        # Where it is the path of a container a pattern is.
        assert near[0] in (last, f"{last.partition('.')[0]}.*"), (typed, str(caught.value))


NAMES = ["conv1", "conv1:1", "layer1.0.conv1", "layer1.1.conv1", "layer2.0.downsample.0", "fc"]


@pytest.mark.parametrize(
    ("typed", "first"),
    [
        ("conv", "conv1"),
        ("conv_1", "conv1"),
        ("conv1.weight", "conv1"),
        ("layer1.0.conv", "layer1.0.conv1"),
        ("backbone.layer1.1.conv1", "layer1.1.conv1"),
        ("downsample", "layer2.0.downsample.0"),
        ("Downsample.0", "layer2.0.downsample.0"),
        ("FC", "fc"),
    ],
)
def test_a_name_with_the_same_last_part_is_near(typed: str, first: str) -> None:
    assert near_names(typed, NAMES)[0] == first


def test_what_is_like_nothing_brings_nothing() -> None:
    assert near_names("zzz", NAMES) == []
    assert near_names("0", []) == []


def test_the_pattern_of_a_container_is_proposed() -> None:
    with pytest.raises(FxwidthError, match=re.escape("only='0.1' matches no group; did you mean '0.1.*'? print(width")):
        fxwidth.plan(blocks(), ratio=0.5, only="0.1")
    assert set(fxwidth.plan(blocks(), ratio=0.5, only="0.1.*")) == {"0.1.0", "0.1.2"}
