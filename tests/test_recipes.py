"""What users add from outside, each in one place: a method of selection, a cost, a growth direction, a pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

import fxwidth
from fxwidth.passes import AnalyzeWidths, PlanWidths, ResizeWidths

pytestmark = pytest.mark.usefixtures("tables_as_before")


def net() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))
    return model.double().eval(), torch.randn(5, 6, dtype=torch.float64)


class TestSelectionMethod:
    """A method is known by its name wherever `selection=` is taken."""

    def test_by_evidence(self) -> None:
        calls = []

        @fxwidth.selection_method("by variance", nested=True)
        def by_variance(evidence: Any, count: int) -> Tensor:
            calls.append((evidence.activation.shape[2], count))
            variance: Tensor = evidence.activation.diagonal(dim1=1, dim2=2).sum(0)
            return variance.argsort(descending=True)

        model, x = net()
        gm = fxwidth.trace(model, x)
        batches = [torch.randn(64, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))]
        hidden = torch.relu(model[0](batches[0]))  # type: ignore[operator]
        gm = fxwidth.resize(gm, {"0": 4}, selection="by variance", data=batches, fold=False)
        # Without a constant that could be added for it, a channel's second moment is what readers see.
        seen = hidden.var(0, unbiased=False)
        assert gm.meta["fxwidth_history"][0]["kept"]["0"] == sorted(seen.argsort(descending=True)[:4].tolist())
        assert gm.meta["fxwidth_history"][0]["selection"] == "by variance"
        assert calls
        assert all(width == 10 for width, _ in calls)

    def test_by_scores(self) -> None:
        @fxwidth.selection_method("last ones", needs_moments=False)
        def last_ones(group: fxwidth.ChannelGroup, _: fxwidth.WidthGraph) -> Tensor:
            return torch.arange(group.width)

        model, x = net()
        plan = fxwidth.plan(fxwidth.analyze(fxwidth.trace(model, x)), params=0.5, selection="last ones")
        assert plan
        for way in ("resize", "pass"):
            gm = fxwidth.trace(net()[0], x)
            if way == "resize":
                gm = fxwidth.resize(gm, plan, selection="last ones")
            else:
                gm.meta["fxwidth_plan"] = dict(plan)
                gm = ResizeWidths(selection="last ones").call(gm).graph_module
            for name, width in plan.items():
                old = {"0": 10, "2": 8}[name]
                assert gm.meta["fxwidth_history"][0]["kept"][name] == list(range(old - width, old))

    @pytest.mark.parametrize(
        ("order", "told"),
        [
            (lambda width: torch.zeros(width, dtype=torch.int64), "does not name each of 10 channels once"),
            (lambda width: torch.arange(width) + 1, "does not name each of 10 channels once"),
            (lambda width: torch.arange(width - 1), "shape [9]"),
            (torch.rand, "float32"),
        ],
    )
    def test_what_is_no_order_is_refused(self, order: Any, told: str) -> None:
        @fxwidth.selection_method("wrong")
        def wrong(evidence: Any, _: int) -> Tensor:
            result: Tensor = order(evidence.width)
            return result

        model, x = net()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        gm = fxwidth.trace(model, x)
        with pytest.raises(fxwidth.FxwidthError, match="selection='wrong'") as caught:
            fxwidth.resize(gm, {"0": 4}, selection="wrong")
        assert told in str(caught.value)
        assert all(torch.equal(before[name], value) for name, value in gm.state_dict().items())

    def test_a_name_is_taken_once(self) -> None:
        with pytest.raises(fxwidth.FxwidthError, match="choose another"):
            fxwidth.selection_method("greedy")
        with pytest.raises(fxwidth.FxwidthError, match="is a text"):
            fxwidth.selection_method(3)  # type: ignore[arg-type]
        model, x = net()
        with pytest.raises(fxwidth.FxwidthError, match="none of 'greedy'"):
            fxwidth.resize(fxwidth.trace(model, x), {"0": 4}, selection="gredy")


class TestCost:
    """A cost bounds plans as those of fxwidth do."""

    @staticmethod
    def _register() -> None:
        @fxwidth.cost("weight_bits", unit="bits")
        def weight_bits(width_graph: fxwidth.WidthGraph) -> fxwidth.Polynomial:
            return fxwidth.Polynomial.sum([(32, fxwidth.cost_polynomial(width_graph, "params"))])

    def test_plans_are_those_of_what_it_is_made_of(self) -> None:
        self._register()
        model, x = net()
        graph = fxwidth.analyze(fxwidth.trace(model, x))
        by_params = fxwidth.plan(graph, params=0.5)
        plan = fxwidth.plan(graph, budget=fxwidth.Budget(costs={"weight_bits": 0.5}))
        assert dict(plan) == dict(by_params)
        first, then = plan.notes["cost"]["weight_bits"]
        assert [first, then] == [32 * count for count in plan.notes["parameters"]]
        assert then <= first / 2
        both = fxwidth.plan(graph, budget=fxwidth.Budget(flops=0.9, costs={"weight_bits": int(first / 2)}))
        assert both.notes["cost"]["weight_bits"][1] <= first / 2

    def test_an_evolver_goes_to_it(self) -> None:
        self._register()
        model, x = net()
        gm = fxwidth.trace(model, x)
        evolver = fxwidth.Evolver(gm, every=1, rounds=2, budget=fxwidth.Budget(costs={"weight_bits": 0.5}))
        before = sum(parameter.numel() for parameter in gm.parameters())
        while not evolver.finished:
            evolver.step()
        assert sum(parameter.numel() for parameter in evolver.gm.parameters()) <= before / 2

    def test_a_unit_of_which_a_network_costs_less_than_one_is_refused(self) -> None:
        @fxwidth.cost("gigabytes", unit="gigabytes")
        def gigabytes(width_graph: fxwidth.WidthGraph) -> fxwidth.Polynomial:
            return fxwidth.Polynomial.sum([(4e-9, fxwidth.cost_polynomial(width_graph, "params"))])

        model, x = net()
        gm, budget = fxwidth.trace(model, x), fxwidth.Budget(costs={"gigabytes": 0.5})
        with pytest.raises(fxwidth.FxwidthError, match="gigabytes=0 must be at least 1"):
            fxwidth.Evolver(gm, budget=budget)
        with pytest.raises(fxwidth.FxwidthError, match=r"gigabytes=0\.5 is out of reach"):
            fxwidth.plan(fxwidth.analyze(gm), budget=budget)

    def test_errors_name_its_unit(self) -> None:
        self._register()
        model, x = net()
        graph = fxwidth.analyze(fxwidth.trace(model, x))
        with pytest.raises(fxwidth.FxwidthError, match=r"weight_bits=1 is out of reach.* bits remain"):
            fxwidth.plan(graph, budget=fxwidth.Budget(costs={"weight_bits": 1}))

    def test_what_is_none_is_refused(self) -> None:
        with pytest.raises(fxwidth.FxwidthError, match="there is no cost 'watts'"):
            fxwidth.Budget(costs={"watts": 0.5})
        with pytest.raises(fxwidth.FxwidthError, match=r"write Budget\(params="):
            fxwidth.Budget(costs={"params": 0.5})
        with pytest.raises(fxwidth.FxwidthError, match="must be a dict"):
            fxwidth.Budget(costs=[("params", 0.5)])  # type: ignore[arg-type]
        with pytest.raises(fxwidth.FxwidthError, match="choose another"):
            fxwidth.cost("params", unit="parameters")
        with pytest.raises(fxwidth.FxwidthError, match="is an identifier"):
            fxwidth.cost("my cost", unit="things")

        @fxwidth.cost("number", unit="things")
        def number(_: fxwidth.WidthGraph) -> Any:
            return 3

        model, x = net()
        with pytest.raises(fxwidth.FxwidthError, match="the cost 'number' gave int"):
            fxwidth.plan(fxwidth.analyze(fxwidth.trace(model, x)), budget=fxwidth.Budget(costs={"number": 0.5}))


class TestGrowthDirection:
    """A method makes the rows that new channels begin with; the function stays what it was."""

    @staticmethod
    def _grown(directions: Any) -> tuple[fx.GraphModule, nn.Module]:
        model, x = net()
        gm = fxwidth.trace(model, x)
        before = gm(x)
        gm = fxwidth.resize(gm, {"0": 12, "2": 11}, directions=directions)
        torch.testing.assert_close(gm(x), before, rtol=0, atol=1e-12)
        return gm, net()[0]

    @pytest.mark.parametrize("by_name", [True, False])
    def test_new_rows_are_those_of_the_method(self, by_name: bool) -> None:
        asked = []

        def twice_the_first(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
            assert isinstance(generator, torch.Generator)
            asked.append((tuple(rows.shape), count))
            return 2 * rows[:1].expand(count, -1)

        if by_name:
            fxwidth.growth_direction("twice the first")(twice_the_first)
        gm, old = self._grown("twice the first" if by_name else twice_the_first)
        assert asked == [((10, 6), 2), ((8, 10), 3)]
        for name, width in (("0.weight", 10), ("2.weight", 8)):
            new, first = gm.get_parameter(name), old.get_parameter(name)[0]
            # Columns that are new themselves read nothing.
            torch.testing.assert_close(new[width:, : len(first)], 2 * first.expand(len(new) - width, -1))
            assert not new[width:, len(first) :].any()

    def test_random_ones_are_not_orthogonal_and_as_long(self) -> None:
        gm, old = self._grown("random")
        new, present = gm.get_parameter("2.weight")[8:, :10], old.get_parameter("2.weight")
        lengths = torch.linalg.vector_norm(new, dim=1)
        torch.testing.assert_close(lengths, torch.linalg.vector_norm(present, dim=1).mean().expand(3))
        assert (new @ present.T).abs().max() > 1e-3
        orthogonal = self._grown("orthogonal")[0].get_parameter("2.weight")[8:10, :10]
        assert (orthogonal @ present.T).abs().max() < 1e-12

    @pytest.mark.parametrize(
        ("made", "told"),
        [
            (lambda rows, count, _: rows[:count].T, "gave a tensor of shape"),
            (lambda rows, count, _: [0.0] * count, "gave list"),
            (lambda rows, count, _: rows[:count] / 0, "not finite"),
        ],
    )
    def test_what_are_no_rows_is_refused(self, made: Any, told: str) -> None:
        model, x = net()
        gm = fxwidth.trace(model, x)
        with pytest.raises(fxwidth.FxwidthError, match=told):
            fxwidth.resize(gm, {"0": 12}, directions=made)
        assert gm.get_parameter("0.weight").shape == (10, 6)

    def test_what_is_no_method_is_refused(self) -> None:
        with pytest.raises(fxwidth.FxwidthError, match="is none of 'orthogonal', 'random'"):
            fxwidth.resize(fxwidth.trace(*net()), {"0": 12}, directions="orthogonl")
        with pytest.raises(fxwidth.FxwidthError, match="choose another"):
            fxwidth.growth_direction("random")
        with pytest.raises(fxwidth.FxwidthError, match="is a text"):
            fxwidth.growth_direction(1)  # type: ignore[arg-type]


def test_a_pass_between_ours() -> None:
    """A pass of a user's reads and writes the notes that ours do."""

    class AtMostHalf(PassBase):
        def call(self, graph_module: fx.GraphModule) -> PassResult:
            widths = {group.name: group.width for group in fxwidth.analyze(graph_module).free}
            plan = graph_module.meta["fxwidth_plan"]
            graph_module.meta["fxwidth_plan"] = {name: max(w, widths[name] // 2) for name, w in plan.items()}
            return PassResult(graph_module, False)

    model, x = net()
    gm = fxwidth.trace(model, x)
    steps: Sequence[PassBase] = (AnalyzeWidths(x), PlanWidths(params=0.2), AtMostHalf(), ResizeWidths())
    for step in steps:
        gm = step.call(gm).graph_module
    assert [group.width for group in fxwidth.analyze(gm).free] == [5, 4]
    assert gm(x).shape == (5, 3)
