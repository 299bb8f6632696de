"""Groups by names and modules, parts of a network, floors that are parts of the first width, and one ratio for all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth import FxwidthError


class Network(nn.Module):
    """Two stages around streams of their own, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 12)
        self.first = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 12))
        self.between = nn.Linear(12, 10)
        self.second = nn.ModuleList(nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 10)) for _ in range(2))
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.between(x + self.first(x)).relu()
        for part in self.second:
            x = x + part(x)
        return self.head(self.norm(x))


@pytest.fixture
def model() -> Network:
    torch.manual_seed(0)
    return Network()


def graph_of(model: nn.Module) -> fxwidth.WidthGraph:
    return fxwidth.analyze(fxwidth.trace(model, torch.randn(2, 4)))


def changed(graph: fxwidth.WidthGraph, **options: Any) -> set[str]:
    return set(fxwidth.plan(graph, ratio=0.5, **options))


class TestModules:
    """A module stands for the groups that it writes."""

    def test_only_and_keep_take_modules_and_names_together(self, model: Network) -> None:
        graph = graph_of(model)
        assert changed(graph) == {"stem", "first.0", "between", "second.0.0", "second.1.0"}
        assert changed(graph, only=model.first) == {"stem", "first.0"}  # it writes to the stream
        assert changed(graph, only=[model.first[0], "second.1*"]) == {"first.0", "second.1.0"}
        assert changed(graph, keep=[model.second, "stem"]) == {"first.0"}
        assert changed(graph, keep=model.norm) == changed(graph, keep="between")
        # Those of the graph are modules as good.
        assert changed(graph, only=graph.analysis.module.get_submodule("first.0")) == {"first.0"}

    def test_they_are_taken_wherever_names_are(self, model: Network) -> None:
        gm = fxwidth.trace(model, torch.randn(2, 4))
        assert set(fxwidth.spectrum(fxwidth.analyze(gm), only=[model.second])) == {
            "between",
            "second.0.0",
            "second.1.0",
        }
        one, other = (fxwidth.spectral_penalty(gm, only=only) for only in (model.first[0], "first.0"))
        assert one == other
        gm = fxwidth.evolve(model, torch.randn(2, 4), ratio=0.5, only=model.first[0])
        assert fxwidth.report(gm).resizes[0]["widths"] == {"first.0": [20, 10]}

    def test_an_evolver_knows_them_after_a_resize_too(self, model: Network) -> None:
        # The model stays as it was, with parameters that are no longer those of the graph.
        model.register_forward_hook(lambda _, __, output: output)
        for options in ({"only": [model.first[0], model.second]}, {"within": [model.first, "second"]}):
            gm = fxwidth.trace(copy.deepcopy(model) if "within" in options else model, torch.randn(2, 4))
            if "within" in options:
                options = {"within": [gm.get_submodule("first"), "second"]}
            evolver = fxwidth.Evolver(gm, every=1, params=0.8, rounds=3, **options)
            for _ in range(3):
                assert evolver.step(torch.randn(8, 4)) is not None
            named = {name for record in evolver.history for name in record["widths"]}
            assert named <= {"first.0", "between", "second.0.0", "second.1.0"}
            assert evolver.finished

    @pytest.mark.parametrize("option", ["only", "keep", "within"])
    def test_modules_that_stand_for_nothing_are_refused(self, model: Network, option: str) -> None:
        graph = graph_of(model)
        with pytest.raises(FxwidthError, match=rf"{option}= was given a module, Linear, but none of its parameters"):
            changed(graph, **{option: nn.Linear(2, 2)})
        with pytest.raises(FxwidthError, match=rf"{option}= was given a module, ReLU, but it has no parameters; give"):
            changed(graph, **{option: [model.first[1]]})
        with pytest.raises(FxwidthError, match=rf"{option}= takes names or patterns of groups, or modules, but"):
            changed(graph, **{option: [3]})


class TestScopes:
    """Nothing outside of a part changes."""

    def test_groups_that_are_inside_alone(self, model: Network) -> None:
        graph = graph_of(model)
        assert changed(graph, within="first") == {"first.0"}
        assert changed(graph, within="second*") == {"second.0.0", "second.1.0"}
        assert changed(graph, within=["second.1", model.first]) == {"first.0", "second.1.0"}
        assert changed(graph, within=["second", "between", "norm", "head"]) == {"between", "second.0.0", "second.1.0"}
        assert changed(graph, within="second", keep="second.0*") == {"second.1.0"}

    def test_what_is_outside_keeps_its_shapes(self, model: Network) -> None:
        gm = fxwidth.trace(model, torch.randn(2, 4))
        before = {name: tensor.shape for name, tensor in gm.state_dict().items()}
        fxwidth.evolve(gm, params=0.8, within="second")
        apart = {name for name, tensor in gm.state_dict().items() if tensor.shape != before[name]}
        assert apart
        assert all(name.startswith("second.") for name in apart)

    def test_what_leaves_nothing_is_refused(self, model: Network) -> None:
        graph = graph_of(model)
        with pytest.raises(FxwidthError, match=r"within='secand' matches no module with parameters; did you mean 'sec"):
            changed(graph, within="secand")
        with pytest.raises(FxwidthError, match=r"within='stem' leaves no group that may change: 'stem' is in first"):
            changed(graph, within="stem")
        with pytest.raises(FxwidthError, match=r"within=Linear leaves no group that may change: 'stem' is in"):
            changed(graph, within=model.stem)
        with pytest.raises(FxwidthError, match=r"within='head' leaves no group that may change: 'between' is in"):
            changed(graph, within="head")
        with pytest.raises(FxwidthError, match=r"within='head' leaves no group that may change: no free group is in"):
            changed(graph, within="head", only="first.0")


