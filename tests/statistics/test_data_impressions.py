"""Noise that is moved to where outputs differ: which is, how far, and that nothing else is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth.statistics.data_impressions import impressions
from fxwidth.statistics.moments import moments_from_noise
from fxwidth.statistics.observation_points import find_probes
from fxwidth.statistics.synthetic_inputs import Draw, noise_draws
from tests.zoo.nets import build, images, tokens, trained_like, width_graph

PLENTY = 1e9


def conv() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    return trained_like(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)))


def moved(model: nn.Module, x: Any, work: float = PLENTY) -> tuple[list[Draw], list[list[Any]]]:
    """Return the noise drawn for a graph, and what it was moved to."""
    graph = fxwidth.analyze(fxwidth.trace(model, x))
    draws = list(noise_draws(graph.analysis, find_probes(graph), 0, 1e6))
    return draws, list(impressions(graph.analysis, draws, work, 0))


def is_as_drawn(model: nn.Module, x: Any, work: float = PLENTY) -> bool:
    draws, batches = moved(model, x, work)
    assert draws
    return all(
        torch.equal(drawn, value)
        for draw, batch in zip(draws, batches, strict=True)
        for drawn, value in zip(draw.batch(), batch, strict=True)
    )


def samples_drawn(model: nn.Module, x: Tensor) -> int:
    graph = width_graph(trained_like(model), x)
    return sum(draw.samples for draw in noise_draws(graph.analysis, find_probes(graph), 0, PLENTY))


class TestImages:
    def test_there_are_enough_of_them_however_many_places_each_has(self) -> None:
        dense = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
        assert samples_drawn(dense, images(4, size=16)) == 1024 // 8

    def test_outputs_differ_more(self) -> None:
        model = conv()
        draws, batches = moved(model, images(4, size=12))
        with torch.no_grad():
            before, after = (
                torch.cat([model(batch[0]) for batch in found]) for found in ([d.batch() for d in draws], batches)
            )
        assert bool((after.var(0) > 1.2 * before.var(0)).all())

    def test_they_keep_their_variance_and_spectrum(self) -> None:
        draws, batches = moved(conv(), images(4, size=12))
        before, after = torch.cat([draw.batch()[0] for draw in draws]), torch.cat([batch[0] for batch in batches])
        assert after.dtype == torch.float64
        assert float(after.var()) == pytest.approx(1, rel=0.1)
        spectra = [torch.fft.rfft2(noise).abs().square().mean((0, 1)) for noise in (before, after)]
        # White noise would be moved by the same amount at all frequencies, of which the lowest are far stronger here.
        assert bool((spectra[1] / spectra[0] < 6).all())
        assert bool((spectra[1] / spectra[0] > 1 / 6).all())

    def test_by_less_than_a_deviation(self) -> None:
        draws, batches = moved(conv(), images(4, size=12))
        for draw, batch in zip(draws, batches, strict=True):
            distance = (batch[0] - draw.batch()[0]).square().mean().sqrt()
            assert 0.1 < float(distance) < 1

    def test_in_inference_mode_as_outside(self) -> None:
        outside = moved(conv(), images(4, size=12))[1]
        with torch.inference_mode():
            inside = moved(conv(), images(4, size=12))[1]
        assert all(torch.equal(one[0], other[0]) for one, other in zip(outside, inside, strict=True))
        assert not is_as_drawn(conv(), images(4, size=12))

    def test_of_any_precision(self) -> None:
        draws, batches = moved(conv().bfloat16(), images(4, size=12).bfloat16())
        assert batches[0][0].dtype == torch.bfloat16
        assert not torch.equal(batches[0][0], draws[0].batch()[0])


class TestOthers:
    """What there is no reason or no way to move is noise as it was drawn."""

    def test_there_is_more_of_it_as_far_as_it_can_be_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        mlp = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
        assert samples_drawn(conv(), images(4, size=12)) == 1024
        assert samples_drawn(mlp, tokens(4)[:, 0]) == 16 * 1024
        # Of one sample at a time there would be as many runs.
        assert samples_drawn(mlp, tokens(1)[:, 0]) == 1024
        monkeypatch.setattr("fxwidth.statistics.synthetic_inputs._KEPT", 16 * 2000)
        assert 2000 <= samples_drawn(mlp, tokens(4)[:, 0]) < 2100

    def test_what_is_no_image(self) -> None:
        model = trained_like(nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)))
        assert is_as_drawn(model, tokens(4)[:, 0])

    def test_images_whose_places_have_weights(self) -> None:
        assert is_as_drawn(
            trained_like(nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, 3))), images(4)
        )

    def test_what_would_take_too_long(self) -> None:
        assert is_as_drawn(conv(), images(4, size=12), work=1e3)
        assert not is_as_drawn(conv(), images(4, size=12))

    def test_models_that_look_at_values(self) -> None:
        class Looking(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = conv()

            def forward(self, x: Tensor) -> Tensor:
                return self.body(x) if x.std().item() > 0 else self.body(2 * x)

        model, x = trained_like(Looking()), images(4, size=12)
        assert fxwidth.analyze(fxwidth.trace(model, x)).analysis.record is not None
        assert is_as_drawn(model, x)

    def test_outputs_without_a_gradient(self) -> None:
        class Detached(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = conv()

            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                y = self.body(x)
                return y.detach(), y.argmax(1)

        assert is_as_drawn(trained_like(Detached()), images(4, size=12))

    def test_gradients_that_are_not_finite(self) -> None:
        class Rooted(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = conv()

            def forward(self, x: Tensor) -> Tensor:
                # The slope of the root at zero is infinite.
                return self.body(x) + (0 * x).sqrt().mean((1, 2, 3))[:, None]

        assert is_as_drawn(trained_like(Rooted()), images(4, size=12))

    def test_ops_without_a_gradient(self) -> None:
        graph = width_graph(trained_like(Whole()), images(4, size=12))
        assert moments_from_noise(graph, work=1e6) is not None
        assert is_as_drawn(trained_like(Whole()), images(4, size=12))


@torch.library.custom_op("fxwidth_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return 2 * x


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Whole(nn.Module):
    """A network that ends in an op nobody has given a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.body = conv()

    def forward(self, x: Tensor) -> Tensor:
        return doubled(self.body(x))


def test_every_output_counts_however_loud() -> None:
    class Two(nn.Module):
        def __init__(self, loudness: float) -> None:
            super().__init__()
            self.first, self.second = conv(), conv()
            self.loudness = loudness

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {
                "first": self.first(x),
                "second": self.loudness * self.second(x),
                "all": x.sum(),
                "place": x.argmax(),
            }

    x = images(4, size=12)
    (even,), (loud,), (first,) = (
        moved(model, x)[1][0] for model in (trained_like(Two(1)), trained_like(Two(1000)), trained_like(Two(0)))
    )
    torch.testing.assert_close(even, loud)
    assert not torch.allclose(even, first, atol=0.1)


def test_the_model_is_left_as_it_was() -> None:
    graph, _ = build("conv")
    module = graph.analysis.module.train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    assert moments_from_noise(graph) is not None
    assert module.training
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
    for name, parameter in module.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == flags[name]
