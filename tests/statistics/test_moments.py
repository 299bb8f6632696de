"""Moments against explicit hooks: the same numbers, whatever the layer, the batching and the memory layout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxwidth.errors import FxwidthError
from fxwidth.statistics.moment import Moment
from fxwidth.statistics.moments import Moments, moments_from_data, moments_from_noise
from fxwidth.statistics.observation_points import Measure, Probe
from fxwidth.weights.readers import wiring_of
from tests.zoo.nets import (
    NETS,
    Attention,
    InPlace,
    build,
    conv,
    images,
    inputs_of,
    rows_of,
    tokens,
    trained_like,
    width_graph,
)


def expected(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows.mean(0), torch.cov(rows.T, correction=0)


def by_parameter(graph: Any, moments: Moments) -> dict[str, list[Moment]]:
    result: dict[str, list[Moment]] = {}
    for reader in wiring_of(graph).readers:
        if (moment := moments.of(reader)) is not None and reader.view is not None:
            result.setdefault(reader.view.parameter, []).append(moment)
    return result


@pytest.mark.parametrize("name", ["conv", "grouped", "tile", "in place", "attention", "shared"])
@pytest.mark.parametrize("sizes", [(64,), (22, 22, 20), (1, 40, 23)])
def test_moments_are_those_of_the_layers_inputs(name: str, sizes: tuple[int, ...]) -> None:
    graph, x = build(name)
    moments = moments_from_data(graph, x.split(sizes))
    assert moments is not None
    assert not moments.missed
    assert moments.samples == len(x)
    original = trained_like(NETS[name][0]())
    seen = inputs_of(original, x)
    found = by_parameter(graph, moments)
    assert len(found) >= 2
    for parameter, known in found.items():
        path = parameter.removesuffix(".weight")
        layer = original.get_submodule(path)
        assert len(known) == len(seen[path])
        # All calls of one layer read the same weight, and are measured together.
        for moment in known:
            rows = torch.cat([rows_of(layer, given, len(moment.mean)) for given in seen[path]])
            mean, covariance = expected(rows)
            assert moment.rows == len(rows)
            assert moment.samples == len(x)
            torch.testing.assert_close(moment.mean, mean, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(moment.covariance, covariance, rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(moment.second, rows.T @ rows / len(rows), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", NETS)
def test_how_the_data_are_cut_does_not_matter(name: str) -> None:
    graph, x = build(name)
    one, other = moments_from_data(graph, [x]), moments_from_data(graph, x.split((1, 40, 23)))
    assert one is not None
    assert other is not None
    assert one.samples == other.samples
    for field in ("contracted", "squares", "deviations", "products"):
        known, again = getattr(one, field), getattr(other, field)
        assert known.keys() == again.keys()
        for key, value in known.items():
            pairs = [(value, again[key])]
            if isinstance(value, Moment):
                pairs = [(value.mean, again[key].mean), (value.covariance, again[key].covariance)]
                assert (value.rows, value.samples) == (again[key].rows, again[key].samples)
            for mine, others in pairs:
                torch.testing.assert_close(mine, others, rtol=1e-10, atol=1e-12)


def test_flattened_positions_count_as_samples() -> None:
    graph, x = build("conv")
    moments = moments_from_data(graph, [x])
    assert moments is not None
    (moment,) = by_parameter(graph, moments)["8.weight"]
    assert moment.mean.shape == (5,)
    assert moment.rows == 4 * len(x)


def test_what_is_read_several_times_is_measured_once() -> None:
    graph, x = build("attention")
    moments = moments_from_data(graph, [x])
    assert moments is not None
    found = by_parameter(graph, moments)
    assert found["q.weight"][0] is found["k.weight"][0] is found["v.weight"][0]


def test_what_is_overwritten_in_place_is_measured_twice() -> None:
    graph, x = build("in place")
    moments = moments_from_data(graph, [x])
    assert moments is not None
    found = by_parameter(graph, moments)
    assert float(found["after.weight"][0].mean.min()) >= 0 > float(found["before.weight"][0].mean.min())


def test_norm_deviations_and_products_of_activations() -> None:
    graph, x = build("attention")
    moments = moments_from_data(graph, x.chunk(2))
    assert moments is not None
    original = trained_like(Attention())
    seen = inputs_of(original, x)
    (given,) = seen["norm"]
    (deviations,) = moments.deviations.values()
    squares = (given - given.mean(-1, keepdim=True)).square().mean((0, 1))
    torch.testing.assert_close(deviations, squares, rtol=1e-12, atol=0)
    with torch.no_grad():
        q, k = (part(seen["q"][0]).unflatten(-1, (2, 4)).square().mean((0, 1, 2)) for part in (original.q, original.k))
    left, right = moments.squares.values()
    torch.testing.assert_close(left, q, rtol=1e-12, atol=0)
    torch.testing.assert_close(right, k, rtol=1e-12, atol=0)


def test_float32_sums_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxwidth.statistics.moments._AT_ONCE", 16)  # several batches to be summed up
    model = trained_like(conv())
    x = images()
    wide = moments_from_data(width_graph(model, x), [x])
    narrow = moments_from_data(width_graph(model.float(), x.float()), [x.float()])
    assert wide is not None
    assert narrow is not None
    for one, other in zip(wide.contracted.values(), narrow.contracted.values(), strict=True):
        assert other.covariance.dtype == torch.float64
        torch.testing.assert_close(one.covariance, other.covariance, rtol=1e-5, atol=1e-6)


def test_rows_are_capped_evenly() -> None:
    graph, _ = build("conv")
    reader = wiring_of(graph).readers[1]
    probe = Probe(reader.call, "input", Measure.MOMENT, (1,), 1, False, (reader.key,))
    tensor = torch.arange(20 * 6 * 10 * 10.0).view(20, 6, 10, 10)
    rows = probe.rows(tensor, 100)
    assert torch.equal(rows, probe.rows(tensor, 100))
    places = rows[:, 0] // 600 * 100 + rows[:, 0] % 100
    # One row in each stretch of 20, and not the same column every time.
    assert torch.equal(places // 20, torch.arange(100.0))
    assert len(set((places % 10).tolist())) == 10


def test_the_model_is_left_as_it_was() -> None:
    graph, x = build("conv")
    module = graph.analysis.module
    module.train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    moments_from_data(graph, [x])
    moments_from_noise(graph, work=1e6)
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


class TestNoise:
    def test_batch_norm_channels_have_their_trained_mean_and_deviation(self) -> None:
        # In groups, so that what the batch norm belongs to is no linear group.
        model = trained_like(
            nn.Sequential(*list(conv())[:4], nn.Conv2d(8, 4, 1, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        )
        moments = moments_from_noise(width_graph(model, images()))
        assert moments is not None
        assert moments.source == "noise"
        moment = list(moments.contracted.values())[-1]
        norm = model[3]
        torch.testing.assert_close(moment.mean, norm.bias.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(moment.covariance.diagonal().sqrt(), norm.weight.detach().abs(), rtol=1e-2, atol=0)
        # The running statistics say nothing of noise: with them the deviations would be others.
        assert moment.rows >= 1024

    def test_eps_stays_in_proportion_to_the_variances_of_training(self) -> None:
        model = trained_like(nn.Sequential(*list(conv())[:4], nn.Conv2d(8, 3, 1), nn.Flatten(2)))
        with torch.no_grad():
            model[3].running_var[:] = 1e-5
        moments = moments_from_noise(width_graph(model, images()))
        assert moments is not None
        left = list(moments.contracted.values())[-1].covariance.diagonal() / model[3].weight.detach().square()
        assert 0.3 < float(left.mean()) < 0.6

    def test_it_is_the_same_every_time_and_other_for_another_seed(self) -> None:
        graph, _ = build("conv")
        first, again, other = (moments_from_noise(graph, seed=seed) for seed in (0, 0, 1))
        assert first is not None
        assert again is not None
        assert other is not None
        for key, moment in first.contracted.items():
            assert torch.equal(moment.covariance, again.contracted[key].covariance)
            assert not torch.equal(moment.covariance, other.contracted[key].covariance)

    def test_integers_stay_below_the_vocabulary(self) -> None:
        graph, _ = build("tied")
        moments = moments_from_noise(graph)
        assert moments is not None
        table = graph.analysis.parameters["table.weight"].tensor.detach()
        (moment,) = by_parameter(graph, moments)["body.weight"]
        torch.testing.assert_close(moment.mean, table.mean(0), rtol=0, atol=0.05)

    @pytest.mark.parametrize("name", list(NETS))
    def test_every_network_has_evidence(self, name: str) -> None:
        graph, _ = build(name)
        moments = moments_from_noise(graph)
        assert moments is not None
        assert moments.contracted
        assert not moments.missed


class TestData:
    """Any form of batch is taken; what cannot be is refused with the remedy."""

    @pytest.mark.parametrize("form", ["tensors", "pairs", "lists", "dicts", "generator", "one tensor", "float32"])
    def test_forms(self, form: str) -> None:
        graph, x = build("conv")
        labels = torch.zeros(16)
        parts = x.chunk(4)
        data: Any = {
            "tensors": parts,
            "pairs": [(part, labels) for part in parts],
            "lists": [[part] for part in parts],
            "dicts": [{"input": part, "labels": labels} for part in parts],
            "generator": (part for part in parts),
            "one tensor": x,
            "float32": [part.float() for part in parts],
        }[form]
        moments, whole = moments_from_data(graph, data), moments_from_data(graph, [x])
        assert moments is not None
        assert whole is not None
        for key, moment in whole.contracted.items():
            tolerance = 1e-6 if form == "float32" else 1e-12
            torch.testing.assert_close(moments.contracted[key].covariance, moment.covariance, rtol=1e-5, atol=tolerance)

    def test_limit(self) -> None:
        graph, x = build("conv")
        taken = []

        def endless() -> Iterator[Tensor]:
            while True:
                taken.append(1)
                yield x

        moments = moments_from_data(graph, endless(), limit=100)
        assert moments is not None
        assert moments.samples == 100
        assert len(taken) == 2

    @pytest.mark.parametrize(
        ("data", "text"),
        [
            ([], "data gave no batches; pass at least one (a generator can be gone through only once)."),
            (3, "data is a int; pass an iterable of batches, such as a DataLoader."),
            ({"input": images()}, "data is a dict; pass an iterable of batches, such as a DataLoader."),
            ([("a", "b")], "batch 0 of data has 0 tensors, the graph takes 1 (input); pass tuples that"),
            (
                [{"x": images()}],
                "batch 0 of data holds ['x'] but no tensor 'input'; pass dicts with the graph",
            ),
            (
                [images()[0]],
                "input 'input' in batch 0 of data has shape (1, 8, 8), the graph was analysed with",
            ),
            (
                [images(), images(size=9)],
                "in batch 1 of data has shape (64, 1, 9, 9), the graph was analysed",
            ),
            (
                [images().long()],
                "in batch 0 of data is torch.int64, the graph was analysed with torch.float64",
            ),
            ([images() * math.nan], "in batch 0 of data holds NaN or infinite values; leave such samples out."),
            (
                [images() * 1e200],
                "are finite for these data, but so large that their squares are beyond the range of their precision",
            ),
        ],
    )
    def test_bad_data(self, data: Any, text: str) -> None:
        graph, _ = build("conv")
        with pytest.raises(FxwidthError) as error:
            moments_from_data(graph, data)
        assert text in str(error.value)

    @pytest.mark.parametrize("collect", [lambda g, x: moments_from_data(g, [x]), lambda g, x: moments_from_noise(g)])
    def test_nan_weights(self, collect: Any) -> None:
        graph, x = build("conv")
        with torch.no_grad():
            graph.analysis.parameters["2.weight"].tensor[0, 0] = math.nan
        with pytest.raises(FxwidthError) as error:
            collect(graph, x)
        assert str(error.value) == "2.weight holds NaN or infinite values; load a checkpoint without them."

    def test_a_failing_batch_names_the_node(self) -> None:
        graph, x = build("tied")
        with pytest.raises(FxwidthError, match=r"batch 0 of data, of shapes \[\(64, 4\)\], fails at node 'table'"):
            moments_from_data(graph, [x + 5])

    def test_no_values_no_moments(self) -> None:
        with torch.device("meta"):
            model = conv()
        graph = width_graph(model.eval(), torch.empty(4, 1, 8, 8, device="meta"))
        assert moments_from_noise(graph) is None
        assert moments_from_data(graph, [images()]) is None


def test_a_node_that_runs_other_ops_is_left_out() -> None:
    class Moody(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu() if len(x) == 4 else x.tanh() * 2

    class Leaf(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, path: str) -> bool:
            return isinstance(m, Moody) or super().is_leaf_module(m, path)

    from fxwidth.analysis.axis_propagation import analyze_axes
    from fxwidth.groups.width_graph import WidthGraph

    model = trained_like(nn.Sequential(nn.Linear(16, 6), Moody(), nn.Linear(6, 3)))
    graph = WidthGraph(analyze_axes(torch.fx.GraphModule(model, Leaf().trace(model)), [tokens()[:4, 0]]))
    moments = moments_from_data(graph, [tokens()[:, 0]])
    assert moments is not None
    assert moments.missed == {"_1": "it ran other ops than when it was analysed"}
    assert len(moments.contracted) == 1


def test_channels_that_never_vary_have_exactly_no_covariance() -> None:
    model = trained_like(InPlace())
    with torch.no_grad():
        model.stem.bias[2] = -100
    graph = width_graph(model, images())
    moments = moments_from_data(graph, images().chunk(2))
    assert moments is not None
    moment = by_parameter(graph, moments)["after.weight"][0]
    assert np.count_nonzero(moment.covariance[2].numpy()) == 0
    assert float(moment.mean[2]) == 0
