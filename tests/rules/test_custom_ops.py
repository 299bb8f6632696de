"""The documentation's page on custom ops, run as it stands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxwidth.analysis.roles import Role
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.rules.registry import RULES
from tests.oracles.judges import analysed, assert_replays, assert_rewrites

PAGE = (Path(__file__).parents[2] / "docs/guides/op-rule.md").read_text(encoding="utf-8")
THE_OP, _, THE_RULE, *_ = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
INPUTS = [torch.randn(4, 6, dtype=torch.float64)]


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the page's first block defines."""
    defined: dict[str, Any] = {}
    exec(THE_OP, defined)
    return defined


@pytest.fixture
def with_rule() -> Iterator[None]:
    exec(THE_RULE, {})
    yield
    del RULES["mylib::swiglu"]


class Gated(nn.Module):
    """A network with the op in its middle."""

    def __init__(self, op: Any) -> None:
        super().__init__()
        self.op = op
        self.stem, self.up, self.down, self.head = nn.Linear(6, 8), nn.Linear(8, 24), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(x + self.down(self.op(self.up(x))))


def test_the_rule_is_short():
    assert len([line for line in THE_RULE.splitlines() if line.strip()]) < 10


def test_without_the_rule_the_op_pins_and_is_named(names):
    graph = WidthGraph(analysed(Gated(names["swiglu"]), INPUTS))
    assert {group.name for group in graph.free} == {"stem"}
    for name in ("up", "down:1"):
        told = graph.why_pinned(name)
        assert "no rule for this op, in mylib::swiglu at node swiglu_default" in told
        assert "@fxwidth.rules.registry.rule('mylib::swiglu')" in told


def test_with_the_rule_it_is_resized(names, with_rule):
    model = Gated(names["swiglu"])
    graph = WidthGraph(analysed(model.double(), INPUTS))
    assert {group.name: group.width for group in graph.free} == {"stem": 8, "up": 12}
    assert [site.parameter for site in graph["up"].sites_as(Role.READER)] == ["down.weight"]
    assert_replays(graph.analysis, INPUTS)
    halved = assert_rewrites(model, INPUTS)
    assert halved.up.weight.shape == (12, 4)
    assert halved.down.weight.shape == (4, 6)


def test_a_wrong_rule_would_be_seen(names, with_rule):
    """Gates and values not coupled: the oracle that passes the right rule must not pass this one."""
    right = RULES["mylib::swiglu"]

    def wrong(c: Any) -> Any:
        *rest, both = c.axes("x")
        return [[*rest, c.split(both, c.shape("x")[-1] // 2)[1]]]

    RULES["mylib::swiglu"] = wrong
    try:
        with pytest.raises(Exception, match=r"differ|shape"):
            assert_replays(analysed(Gated(names["swiglu"]).double(), INPUTS), INPUTS)
    finally:
        RULES["mylib::swiglu"] = right
