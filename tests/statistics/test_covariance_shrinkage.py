"""Few data shrunk toward noise, and the noise itself."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth.importance.estimates import gather_evidence
from fxwidth.statistics.covariance_shrinkage import shrunk
from fxwidth.statistics.gathered_batches import Gathered
from fxwidth.statistics.moment import Moment
from fxwidth.statistics.moments import Moments, moments_from_data, moments_from_noise
from fxwidth.statistics.observation_points import find_probes
from fxwidth.statistics.synthetic_inputs import noise_draws
from tests.zoo.nets import build, images, tokens, trained_like, width_graph


def mlp() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(16, 40), nn.BatchNorm1d(40), nn.ReLU()]
    return trained_like(nn.Sequential(*layers, nn.Linear(40, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 4)))


def both(count: int) -> tuple[Moments, Moments, Moments]:
    x = tokens(count)[:, 0]
    graph = width_graph(mlp(), x[:4])
    measured, free = moments_from_data(graph, [x]), moments_from_noise(graph)
    assert measured is not None
    assert free is not None
    # What is shrunk is used up.
    return measured, free, shrunk(copy.deepcopy(measured), lambda: free)


def test_covariances_are_weighted_by_rows_and_channels() -> None:
    measured, free, result = both(24)
    assert result.source == "data and noise"
    checked = 0
    for key, moment in result.contracted.items():
        S, T = measured.contracted[key].covariance, free.contracted[key].covariance
        weight = 24 / (24 + len(S))
        expected = weight * S + (1 - weight) * T * float(S.trace() / T.trace())
        torch.testing.assert_close(moment.covariance, expected, rtol=1e-10, atol=1e-12)
        assert torch.equal(moment.mean, measured.contracted[key].mean)
        checked += 1
    assert checked >= 2


def test_what_noise_shows_is_missed_no_more() -> None:
    measured, free, _ = both(24)
    measured = replace(measured, missed={"a": "other ops", "b": "other ops"})
    free = replace(free, missed={"b": "not finite"})
    assert shrunk(measured, lambda: free).missed == {"b": "other ops"}


def test_plenty_of_data_stand_alone() -> None:
    measured, _, _ = both(8)
    rich = {k: Moment(m.mean, m.covariance, 10**6, 10**6, m.precision) for k, m in measured.contracted.items()}
    moments = Moments("data", 10**6, rich, {}, {})

    def never() -> Moments:
        raise AssertionError("noise is not needed")

    assert shrunk(moments, never) is moments


def test_dependencies_that_the_data_show_are_kept() -> None:
    x = tokens(600)[:, 0]
    graph = width_graph(mlp(), x[:4])
    measured, free = moments_from_data(graph, [x]), moments_from_noise(graph)
    assert measured is not None
    assert free is not None
    (key, moment), *_ = [item for item in measured.contracted.items() if len(item[1].mean) == 40]
    mixing = torch.eye(40, dtype=torch.float64)
    mixing[7] = 2 * mixing[1] - mixing[3]
    dependent = Moment(mixing @ moment.mean, mixing @ moment.covariance @ mixing.T, 600, 600, moment.precision)
    before = dependent.covariance.clone()
    result = shrunk(Moments("data", 600, {key: dependent}, {}, {}), lambda: free).contracted[key].covariance
    null = torch.zeros(40, dtype=torch.float64)
    null[[1, 3, 7]] = torch.tensor([2.0, -1, -1]).double()
    assert float((result @ null).abs().max()) < 1e-9 * float(result.diagonal().max())
    assert not torch.allclose(result, before, rtol=1e-3)


def test_few_data_and_noise_tell_more_than_either() -> None:
    """The error of a resize on other inputs, against those with plenty of data."""
    few, many = tokens(12, seed=3)[:, 0], tokens(4000, seed=4)[:, 0]
    errors = {}
    for name, data in (("few", [few]), ("noise", None), ("alone", [few])):
        gm = fxwidth.trace(mlp(), few[:4])
        with torch.no_grad():
            expected = gm(many)
        with pytest.MonkeyPatch.context() as patch:
            if name == "alone":
                patch.setattr("fxwidth.importance.estimates.shrunk", lambda measured, *_: measured)
            fxwidth.resize(gm, {"0": 20, "3": 15}, data=data, recalibrate=False)
        with torch.no_grad():
            errors[name] = float((gm(many) - expected).square().mean() / expected.var())
    assert errors["few"] < errors["alone"]


class TestNoise:
    """Noise is like what networks are given."""

    @staticmethod
    def _batches(x: Tensor, model: nn.Module, work: float = 1e8) -> list[Tensor]:
        graph = width_graph(model, x)
        return [draw.batch()[0] for draw in noise_draws(graph.analysis, find_probes(graph), 0, work)]

    def _noise(self, x: Tensor, model: nn.Module) -> Tensor:
        return torch.cat(self._batches(x, model))

    @staticmethod
    def _neighbours(noise: Tensor) -> float:
        return float((noise[..., 1:] * noise[..., :-1]).mean())

    def test_images_are_smooth(self) -> None:
        noise = self._noise(
            images(4, size=16), nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1)).double()
        )
        assert float(noise.var()) == pytest.approx(1, rel=0.1)
        assert 0.5 < self._neighbours(noise) < 0.98
        power = torch.fft.rfft2(noise).abs().square().mean((0, 1))
        assert float(power[0, 1] / power[0, 4]) == pytest.approx(16, rel=0.3)

    @pytest.mark.parametrize("work", [1.0, 1e9])
    def test_images_whose_places_have_weights_are_smooth_and_white_in_turn(self, work: float) -> None:
        model = nn.Sequential(nn.Hardtanh(), nn.Flatten(), nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 3)).double()
        batches = self._batches(images(4, size=16), model, work)
        assert len(batches) % 2 == 0
        for smooth, white in zip(batches[::2], batches[1::2], strict=True):
            assert len(smooth) == len(white) >= 16
            assert self._neighbours(smooth) > 0.5
            assert abs(self._neighbours(white)) < 0.1

    @pytest.mark.parametrize("channels", [1, 256])
    def test_what_a_convolution_has_seen_has_no_places(self, channels: int) -> None:
        layers = [nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 256, 3)]
        x = images(4, size=16).expand(4, channels, 16, 16)
        batches = self._batches(x, nn.Sequential(*layers).double())
        assert all(self._neighbours(noise) > 0.5 for noise in batches)

    def test_everything_else_is_white(self) -> None:
        noise = self._noise(tokens(4)[:, 0], mlp())
        correlation = torch.corrcoef(noise.T) - torch.eye(16)
        assert float(correlation.abs().max()) < 0.4

    def test_a_program_for_one_batch_size_is_given_that(self) -> None:
        model = trained_like(nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)))
        x = tokens(6)[:, 0]
        gm = fxwidth.trace(torch.export.export(model, (x,)).module(), x)
        (group,) = fxwidth.analyze(gm).free
        fxwidth.resize(gm, {group.name: 6})
        assert gm(x).shape == (6, 3)


class TestGathered:
    """What an Evolver keeps of training."""

    @pytest.mark.slow
    def test_every_batch_has_the_same_chance(self) -> None:
        counts = torch.zeros(40)
        for seed in range(200):
            gathered = Gathered(8)
            gathered._random.seed(seed)
            for number in range(40):
                gathered.add((torch.full((2, 1), float(number)),))
            assert len(gathered.batches) == 4
            for (batch,) in gathered:
                counts[int(batch[0, 0])] += 1
        assert float(counts.min()) > 5
        assert float(counts.max()) < 40

    def test_its_evidence_is_called_training(self) -> None:
        graph, x = build("conv")
        gathered = Gathered()
        gathered.add((x,))
        evidence = gather_evidence(graph, gathered)
        assert evidence.moments is not None
        assert evidence.moments.source.startswith("training")