class TestFloors:
    """A float is a part of the width before all resizes."""

    @pytest.mark.parametrize("options", [{"params": 0.3}, {"shrink_energy": 0.9}, {"ratio": 0.1}])
    def test_no_group_goes_below(self, model: Network, options: dict[str, Any]) -> None:
        graph = graph_of(model)
        plan = fxwidth.plan(graph, min_width=0.3, **options)
        floors = {"stem": 4, "first.0": 6, "between": 3, "second.0.0": 5, "second.1.0": 5}
        widths = {group.name: plan.widths.get(group.name, group.width) for group in graph.free}
        assert all(widths[name] >= floor for name, floor in floors.items())
        assert any(widths[name] == floor for name, floor in floors.items())

    def test_it_is_of_the_first_width_after_resizes_too(self, model: Network) -> None:
        gm = fxwidth.trace(model, torch.randn(2, 4))
        for _ in range(3):
            gm = fxwidth.evolve(gm, ratio=0.5, min_width=0.4, only="first.0")
        assert fxwidth.analyze(gm)["first.0"].width == 8
        gm = fxwidth.trace(Network(), torch.randn(2, 4))
        evolver = fxwidth.Evolver(gm, every=1, params=0.45, rounds=4, min_width=0.4)
        for _ in range(4):
            evolver.step(torch.randn(8, 4))
        assert fxwidth.analyze(gm)["first.0"].width >= 8

    def test_the_whole_width_is_a_part_too(self, model: Network) -> None:
        assert fxwidth.plan(graph_of(model), ratio=0.5, min_width=1.0) == {}

    @pytest.mark.parametrize("value", [0.0, -0.5, 1.5, float("nan")])
    def test_others_are_refused(self, value: float) -> None:
        with pytest.raises(FxwidthError, match=r"min_width=.* must be an integer of at least 1, or a float in \(0,"):
            fxwidth.plan(None, min_width=value)  # type: ignore[arg-type]


class TestRatios:
    """Every group keeps one part of its channels."""

    def test_widths_are_rounded_to_the_nearest(self, model: Network) -> None:
        graph = graph_of(model)
        assert fxwidth.plan(graph, ratio=0.5).widths == {
            "stem": 6, "first.0": 10, "between": 5, "second.0.0": 8, "second.1.0": 8,
        }  # fmt: skip
        plan = fxwidth.plan(graph, ratio=0.4, align=4)
        assert plan.widths == {"stem": 4, "first.0": 8, "between": 4, "second.0.0": 8, "second.1.0": 8}
        assert plan.notes["error"] > 0
        assert fxwidth.plan(graph, ratio=1.0) == {}
        assert (
            fxwidth.plan(graph, ratio=0.5, max_width=7, same_width=[["first.0", "second.0.0"]]).widths["first.0"] == 7
        )

    def test_it_grows_what_grows_exactly(self, model: Network) -> None:
        graph = graph_of(model)
        plan = fxwidth.plan(graph, ratio=1.5)
        assert plan.widths["first.0"] == 30
        assert all(graph[name].inexact_growth is None for name in plan)
        assert fxwidth.plan(graph, ratio=1.3, align=8, only="first.0").widths == {"first.0": 24}

    def test_evolve_takes_it_with_data(self, model: Network) -> None:
        gm = fxwidth.evolve(model, torch.randn(2, 4), ratio=0.5, data=[torch.randn(32, 4)])
        record = fxwidth.report(gm).resizes[0]
        assert record["widths"]["first.0"] == [20, 10]
        assert record["evidence"].startswith("data")

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"ratio": 0.0}, r"ratio=0.0 must be a number in \(0, 100\]: the part of its channels that a group keeps"),
            ({"ratio": True}, r"ratio=True must be a number"),
            ({"ratio": "half"}, r"ratio='half' must be a number"),
            ({"ratio": 0.5, "params": 0.5}, r"ratio=0.5 sets all widths, and leaves nothing to Budget\(params=0.5"),
            (
                {"ratio": 0.5, "grow_step": 2},
                r"grow_step= decides where widths go by spectra; ratio= sets them",
            ),
            (
                {"ratio": 0.5, "data": [torch.ones(2, 4)]},
                r"data= makes a difference under a budget alone; .* a ratio",
            ),
            ({"pruning_ratio": 0.5}, r"for one of all groups' channels, ratio=0.5"),
        ],
    )
    def test_what_it_cannot_be(self, model: Network, options: dict[str, Any], text: str) -> None:
        with pytest.raises(FxwidthError, match=text):
            fxwidth.plan(graph_of(model), **options)

    def test_an_evolver_goes_to_targets(self, model: Network) -> None:
        gm = fxwidth.trace(model, torch.randn(2, 4))
        with pytest.raises(FxwidthError, match=r"ratio=0.5 sets widths once, and an Evolver resizes again and again"):
            fxwidth.Evolver(gm, ratio=0.5)
