"""Selection against brute force: which channels are kept, and where they are."""

from __future__ import annotations

import copy
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import fxwidth
from fxwidth.axes.factor_space import FactorSpace
from fxwidth.axes.factors import Factor, axis_size
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.axes.positions import channel_positions, occupied_positions
from fxwidth.reconstruction.folding import fold
from fxwidth.selection.grams import Grams, grams_of
from fxwidth.selection.greedy import greedy_order
from fxwidth.statistics.moments import moments_from_noise
from fxwidth.weights.readers import wiring_of
from tests.oracles.channels import (
    evidence,
    kept_without,
    relative,
    select,
    silence_channel,
)
from tests.zoo.nets import (
    NETS,
    build,
    grouped,
    images,
    maps_for,
    outputs_after,
    trained_like,
    width_graph,
)


class TestPositions:
    """Every position of an axis that belongs to a channel is found, by arithmetic on nested products and sums."""

    @given(st.data())
    @settings(max_examples=60)
    def test_against_the_index_maps(self, data: st.DataObject) -> None:
        space = FactorSpace()
        factors = [Factor(data.draw(st.integers(2, 4)), name) for name in "ABC"]
        element = st.deferred(lambda: st.one_of(st.integers(2, 3), st.sampled_from(factors), axis))
        term = st.lists(element, min_size=1, max_size=2).map(tuple)
        axis = st.lists(term, min_size=1, max_size=2).map(tuple)
        drawn = space.normalise(data.draw(axis))
        # Nested products can grow beyond any memory, and show nothing that small ones do not.
        assume(axis_size(drawn) <= 2000)
        for factor in factors:
            found = channel_positions(space, drawn, factor)
            assert len(found) == space.factors(drawn).count(factor)
            for channel in range(factor.size):
                kept = IndexMaps(space, {factor: kept_without(factor.size, channel)}).indices(drawn)
                own = {position for positions in found for position in positions[channel]}
                assert own == set(range(len(IndexMaps(space, {}).indices(drawn)))) - set(kept)
            assert occupied_positions(drawn)[factor] == sum(positions.size for positions in found)


class TestGreedy:
    """The greedy order against brute force."""

    @staticmethod
    def _pairs(width: int = 6, count: int = 2, seed: int = 0) -> Grams:
        generator = torch.Generator().manual_seed(seed)
        h, w = (torch.randn(count, n, width, generator=generator, dtype=torch.float64) for n in (20, 4))
        h = h @ torch.randn(count, width, width, generator=generator, dtype=torch.float64)
        return Grams(h.transpose(1, 2) @ h, w.transpose(1, 2) @ w, 1e-16)

    @staticmethod
    def _missed(pairs: Grams, kept: list[int]) -> float:
        """Return what readers miss of a set of channels by explicit regression."""
        total = 0.0
        for S, D in zip(pairs.activation, pairs.weight, strict=True):
            error = S - S[:, kept] @ torch.linalg.solve(S[kept][:, kept], S[kept])
            total += float((D * error).sum())
        return total

    @pytest.mark.parametrize("seed", range(5))
    def test_each_step_takes_the_best_channel(self, seed: int) -> None:
        pairs = self._pairs(seed=seed)
        order = greedy_order(pairs, 6).tolist()
        assert sorted(order) == list(range(6))
        for step in range(5):
            rest = [j for j in range(6) if j not in order[:step]]
            missed = {j: self._missed(pairs, [*order[:step], j]) for j in rest}
            assert missed[order[step]] == pytest.approx(min(missed.values()), rel=1e-9)

    def test_it_is_near_the_best_subset(self) -> None:
        ratios = []
        for seed in range(10):
            pairs = self._pairs(seed=seed)
            best = min(self._missed(pairs, list(kept)) for kept in combinations(range(6), 3))
            ratios.append(self._missed(pairs, greedy_order(pairs, 3)[:3].tolist()) / best)
        assert np.mean(ratios) < 1.5

    def test_orders_are_nested(self) -> None:
        pairs = self._pairs(width=9)
        assert torch.equal(greedy_order(pairs, 4), greedy_order(pairs, 9))

    @pytest.mark.parametrize("kind", ["duplicate", "combination", "unread", "silent"])
    def test_what_holds_nothing_new_comes_last(self, kind: str) -> None:
        generator = torch.Generator().manual_seed(0)
        h = torch.randn(1, 50, 6, generator=generator, dtype=torch.float64)
        w = torch.randn(1, 4, 6, generator=generator, dtype=torch.float64)
        if kind == "duplicate":
            h[..., 4] = h[..., 1]
        elif kind == "combination":
            h[..., 4] = h[..., 1] - 2 * h[..., 2]
        elif kind == "unread":
            w[..., 4] = 0
        else:
            h[..., 4] = 0
        order = greedy_order(Grams(h.mT @ h, w.mT @ w, 1e-16), 6).tolist()
        assert order[-1] in {"duplicate": (1, 4), "combination": (1, 2, 4)}.get(kind, (4,))


