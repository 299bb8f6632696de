"""Plans tried out on noise: what they do to the outputs, and when that outweighs the sum of errors."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.importance.estimates import Evidence, gather_evidence
from fxwidth.importance.plan_simulation import Rehearsals, has_inputs
from tests.zoo.nets import images, trained_like


class Stream(nn.Module):
    """A residual stream that many read, and blocks in which one layer reads another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.into = nn.ModuleList(nn.Conv2d(8, 12, 3, padding=1) for _ in range(2))
        self.out = nn.ModuleList(nn.Conv2d(12, 8, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for into, out in zip(self.into, self.out, strict=True):
            x = x + out(into(x.relu()).relu())
        result: Tensor = self.head(x.mean((2, 3)))
        return result


def graph() -> fxwidth.WidthGraph:
    return fxwidth.analyze(fxwidth.trace(trained_like(Stream()), images(4)))


@torch.no_grad()
def test_errors_are_those_of_the_resized_network() -> None:
    wg = graph()
    evidence = gather_evidence(wg, None)
    assert evidence.moments is not None
    (x,) = evidence.moments.inputs
    plans = [{group: group.width // 2 for group in wg.free}, {wg.free[0]: 5}, {group: group.width for group in wg.free}]
    found = Rehearsals(evidence).output_errors(plans)
    module = wg.analysis.module
    before = module(x)
    for plan, error in zip(plans, found, strict=True):
        small = copy.deepcopy(module)
        names = {group.name: width for group, width in plan.items() if width < group.width}
        if names:
            fxwidth.resize(small, fxwidth.Plan(names), rotate=False)
        expected = (small(x) - before).square().mean() / before.var(0, correction=0).mean()
        assert error == pytest.approx(float(expected), rel=1e-6, abs=1e-12)
    assert found[0] > found[1] > found[2] == 0


def test_inputs_that_a_model_writes_to_are_the_same_for_every_plan() -> None:
    class Halving(Stream):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(0.5))

    wg = fxwidth.analyze(fxwidth.trace(trained_like(Halving()), images(4)))
    evidence = gather_evidence(wg, None)
    assert evidence.moments is not None
    assert float(evidence.moments.inputs[0].var()) == pytest.approx(1, rel=0.2)
    plan = {wg.free[0]: 5}
    once, again = Rehearsals(evidence).output_errors([plan, plan])
    assert once == again > 0


def test_there_are_inputs_without_data_alone() -> None:
    wg = graph()
    assert has_inputs(gather_evidence(wg, None))
    assert not has_inputs(gather_evidence(wg, [images(64)]))
    assert not has_inputs(gather_evidence(wg, None, "projection"))
    assert not has_inputs(Evidence(wg, None))


class TestPlans:
    @staticmethod
    def _planned(monkeypatch: pytest.MonkeyPatch, errors: list[float]) -> tuple[fxwidth.Plan, list[int]]:
        asked: list[int] = []

        def fixed(_: Rehearsals, plans: Sequence[Mapping[ChannelGroup, int]]) -> list[float]:
            asked.append(len(plans))
            return errors

        monkeypatch.setattr(Rehearsals, "output_errors", fixed)
        return fxwidth.plan(graph(), params=0.5), asked

    def test_a_plan_far_nearer_is_preferred(self, monkeypatch: pytest.MonkeyPatch) -> None:
        (first, asked), (other, _) = (self._planned(monkeypatch, errors) for errors in ([1.0, 0.6], [1.0, 0.4]))
        assert asked == [2]
        # What many read is kept wider.
        assert other.get("stem", 8) > first.get("stem", 8)
        assert first.notes["error"] < other.notes["error"]
        for plan in (first, other):
            before, after = plan.notes["parameters"]
            assert after <= 0.5 * before

    def test_with_data_nothing_is_tried(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Rehearsals, "output_errors", lambda *_: pytest.fail("data know better"))
        assert fxwidth.plan(graph(), params=0.5, data=[images(64)])

    def test_the_model_is_left_as_it_was(self) -> None:
        wg = graph()
        before = {name: tensor.clone() for name, tensor in wg.analysis.module.state_dict().items()}
        fxwidth.plan(wg, params=0.5)
        for name, tensor in wg.analysis.module.state_dict().items():
            assert torch.equal(tensor, before[name])
