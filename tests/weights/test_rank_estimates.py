"""Ranks of spectra, and all of a graph's spectra as plain data."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxwidth
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.errors import FxwidthError
from fxwidth.importance.estimates import Evidence, gather_evidence
from fxwidth.importance.loss_sensitivity import _divided, _probed_width, loss_rates, shrunk_in_place
from fxwidth.reconstruction.folding import fold
from fxwidth.runtime.tensor_slots import substituted
from fxwidth.statistics.moments import moments_from_data
from fxwidth.weights.rank_estimates import (
    Values,
    effective_rank,
    gavish_donoho_rank,
    marchenko_pastur_median,
    marchenko_pastur_rank,
    stable_rank,
)
from tests.zoo.nets import build, conv, images, outputs_after, tokens, trained_like, width_graph


def test_equal_values_have_full_rank() -> None:
    assert effective_rank(np.full(7, 0.3)) == pytest.approx(7)
    assert stable_rank(np.full(7, 0.3)) == pytest.approx(7)
    assert effective_rank(np.array([5.0, 0, 0])) == pytest.approx(1)
    assert stable_rank(np.array([2.0, 1, 1])) == pytest.approx(1.5)


def test_nothing_has_rank_zero() -> None:
    nothing = np.zeros(4)
    assert effective_rank(nothing) == stable_rank(nothing) == 0
    assert gavish_donoho_rank(nothing, 4, 9) == marchenko_pastur_rank(nothing, 4, 9) == 0


@pytest.mark.parametrize("beta", [0.05, 0.3, 0.7, 1.0])
def test_the_median_is_that_of_noise(beta: float) -> None:
    columns = 1200
    noise = np.random.default_rng(0).standard_normal((round(beta * columns), columns))
    squares = np.linalg.svd(noise, compute_uv=False) ** 2 / columns
    assert marchenko_pastur_median(beta) == pytest.approx(np.median(squares), rel=0.02)


def noise_median(beta: float) -> float:
    """Return the median of the Marchenko-Pastur distribution, by sums over a fine grid of its density.

    Squares of x in the place of x leave no pole at zero: it is as sharp for square matrices.
    """
    low, high = 1 - np.sqrt(beta), 1 + np.sqrt(beta)
    edges = np.linspace(low, high, 400_001)
    roots = (edges[1:] + edges[:-1]) / 2
    density = np.sqrt((high**2 - roots**2) * (roots**2 - low**2)) / roots
    mass = np.cumsum(density)
    return float(roots[np.searchsorted(mass, mass[-1] / 2)] ** 2)


def counted_from(rank: Callable[[Values, int, int], int], rows: int, columns: int) -> float:
    """Return how many times the median a singular value must be to be counted."""
    others = np.linspace(0.9, 1.1, min(rows, columns) - 1)
    low, high = 1.0, 10.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        values = np.append(others, middle)
        low, high = (low, middle) if rank(values / np.median(values), rows, columns) else (middle, high)
    return high / float(np.median(np.append(others, high)))


@pytest.mark.parametrize(("rows", "columns"), [(1000, 1000), (500, 1000), (1000, 250), (50, 1000)])
def test_a_value_counts_from_the_threshold_of_its_source_on(rows: int, columns: int) -> None:
    beta = min(rows, columns) / max(rows, columns)
    median = np.sqrt(noise_median(beta))
    optimal = np.sqrt(2 * (beta + 1) + 8 * beta / ((beta + 1) + np.sqrt(beta**2 + 14 * beta + 1)))
    assert counted_from(gavish_donoho_rank, rows, columns) == pytest.approx(optimal / median, rel=1e-4)
    assert counted_from(marchenko_pastur_rank, rows, columns) == pytest.approx((1 + np.sqrt(beta)) / median, rel=1e-4)


@pytest.mark.parametrize(("columns", "omega"), [(1000, 2.8582), (2000, 2.1711)])
def test_thresholds_of_the_table(columns: int, omega: float) -> None:
    """The table of the paper on the optimal threshold gives omega(1) and omega(1/2)."""
    assert counted_from(gavish_donoho_rank, 1000, columns) == pytest.approx(omega, abs=2e-4)


@pytest.mark.parametrize(("rows", "columns"), [(60, 300), (300, 60), (150, 150)])
@pytest.mark.parametrize("bound", [gavish_donoho_rank, marchenko_pastur_rank])
def test_a_signal_in_noise_is_counted(rows: int, columns: int, bound: object) -> None:
    generator = np.random.default_rng(0)
    signal = generator.standard_normal((rows, 5)) @ generator.standard_normal((5, columns))
    values = np.linalg.svd(signal + 0.3 * generator.standard_normal((rows, columns)), compute_uv=False)
    assert callable(bound)
    assert bound(values, rows, columns) == 5


class TestSpectrum:
    """`fxwidth.spectrum`."""

    def test_all_of_it_as_plain_data(self) -> None:
        graph, x = build("conv")
        found = fxwidth.spectrum(graph, data=[x])
        assert set(found) == {group.name for group in graph.free}
        plain = json.loads(json.dumps({name: one.as_plain() for name, one in found.items()}))
        for group in graph.free:
            one = plain[group.name]
            assert one["width"] == group.width == len(one["singular_values"])
            assert one["singular_values"] == sorted(one["singular_values"], reverse=True)
            assert len(one["errors"]) == group.width + 1
            assert (np.diff(one["errors"]) <= 1e-12).all()
            assert one["errors"][-1] == 0
            assert 1 <= one["stable_rank"] <= one["effective_rank"] + 1e-9 <= group.width + 1e-6
            assert one["evidence"].startswith("data")
            assert one["is_calibrated"] is False

    def test_without_data_and_for_some_groups(self) -> None:
        graph, _ = build("conv")
        assert list(fxwidth.spectrum(graph, only="2")) == ["2"]
        assert "2" not in fxwidth.spectrum(graph, keep="2")
        assert fxwidth.spectrum(graph, only="2")["2"].evidence == "noise"

    def test_on_the_meta_device(self) -> None:
        with torch.device("meta"):
            model = conv()
        found = fxwidth.spectrum(width_graph(model.eval(), torch.empty(4, 1, 8, 8, device="meta")))
        assert all(one.singular_values is None and one.effective_rank is None for one in found.values())
        assert all(one.evidence is None for one in found.values())

    def test_dependent_channels_cost_nothing(self) -> None:
        graph, x = build("conv")
        with torch.no_grad():
            for name in ("0.weight", "0.bias"):
                graph.analysis.parameters[name].tensor[5] = graph.analysis.parameters[name].tensor[1]
        errors = fxwidth.spectrum(graph, data=[x])["0"].errors
        assert errors[5] < 1e-9 * errors[1]
        assert errors[4] > 1e-4 * errors[1]


def classified(x: Tensor) -> list[tuple[Tensor, Tensor]]:
    labels = torch.arange(len(x)) % 3
    return list(zip(x.split(16), labels.split(16), strict=True))


class TestLoss:
    """Errors in units of the loss."""

    @pytest.mark.parametrize("name", ["conv", "grouped", "shared", "attention"])
    def test_a_network_shrunk_in_place_acts_like_a_resized_one(self, name: str) -> None:
        graph, x = build(name)
        evidence = Evidence(graph, moments_from_data(graph, [x]))
        group = max((g for g in graph.free if g.mixed is None and g.width > 2), key=lambda group: group.width)
        maps = IndexMaps(graph.analysis.space, {group.factor: evidence.kept(group, group.width - 2)})
        module = graph.analysis.module
        with torch.no_grad():
            with substituted(module, shrunk_in_place(evidence, {group: group.width - 2})):
                actual = module(x)
            expected = outputs_after(graph, maps, fold(graph, maps, evidence.moments), x)
            before = module(x)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(actual, before, rtol=1e-6)

    def test_rates_are_rises_of_the_loss(self) -> None:
        graph, x = build("conv")
        module = graph.analysis.module
        with torch.no_grad():
            data = [(x, module(x))]
        evidence = gather_evidence(graph, data)
        (group,) = [group for group in graph.free if group.name == "2"]
        # Squares rise in proportion to errors that are squares; of one group the rate is the rise over the error.
        errors = evidence.errors(group)
        width = _probed_width(errors, 0.4)
        assert width is not None
        with torch.no_grad(), substituted(module, shrunk_in_place(evidence, {group: width})):
            rise = float(F.mse_loss(module(x), data[0][1]))
        rates = loss_rates(evidence, [group], data, F.mse_loss)
        assert rates[group] == pytest.approx(rise / float(errors[width]), rel=1e-6)

    def test_groups_that_the_loss_does_not_hear_count_little(self) -> None:
        graph, x = build("grouped")
        evidence = gather_evidence(graph, [x])
        heard = loss_rates(evidence, graph.free, [(x,)], lambda output: output.square().mean())
        assert all(rate > 0 for rate in heard.values())
        unheard = loss_rates(evidence, graph.free, [(x,)], lambda output: 0 * output.sum())
        assert set(unheard.values()) == {1.0}

    def test_outputs_and_targets_are_divided_together(self) -> None:
        whole = ({"logits": torch.arange(40).view(20, 2)}, (torch.arange(20),))
        parts = list(_divided(whole, 20))
        assert sum(count for count, _ in parts) == 20
        assert all(len(out["logits"]) == len(target) == count for count, (out, (target,)) in parts)
        assert torch.equal(torch.cat([target for _, (_, (target,)) in parts]), whole[1][0])
        for other in (torch.tensor(3.0), torch.zeros(19), ["a"] * 20):
            assert len(list(_divided((whole[0], (other,)), 20))) == 1

    def test_a_plan_in_units_of_the_loss(self) -> None:
        graph, x = build("attention")
        data = [(x, torch.arange(64) % 3)]
        chosen = fxwidth.plan(graph, params=0.7, data=data, loss=F.cross_entropy)
        assert chosen.notes["evidence"].startswith("data")
        assert chosen.notes["error"] == pytest.approx(sum(chosen.notes["errors"].values()))
        assert fxwidth.spectrum(graph, data=data, loss=F.cross_entropy)["v#1"].is_calibrated

    @pytest.mark.parametrize(
        ("loss", "data", "message"),
        [
            (F.cross_entropy, None, "loss= needs data= to be taken on"),
            (lambda output, target: output, [(images(4), torch.arange(4))], "it must return one finite number"),
            (lambda output, target: "0", [(images(4), torch.arange(4))], "it must return one finite number"),
            (lambda *_: torch.tensor(torch.nan), [images(4)], "it must return one finite number"),
        ],
    )
    def test_losses_that_cannot_be_used(self, loss: object, data: object, message: str) -> None:
        graph, _ = build("conv")
        with pytest.raises(FxwidthError, match=message):
            fxwidth.plan(graph, params=0.6, data=data, loss=loss)  # type: ignore[arg-type]

    def test_a_loss_without_a_budget(self) -> None:
        graph, x = build("conv")
        with pytest.raises(FxwidthError, match="loss= weighs groups against each other under a budget"):
            fxwidth.plan(graph, data=classified(x), loss=F.cross_entropy)


def test_networks_that_are_given_by_dicts_have_losses_too() -> None:
    model = trained_like(nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)))
    x = tokens()[:, 0]
    graph = width_graph(model, x)
    data = [{"input": x, "label": torch.arange(64) % 3}]
    chosen = fxwidth.plan(graph, params=0.6, data=data, loss=lambda out, batch: F.cross_entropy(out, batch["label"]))
    assert chosen["0"] < 12