class TestSelect:
    """What selection returns, and what it falls back on."""

    @pytest.mark.parametrize("name", list(NETS))
    @pytest.mark.parametrize("with_moments", [True, False])
    def test_it_returns_sorted_channels(self, name: str, with_moments: bool) -> None:
        graph, x = build(name)
        moments = evidence(graph, x) if with_moments else None
        for group in graph.free:
            for width in (1, group.width // 2, group.width):
                kept = select(graph, group, width, moments)
                assert kept.dtype == np.int64
                assert len(kept) == width
                assert (np.diff(kept) > 0).all()
                assert kept.min() >= 0
                assert kept.max() < group.width

    def test_query_and_key_channels_go_by_what_they_add_to_the_scores(self) -> None:
        graph, x = build("attention")
        group = next(group for group in graph.free if any(site.parameter == "q.weight" for site in group.sites)
                     and group.width == 4)  # fmt: skip
        with torch.no_grad():
            for name in ("q.weight", "q.bias"):
                graph.analysis.parameters[name].tensor[[1, 5]] *= 1e-6
                graph.analysis.parameters[name].tensor[[2, 6]] *= 1e3
            for name in ("k.weight", "k.bias"):
                graph.analysis.parameters[name].tensor[[2, 6]] *= 1e-9
        kept = select(graph, group, 2, evidence(graph, x))
        assert kept.tolist() == [0, 3]

    @pytest.mark.parametrize("has_bias", [True, False])
    def test_a_constant_channel_is_kept_only_where_nothing_takes_its_constant(self, has_bias: bool) -> None:
        model = trained_like(
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1, bias=has_bias), nn.Flatten(2))
        )
        with torch.no_grad():
            model[0].weight[1] = 0
            model[0].bias[1] = 5
        graph, x = width_graph(model, images()), images()
        moments = evidence(graph, x)
        kept = select(graph, graph["0"], 3, moments)
        assert (1 in kept) is not has_bias
        if has_bias:
            maps = maps_for(graph, {"0": kept})
            with torch.no_grad():
                expected = model(x)
            assert relative(outputs_after(graph, maps, fold(graph, maps, moments), x), expected) < 1e-12

    def test_a_depthwise_convolution_is_no_reader(self) -> None:
        """Channels go through it: what counts is what is read of them afterwards."""
        layers = [nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.Conv2d(8, 3, 1), nn.Flatten(2)]
        model = trained_like(nn.Sequential(*layers))
        with torch.no_grad():
            model[1].weight[3] *= 100
            model[2].weight[:, 3] *= 1e-6
        graph = width_graph(model, images())
        (group,) = graph.free
        moments = evidence(graph, images())
        assert 3 not in select(graph, group, 7, moments)
        pairs = grams_of(wiring_of(graph), group, moments)
        assert pairs is not None
        assert len(pairs.activation) == 1

    def test_magnitude_sees_batch_norm_scales(self) -> None:
        graph, _ = build("conv")
        with torch.no_grad():
            graph.analysis.parameters["2.weight"].tensor[:] = 1.0
            graph.analysis.parameters["3.weight"].tensor[:] = torch.tensor([1, 8, 1, 9, 1, -7, 1, 1]).double()
            graph.analysis.parameters["3.running_var"].tensor[:] = torch.tensor([1, 1, 1, 1e6, 1, 1, 1e-3, 1]).double()
        assert select(graph, graph["2"], 3, None, "magnitude").tolist() == [1, 5, 6]

    def test_without_values_the_first_are_kept(self) -> None:
        with torch.device("meta"):
            model = grouped()
        graph = width_graph(model.eval(), torch.empty(4, 1, 8, 8, device="meta"))
        for group in graph.free:
            assert select(graph, group, 2, moments_from_noise(graph)).tolist() == [0, 1]

    def test_pairs_are_merged_where_they_would_take_too_much_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        graph, x = build("tile")
        group = max(graph.free, key=lambda group: len(group.sites))
        moments = evidence(graph, x)
        monkeypatch.setattr("fxwidth.selection.grams._MOST_ENTRIES", 1)
        with torch.no_grad():
            silence_channel(graph, group.name, 1, "reader")
        assert 1 not in select(graph, group, group.width - 1, evidence(graph, x)).tolist()
        assert len(select(graph, group, 1, moments)) == 1


class TestHalfPrecision:
    """Models in half precision are solved in single precision at least."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("with_data", [True, False])
    def test_they_lose_what_the_same_model_loses_in_single_precision(self, dtype: torch.dtype, with_data: bool) -> None:
        body = [nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.ReLU()]
        x = images(channels=1, size=12).float()
        torch.manual_seed(0)
        model = nn.Sequential(*body, nn.Conv2d(8, 3, 1)).eval()
        lost = {}
        for kind in (torch.float32, dtype):
            gm = fxwidth.trace(copy.deepcopy(model).to(kind), x[:2].to(kind))
            fxwidth.evolve(gm, params=0.5, data=[x.to(kind)] if with_data else None)
            assert {parameter.dtype for parameter in gm.parameters()} == {kind}
            with torch.no_grad():
                lost[kind] = float((gm(x.to(kind)).float() - model(x)).norm() / model(x).norm())
        assert lost[dtype] == pytest.approx(lost[torch.float32], abs=0.05)
