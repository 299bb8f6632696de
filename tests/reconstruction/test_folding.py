"""Folding against least squares on explicit samples, and what norms see after it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxwidth.axes.factors import axis_size
from fxwidth.axes.index_maps import NEW, IndexMaps, Indices
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.reconstruction.folding import fold, variance_ratio
from fxwidth.reconstruction.ridge import regression
from fxwidth.statistics.moment import Moment
from fxwidth.statistics.moments import moments_from_noise
from fxwidth.weights.readers import wiring_of
from tests.oracles.channels import (
    channel_slices,
    evidence,
    kept_without,
)
from tests.zoo.nets import (
    NETS,
    Attention,
    batch_norm_bottleneck,
    build,
    images,
    inputs_of,
    maps_for,
    rows_of,
    trained_like,
    width_graph,
)

Folded = dict[str, Tensor]


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

    def test_a_channel_that_does_not_vary_predicts_nothing(self) -> None:
        """What a constant has of a covariance is rounding errors, which agree with others by chance."""
        generator = torch.Generator().manual_seed(0)
        h = torch.randn(400, 4, generator=generator, dtype=torch.float64)
        h[:, 1] = 3.0
        covariance = torch.cov(h.T, correction=0)
        covariance[1] = covariance[:, 1] = 1e-17 * torch.tensor([1.0, 1e-13, -1.0, 1.0])
        moment = Moment(h.mean(0), covariance, 10**12, 10**12, 1e-16)
        R = regression(moment, torch.tensor([0, 1, 2]), torch.tensor([3]), torch.ones(1).double(), centred=True)
        assert R[0, 1] == 0
        solution = torch.linalg.lstsq(h[:, [0, 2]] - h[:, [0, 2]].mean(0), h[:, 3:] - h[:, 3:].mean(0)).solution
        torch.testing.assert_close(R[:, [0, 2]].T, solution, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("rows", [10**15, 400])
    @pytest.mark.parametrize("apart", [1e-2, 1e-4])
    def test_channels_that_depend_on_nearly_equal_ones_are_found_to_rounding(self, apart: float, rows: int) -> None:
        """A ridge shrinks what lies along the difference of two channels; a step of refinement takes that back.

        Of few rows a ridge begins large, and leaves so much unexplained by itself that it would stay so.
        """
        generator = torch.Generator().manual_seed(0)
        h = torch.randn(400, 3, generator=generator, dtype=torch.float64)
        kept = torch.stack([h[:, 0], h[:, 0] + apart * h[:, 1], h[:, 2]], 1)
        h = torch.cat([kept, h[:, 1:2]], 1)
        moment = Moment(h.mean(0), torch.cov(h.T, correction=0), rows, rows, torch.finfo(h.dtype).eps)
        R = regression(moment, torch.arange(3), torch.tensor([3]), torch.ones(1).double(), centred=True)
        missed = (h[:, 3] - h[:, :3] @ R[0]).var(correction=0).sqrt()
        assert float(missed) < 1e-13 / apart**2

    @pytest.mark.parametrize("centred", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("rows", [20, 400])
    def test_noise_beside_nearly_equal_channels_does_not_hide_what_depends_on_them(
        self, rows: int, dtype: torch.dtype, centred: bool
    ) -> None:
        """On rows that were not fitted, at most little more is left than the noise, which nothing can predict."""
        generator = torch.Generator().manual_seed(0)
        h = torch.randn(rows + 4000, 4, generator=generator, dtype=torch.float64)
        kept = torch.stack([h[:, 0], h[:, 0] + 1e-2 * h[:, 1], h[:, 2]], 1)
        h = torch.cat([kept, h[:, 1:2] + 0.1 * h[:, 3:]], 1)
        seen, other = h[:rows].to(dtype).double(), h[rows:]
        precision = torch.finfo(dtype).eps
        moment = Moment(seen.mean(0), torch.cov(seen.T, correction=0), rows, rows, precision)
        R = regression(moment, torch.arange(3), torch.tensor([3]), torch.ones(1).double(), centred=centred)
        missed = (other[:, 3] - seen[:, 3].mean() - (other[:, :3] - seen[:, :3].mean(0)) @ R[0]).var()
        assert 0.009 < float(missed) < 0.015

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
        monkeypatch.setattr("fxwidth.reconstruction.ridge.effective_rows", lambda moment: 1e15)
        monkeypatch.setattr("fxwidth.reconstruction.folding._MATCHING", 0.0)
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
        model = trained_like(batch_norm_bottleneck())
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
        monkeypatch.setattr("fxwidth.reconstruction.folding._MATCHING", 0.0)
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
        model = trained_like(batch_norm_bottleneck())
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
        monkeypatch.setattr("fxwidth.reconstruction.ridge.effective_rows", lambda moment: 1e15)
        monkeypatch.setattr("fxwidth.reconstruction.folding._MATCHING", 0.0)
        graph, x = build("shared")
        original = trained_like(NETS["shared"][0]())
        rows = torch.cat(inputs_of(original, x)["shared"])
        weight, constant = by_least_squares(original.shared, rows, kept_without(6, 0, 3), None)
        group = next(group for group in graph.free if group.width == 6)
        folded = fold(graph, maps_for(graph, {group.name: kept_without(6, 0, 3)}), evidence(graph, x))
        torch.testing.assert_close(folded["shared.weight"], weight, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(folded["shared.bias"], original.shared.bias + constant, rtol=1e-7, atol=1e-9)

    def test_what_is_known_of_each_use_of_a_shared_layer_is_mixed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It may come one by one, as from the weights before it; one run over both measures the mixture itself."""
        monkeypatch.setattr("fxwidth.reconstruction.ridge.effective_rows", lambda moment: 1e15)
        monkeypatch.setattr("fxwidth.reconstruction.folding._MATCHING", 0.0)
        graph, x = build("shared")
        group = next(group for group in graph.free if group.width == 6)
        maps = maps_for(graph, {group.name: kept_without(6, 0, 3)})
        both = evidence(graph, x)
        uses = [
            reader for reader in wiring_of(graph).readers if reader.view and reader.view.parameter == "shared.weight"
        ]
        given = inputs_of(trained_like(NETS["shared"][0]()), x)["shared"]
        assert len(uses) == len(given) == 2
        moments = [
            Moment(rows.mean(0), torch.cov(rows.T, correction=0), len(rows), len(rows), 1e-16)
            for rows in (part.double() for part in given)
        ]
        one_by_one = {reader.key: moment for reader, moment in zip(uses, moments, strict=True)}
        folded = fold(graph, maps, replace(both, contracted={**both.contracted, **one_by_one}))
        expected = fold(graph, maps, both)
        torch.testing.assert_close(folded["shared.weight"], expected["shared.weight"], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(folded["shared.bias"], expected["shared.bias"], rtol=1e-9, atol=1e-10)

    def test_parts_of_a_packed_weight_are_folded_by_what_each_reads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fxwidth.reconstruction.ridge.effective_rows", lambda moment: 1e15)
        monkeypatch.setattr("fxwidth.reconstruction.folding._MATCHING", 0.0)
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


class TestVarianceRatio:
    """What a norm sees after a resize."""

    @staticmethod
    def _norm(graph: WidthGraph) -> tuple[object, str]:
        (call,) = [call for call in graph.analysis.calls if any(m.kind == "layer norm" for m in call.reductions)]
        (group,) = [group for group in graph.free if group.width == 12]
        return call, group.name

    def test_growth_is_the_ratio_of_sizes(self) -> None:
        graph, x = build("attention")
        call, group = self._norm(graph)
        maps = maps_for(graph, {group: np.concatenate([np.arange(12), [NEW] * 5])})
        for moments in (None, evidence(graph, x)):
            assert variance_ratio(graph.analysis.space, maps, moments, call) == pytest.approx(12 / 17, rel=1e-15)

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
        assert variance_ratio(graph.analysis.space, maps, moments, call) == pytest.approx(12 / 10, rel=1e-14)

    def test_against_the_samples(self) -> None:
        graph, x = build("attention")
        call, group = self._norm(graph)
        (given,) = inputs_of(trained_like(Attention()), x)["norm"]
        deviations = (given - given.mean(-1, keepdim=True)).square().mean((0, 1))
        maps = maps_for(graph, {group: kept_without(12, 0, 5, 6)})
        expected = deviations[kept_without(12, 0, 5, 6)].mean() / deviations.mean()
        found = variance_ratio(graph.analysis.space, maps, evidence(graph, x), call)
        assert found == pytest.approx(float(expected), rel=1e-12)

    def test_other_norms_stay(self) -> None:
        graph, x = build("attention")
        call, _ = self._norm(graph)
        maps = maps_for(graph, {"v#1": kept_without(4, 0)})
        assert variance_ratio(graph.analysis.space, maps, evidence(graph, x), call) == 1.0
