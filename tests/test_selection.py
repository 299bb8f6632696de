"""Selection and folding against least squares on explicit samples, and exactness where channels depend on others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nets import (
    NETS,
    Attention,
    build,
    grouped,
    images,
    inputs_of,
    maps_for,
    outputs_after,
    rows_of,
    tokens,
    trained_like,
    width_graph,
)
from torch import Tensor, nn

import fxwidth
from fxwidth.factors import Factor, FactorSpace, axis_size
from fxwidth.folding import fold, variance_ratio
from fxwidth.groups import WidthGraph
from fxwidth.index_maps import NEW, IndexMaps, Indices
from fxwidth.moments import Moment, Moments, moments_from_data, moments_from_noise
from fxwidth.occurrences import channel_positions, occupied_positions
from fxwidth.pairs import Pairs, pairs_of
from fxwidth.rankings import greedy_order
from fxwidth.readers import wiring_of
from fxwidth.regression import regression
from fxwidth.selection import select

Folded = dict[str, Tensor]


def evidence(graph: WidthGraph, x: Tensor) -> Moments:
    moments = moments_from_data(graph, [x], limit=None)
    assert moments is not None
    return moments


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def kept_without(width: int, *dropped: int) -> Indices:
    return np.setdiff1d(np.arange(width), dropped)


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
    def _pairs(width: int = 6, count: int = 2, seed: int = 0) -> Pairs:
        generator = torch.Generator().manual_seed(seed)
        h, w = (torch.randn(count, n, width, generator=generator, dtype=torch.float64) for n in (20, 4))
        h = h @ torch.randn(count, width, width, generator=generator, dtype=torch.float64)
        return Pairs(h.transpose(1, 2) @ h, w.transpose(1, 2) @ w, 1e-16)

    @staticmethod
    def _missed(pairs: Pairs, kept: list[int]) -> float:
        """Return what readers miss of a set of channels by explicit regression."""
        total = 0.0
        for S, D in zip(pairs.seen, pairs.wanted, strict=True):
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
        order = greedy_order(Pairs(h.mT @ h, w.mT @ w, 1e-16), 6).tolist()
        assert order[-1] in {"duplicate": (1, 4), "combination": (1, 2, 4)}.get(kind, (4,))


class TestFold:
    """The folded weights are those of least squares on the samples themselves."""

    @pytest.mark.parametrize("centred", [True, False])
    def test_regression_is_least_squares(self, centred: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        h = torch.randn(4000, 7, generator=generator, dtype=torch.float64) @ torch.randn(7, 7).double() + 1
        moment = Moment(h.mean(0), torch.cov(h.T, correction=0), 10**12, 10**12, 1e-16)
        kept, dropped = torch.tensor([0, 2, 5, 6]), torch.tensor([1, 3, 4])
        R = regression(moment, kept, dropped, 2 * torch.ones(3).double(), centred=centred)
        design = torch.cat([h[:, kept], h.new_ones(4000, 1)], 1) if centred else h[:, kept]
        solution = torch.linalg.lstsq(design, h[:, dropped]).solution
        torch.testing.assert_close(R.T, solution[:4], rtol=1e-8, atol=1e-9)

    def test_few_samples_are_trusted_less(self) -> None:
        """With fewer samples than channels the unregularised fit is worthless on other samples."""
        generator = torch.Generator().manual_seed(0)
        mixing = torch.randn(40, 40, generator=generator, dtype=torch.float64)
        few, many = (torch.randn(n, 40, generator=generator, dtype=torch.float64) @ mixing for n in (24, 4000))
        kept, dropped = torch.arange(20), torch.arange(20, 40)

        def error(rows: int) -> float:
            moment = Moment(few.mean(0), torch.cov(few.T, correction=0), rows, rows, 1e-16)
            R = regression(moment, kept, dropped, torch.ones(20).double(), centred=True)
            return float((many[:, dropped] - many[:, kept] @ R.T).square().sum() / many[:, dropped].square().sum())

        assert error(24) < 1.0 < error(10**12)

    @pytest.mark.parametrize("name", ["conv", "grouped", "tile", "in place", "attention"])
    def test_against_least_squares_on_the_samples(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fxwidth.regression.effective_rows", lambda moment: 1e15)
        monkeypatch.setattr("fxwidth.folding._MATCHING", 0.0)
        graph, x = build(name)
        original = trained_like(NETS[name][0]())
        seen = inputs_of(original, x)
        maps = maps_for(graph, {group.name: kept_without(group.width, 1, group.width - 1) for group in graph.free})
        folded = fold(graph, maps, evidence(graph, x))
        checked = 0
        for reader in wiring_of(graph).readers:
            assert reader.view is not None
            if reader.view.parameter not in folded:
                continue
            path = reader.view.parameter.removesuffix(".weight")
            layer = original.get_submodule(path)
            follower = f"{path[:-1]}{int(path[-1]) + 1}" if name == "conv" else ""
            norm = original.get_submodule(follower) if follower and layer.bias is None else None
            (given,) = seen[path]
            rows = rows_of(layer, given, axis_size(reader.axis))
            weight, constant = by_least_squares(layer, rows, maps.indices(reader.axis), norm)
            torch.testing.assert_close(folded[reader.view.parameter], weight, rtol=1e-7, atol=1e-9)
            if layer.bias is not None:
                torch.testing.assert_close(folded[f"{path}.bias"], layer.bias + constant, rtol=1e-7, atol=1e-9)
            elif isinstance(norm, nn.BatchNorm2d):
                moved = norm.running_mean - constant
                torch.testing.assert_close(folded[f"{follower}.running_mean"], moved, rtol=1e-7, atol=1e-9)
            checked += 1
        assert checked >= 2

    def test_kept_columns_stay_where_nothing_is_read_of_the_dropped(self) -> None:
        graph, x = build("conv")
        with torch.no_grad():
            graph.analysis.parameters["2.weight"].tensor[:, [1, 4]] = 0
        folded = fold(graph, maps_for(graph, {"0": kept_without(6, 1, 4)}), evidence(graph, x))
        assert torch.equal(folded["2.weight"], graph.analysis.parameters["2.weight"].tensor)
        assert torch.equal(folded["3.running_mean"], graph.analysis.parameters["3.running_mean"].tensor)
        variance = graph.analysis.parameters["3.running_var"].tensor
        torch.testing.assert_close(folded["3.running_var"], variance, rtol=1e-14, atol=0)

    def test_the_batch_norm_that_follows_divides_by_the_variance_that_is_left(self) -> None:
        model = trained_like(_batch_norm_bottleneck()[0])
        model[2].weight.data = torch.randn_like(model[2].weight)
        x = images()
        graph = width_graph(model, x)
        maps = maps_for(graph, {"2": kept_without(8, 0, 3, 4)})
        folded = fold(graph, maps, evidence(graph, x))
        with torch.no_grad():
            before = model[4](model[:4](x))
            kept = torch.from_numpy(kept_without(8, 0, 3, 4))
            after = nn.functional.conv2d(model[:4](x)[:, kept], folded["4.weight"][:, kept])
        left = after.var((0, 2, 3), correction=0) / before.var((0, 2, 3), correction=0)
        assert float(left.max()) < 1
        assert float(left.min()) > 0.05
        torch.testing.assert_close(folded["5.running_var"] / model[5].running_var, left, rtol=1e-10, atol=0)

    def test_without_a_batch_norm_outputs_are_made_louder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        graph, x = build("shared")
        group = next(group for group in graph.free if group.width == 6)
        maps = maps_for(graph, {group.name: kept_without(6, 0, 3)})
        moments = evidence(graph, x)
        louder = fold(graph, maps, moments)
        monkeypatch.setattr("fxwidth.folding._MATCHING", 0.0)
        plain = fold(graph, maps, moments)
        views = ((reader, reader.view) for reader in wiring_of(graph).readers)
        moment = moments.of(next(r for r, view in views if view is not None and view.parameter == "shared.weight"))
        assert moment is not None
        kept = kept_without(6, 0, 3)

        def outputs(folded: Folded) -> tuple[Tensor, Tensor]:
            w = folded["shared.weight"][:, kept]
            variance = ((w @ moment.covariance[kept][:, kept]) * w).sum(1)
            return w @ moment.mean[kept] + folded["shared.bias"], variance

        weight = graph.analysis.parameters["shared.weight"].tensor.detach()
        full = ((weight @ moment.covariance) * weight).sum(1)
        (mean, variance), (other_mean, other) = outputs(louder), outputs(plain)
        torch.testing.assert_close(mean, other_mean, rtol=1e-9, atol=1e-12)
        assert (variance > other).all()
        assert (variance < full).all()
        torch.testing.assert_close(variance, other * (full / other).pow(0.6), rtol=1e-9, atol=0)

    def test_an_output_of_which_nothing_is_left_is_not_blown_up(self) -> None:
        model = trained_like(_batch_norm_bottleneck()[0])
        model[2].weight.data = torch.randn_like(model[2].weight)
        with torch.no_grad():
            model[4].weight[1] = 0
            model[4].weight[1, 3] = 1e-6
            model[4].weight[2] = 0
        graph = width_graph(model, images())
        noise = moments_from_noise(graph)
        folded = fold(graph, maps_for(graph, {"2": np.array([0])}), noise)
        ratio = folded["5.running_var"] / model[5].running_var
        assert float(ratio.min()) >= 0.05
        assert float(ratio[2]) == 1.0

    def test_nothing_changes_where_nothing_is_dropped_or_known(self) -> None:
        graph, x = build("conv")
        grown = np.concatenate([np.arange(6), [NEW, NEW]])
        folded = fold(graph, maps_for(graph, {"0": grown}), evidence(graph, x))
        assert all(torch.equal(tensor, graph.analysis.parameters[name].tensor) for name, tensor in folded.items())
        assert fold(graph, maps_for(graph, {"0": kept_without(6, 1)}), None) == {}

    def test_parameters_are_not_touched(self) -> None:
        graph, x = build("conv")
        before = {name: entry.tensor.clone() for name, entry in graph.analysis.parameters.items()}
        fold(graph, maps_for(graph, {"0": kept_without(6, 1)}), evidence(graph, x))
        assert all(torch.equal(entry.tensor, before[name]) for name, entry in graph.analysis.parameters.items())

    def test_a_table_that_also_writes_is_left_alone(self) -> None:
        graph, x = build("tied")
        stream = next(group for group in graph.free if group.width == 6)
        folded = fold(graph, maps_for(graph, {stream.name: kept_without(6, 2)}), evidence(graph, x))
        assert set(folded) == {"body.weight", "body.bias"}

    def test_a_shared_layer_is_folded_for_all_that_passes_through_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fxwidth.regression.effective_rows", lambda moment: 1e15)
        monkeypatch.setattr("fxwidth.folding._MATCHING", 0.0)
        graph, x = build("shared")
        original = trained_like(NETS["shared"][0]())
        rows = torch.cat(inputs_of(original, x)["shared"])
        weight, constant = by_least_squares(original.shared, rows, kept_without(6, 0, 3), None)
        group = next(group for group in graph.free if group.width == 6)
        folded = fold(graph, maps_for(graph, {group.name: kept_without(6, 0, 3)}), evidence(graph, x))
        torch.testing.assert_close(folded["shared.weight"], weight, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(folded["shared.bias"], original.shared.bias + constant, rtol=1e-7, atol=1e-9)

    def test_parts_of_a_packed_weight_are_folded_by_what_each_reads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fxwidth.regression.effective_rows", lambda moment: 1e15)
        monkeypatch.setattr("fxwidth.folding._MATCHING", 0.0)
        graph, x = build("packed attention")
        original = trained_like(NETS["packed attention"][0]())
        with torch.no_grad():
            y, z = original.embed(x).flatten(0, 1), original.other(x).relu().flatten(0, 1)
        axis = graph.analysis.parameters["attention.in_proj_weight"].axes[1]
        factor = graph.analysis.space.factors(axis)[-1]
        maps = IndexMaps(graph.analysis.space, {factor: kept_without(factor.size, 1)})
        positions = maps.indices(axis)
        folded = fold(graph, maps, evidence(graph, x))
        expected = [
            by_least_squares(_linear(original.attention, part), rows, positions, None)
            for part, rows in ((slice(0, 8), y), (slice(8, 24), z))
        ]
        weight = torch.cat([weight for weight, _ in expected])
        bias = original.attention.in_proj_bias + torch.cat([constant for _, constant in expected])
        torch.testing.assert_close(folded["attention.in_proj_weight"], weight, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(folded["attention.in_proj_bias"], bias, rtol=1e-7, atol=1e-9)


def _linear(attention: nn.MultiheadAttention, part: slice) -> nn.Linear:
    layer = nn.Linear(8, part.stop - part.start).double()
    layer.weight.data = attention.in_proj_weight[part].detach()
    layer.bias.data = attention.in_proj_bias[part].detach()
    return layer


@torch.no_grad()
def by_least_squares(layer: nn.Module, rows: Tensor, kept: Indices, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """Return the weight of a layer that sees only the kept channels, and what is added to its outputs."""
    is_centred = layer.bias is not None or isinstance(norm, nn.BatchNorm2d)
    is_transposed = isinstance(layer, nn.ConvTranspose2d)
    channels = rows.shape[1]
    # All weights as [outputs, channels, positions].
    flat = layer.weight.detach().clone()
    flat = flat.flatten(2) if flat.dim() == 4 else flat.unflatten(1, (channels, -1))
    flat = flat if flat.dim() == 3 else flat[..., None]
    flat = flat.transpose(0, 1) if is_transposed else flat
    groups = getattr(layer, "groups", 1)
    size = channels // groups
    constant = torch.zeros(len(flat) * (groups if is_transposed else 1), dtype=rows.dtype)
    for group in range(groups):
        own = torch.tensor([c for c in kept if c // size == group])
        lost = torch.tensor([c for c in range(group * size, (group + 1) * size) if c not in kept])
        if not len(own) or not len(lost):
            continue
        design = torch.cat([rows[:, own], rows.new_ones(len(rows), 1)], 1) if is_centred else rows[:, own]
        R = torch.linalg.lstsq(design, rows[:, lost], driver="gelsd").solution
        outputs = len(flat) // (1 if is_transposed else groups)
        to = slice(0, outputs) if is_transposed else slice(group * outputs, (group + 1) * outputs)
        offset = 0 if is_transposed else group * size
        dropped = flat[to, lost - offset]
        flat[to, own - offset] += torch.einsum("odp,kd->okp", dropped, R[: len(own)])
        if is_centred:
            share = layer.stride[0] * layer.stride[1] if is_transposed else 1
            place = slice(group * outputs, (group + 1) * outputs)
            constant[place] = torch.einsum("odp,d->o", dropped, R[-1]) / share
    flat = flat.transpose(0, 1) if is_transposed else flat
    return flat.reshape(layer.weight.shape), constant


def channel_slices(graph: WidthGraph, name: str, roles: tuple[str, ...]) -> list[tuple[Tensor, int, list[Indices]]]:
    """Return each tensor and dim in which a group has one of some roles, with the positions of its channels."""
    group = graph[name]
    result = []
    for site in group.sites:
        if site.role in roles:
            entry = graph.analysis.parameters[site.parameter]
            positions = channel_positions(graph.analysis.space, entry.axes[site.dim], group.factor)
            result.append((entry.tensor, site.dim, positions))
    return result


@torch.no_grad()
def copy_channel(graph: WidthGraph, name: str, source: int, target: int) -> None:
    """Make one channel of a group the copy of another in all that makes it."""
    for tensor, dim, occurrences in channel_slices(graph, name, ("writer", "per-channel")):
        for positions in occurrences:
            moved = tensor.movedim(dim, 0)
            moved[positions[target]] = moved[positions[source]].clone()


@torch.no_grad()
def silence_channel(graph: WidthGraph, name: str, channel: int, role: str) -> None:
    """Make a channel of a group zero, or unread."""
    for tensor, dim, occurrences in channel_slices(graph, name, (role,)):
        for positions in occurrences:
            tensor.movedim(dim, 0)[positions[channel]] = 0


def plain_groups(name: str) -> list[str]:
    """Return the groups of a network that nothing mixes, wide enough to lose a channel."""
    graph, _ = build(name)
    return [group.name for group in graph.free if group.mixed is None and group.width > 2]


CASES = [(name, group) for name in ("conv", "grouped", "tile", "in place", "shared") for group in plain_groups(name)]


class TestExactRank:
    """Channels that hold nothing new are found and leave no trace."""

    @pytest.mark.parametrize(("name", "group"), CASES)
    def test_duplicates(self, name: str, group: str) -> None:
        graph, x = build(name)
        if not readers_of(graph, group):
            pytest.skip("nothing reads the group")
        copy_channel(graph, group, 0, 2)
        assert_shrinks_exactly(graph, x, {group: graph[group].width - 1}, 1e-9)

    @pytest.mark.parametrize(("name", "group"), CASES)
    def test_unread_channels(self, name: str, group: str) -> None:
        graph, x = build(name)
        if not readers_of(graph, group):
            pytest.skip("nothing reads the group")
        silence_channel(graph, group, 1, "reader")
        assert_shrinks_exactly(graph, x, {group: graph[group].width - 1}, 1e-12)

    @pytest.mark.parametrize("make", ["linear", "batch norm", "convolution", "value-output"])
    def test_linear_combinations(self, make: str) -> None:
        torch.manual_seed(0)
        model, x, group = RANK_DEFICIENT[make]()
        graph = width_graph(model, x)
        moments = evidence(graph, x)
        rank = 4
        kept = select(graph, graph[group], rank, moments)
        maps = maps_for(graph, {group: kept})
        with torch.no_grad():
            expected = model(x)
        assert relative(outputs_after(graph, maps, fold(graph, maps, moments), x), expected) < 1e-9
        fewer = maps_for(graph, {group: select(graph, graph[group], rank - 1, moments)})
        assert relative(outputs_after(graph, fewer, fold(graph, fewer, moments), x), expected) > 1e-4

    def test_noise_is_evidence_enough_for_duplicates(self) -> None:
        graph, x = build("conv")
        widths = {"0": 6, "2": 8, "5": 5}
        for name, width in widths.items():
            copy_channel(graph, name, 0, width - 1)
        moments = moments_from_noise(graph)
        maps = maps_for(graph, {name: select(graph, graph[name], width - 1, moments) for name, width in widths.items()})
        with torch.no_grad():
            expected = graph.analysis.module(x)
        assert relative(outputs_after(graph, maps, fold(graph, maps, moments), x), expected) < 1e-9


def readers_of(graph: WidthGraph, name: str) -> list[object]:
    return [site for site in graph[name].sites if site.role == "reader"]


def assert_shrinks_exactly(graph: WidthGraph, x: Tensor, widths: dict[str, int], tolerance: float) -> None:
    """Check that what selection drops, and the fold makes up for, leaves the function as it was."""
    with torch.no_grad():
        expected = graph.analysis.module(x)
    moments = evidence(graph, x)
    kept = {name: select(graph, graph[name], width, moments) for name, width in widths.items()}
    maps = maps_for(graph, kept)
    assert relative(outputs_after(graph, maps, fold(graph, maps, moments), x), expected) < tolerance


def _low_rank(rows: int, columns: int, rank: int = 4) -> Tensor:
    return torch.randn(rows, rank).double() @ torch.randn(rank, columns).double()


def _linear_bottleneck() -> tuple[nn.Module, Tensor, str]:
    model = trained_like(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)))
    model[0].weight.data = _low_rank(8, 16)
    return model, tokens()[:, 0], "0"


def _batch_norm_bottleneck() -> tuple[nn.Module, Tensor, str]:
    model = trained_like(
        nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1, bias=False),
            nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
        )
    )  # fmt: skip
    model[2].weight.data = _low_rank(8, 6)[:, :, None, None]
    return model, images(), "2"


def _convolution_bottleneck() -> tuple[nn.Module, Tensor, str]:
    model = trained_like(nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.Conv2d(8, 5, 3, padding=1), nn.Flatten(2)))
    model[0].weight.data = _low_rank(8, 9).view(8, 1, 3, 3)
    return model, images(), "0"


def _value_output() -> tuple[nn.Module, Tensor, str]:
    model = trained_like(Attention(heads=1))
    model.v.weight.data = _low_rank(8, 12)
    return model, tokens(), "v"


RANK_DEFICIENT: dict[str, Callable[[], tuple[nn.Module, Tensor, str]]] = {
    "linear": _linear_bottleneck,
    "batch norm": _batch_norm_bottleneck,
    "convolution": _convolution_bottleneck,
    "value-output": _value_output,
}


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
        pairs = pairs_of(graph, group, moments)
        assert pairs is not None
        assert len(pairs.seen) == 1

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
        monkeypatch.setattr("fxwidth.pairs._ENTRIES", 1)
        with torch.no_grad():
            silence_channel(graph, group.name, 1, "reader")
        assert 1 not in select(graph, group, group.width - 1, evidence(graph, x)).tolist()
        assert len(select(graph, group, 1, moments)) == 1


class TestVarianceRatio:
    """What a norm sees after a resize."""

    @staticmethod
    def _norm(graph: WidthGraph) -> tuple[object, str]:
        (call,) = [call for call in graph.analysis.calls if any(m.kind == "layer norm" for m in call.mixings)]
        (group,) = [group for group in graph.free if group.width == 12]
        return call, group.name

    def test_growth_is_the_ratio_of_sizes(self) -> None:
        graph, x = build("attention")
        call, group = self._norm(graph)
        maps = maps_for(graph, {group: np.concatenate([np.arange(12), [NEW] * 5])})
        for moments in (None, evidence(graph, x)):
            assert variance_ratio(graph, maps, moments, call) == pytest.approx(12 / 17, rel=1e-15)

    def test_dropping_channels_at_the_mean_undoes_growth(self) -> None:
        graph, x = build("attention")
        call, group = self._norm(graph)
        # Two channels at the mean of the others, as growth leaves them.
        with torch.no_grad():
            for tensor, dim, _ in channel_slices(graph, group, ("writer",)):
                moved = tensor.movedim(dim, 0)
                moved[[3, 7]] = moved[[0, 1, 2, 4, 5, 6, 8, 9, 10, 11]].mean(0)
        moments = evidence(graph, x)
        maps = maps_for(graph, {group: kept_without(12, 3, 7)})
        assert variance_ratio(graph, maps, moments, call) == pytest.approx(12 / 10, rel=1e-14)

    def test_against_the_samples(self) -> None:
        graph, x = build("attention")
        call, group = self._norm(graph)
        (given,) = inputs_of(trained_like(Attention()), x)["norm"]
        deviations = (given - given.mean(-1, keepdim=True)).square().mean((0, 1))
        maps = maps_for(graph, {group: kept_without(12, 0, 5, 6)})
        expected = deviations[kept_without(12, 0, 5, 6)].mean() / deviations.mean()
        found = variance_ratio(graph, maps, evidence(graph, x), call)
        assert found == pytest.approx(float(expected), rel=1e-12)

    def test_other_norms_stay(self) -> None:
        graph, x = build("attention")
        call, _ = self._norm(graph)
        assert variance_ratio(graph, maps_for(graph, {"v#1": kept_without(4, 0)}), evidence(graph, x), call) == 1.0


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
