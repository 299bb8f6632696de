"""Networks to train and the training loop."""

from __future__ import annotations

import math
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fxwidth
from fxwidth import FxwidthError
from fxwidth.checkpoint.saving import save_tensors
from fxwidth.evolution.evolver import parameter_count
from fxwidth.training.curves import save_curves
from fxwidth.training.datasets import load_dataset
from fxwidth.training.images import ImageData
from fxwidth.training.interrupts import StopRequest
from fxwidth.training.loop import all_widths, evaluate, fit, one_cycle
from fxwidth.training.networks import build_network, input_channels, seed_resnet
from fxwidth.training.run_checkpoint import Job, read_checkpoint, read_graph, write_checkpoint
from fxwidth.training.runs import TrainingConfig, TrainingObserver, TrainingResult
from tests.oracles import files
from tests.zoo.small_network import small_network


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_dataset("digits").subsample(96)


def traced_network(data: ImageData) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    return fxwidth.trace(small_network(), data.normalize(data.test.images[:2]))


# Networks


def test_seed_resnet_has_the_published_size() -> None:
    assert parameter_count(seed_resnet()) == 1_971_308


@pytest.mark.parametrize(
    ("channels", "classes", "size"), [(1, 10, 28), (1, 10, 8), (3, 10, 32), (3, 7, 64), (30, 2, 5), (2, 3, 4)]
)
def test_seed_resnet_takes_other_images(channels: int, classes: int, size: int) -> None:
    network = seed_resnet(channels, classes, size)
    assert network(torch.randn(2, channels, size, size)).shape == (2, classes)


def test_seed_resnet_shortcut_tiles_and_cuts() -> None:
    block = seed_resnet(in_channels=7)[0]
    for parameter in block.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.randn(2, 7, 4, 4)
    expected = torch.stack([x[:, i % 7] for i in range(24)], dim=1)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=0)


def test_seed_resnet_refuses_tiny_images() -> None:
    with pytest.raises(FxwidthError, match="an image size of 3 is too small, it must be 4 or more"):
        seed_resnet(image_size=3)


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "googlenet"])
def test_build_network_by_name(name: str) -> None:
    network = build_network(name, in_channels=3, num_classes=4, image_size=64)
    assert network(torch.randn(2, 3, 64, 64)).shape == (2, 4)


def test_build_network_passes_the_image_size_on() -> None:
    network = build_network("vit_b_16", in_channels=3, num_classes=4, image_size=32)
    assert network(torch.randn(1, 3, 32, 32)).shape == (1, 4)
    with pytest.raises(FxwidthError, match=r"cannot build 'vit_b_16' for 30x30 images .*try another image size"):
        build_network("vit_b_16", in_channels=3, num_classes=4, image_size=30)


def test_build_network_names_the_choices() -> None:
    with pytest.raises(FxwidthError, match=r"no model 'resnet19': choose 'seed-resnet' or one of .*resnet18"):
        build_network("resnet19", in_channels=3, num_classes=4, image_size=64)


def test_input_channels() -> None:
    assert [input_channels("seed-resnet", 1), input_channels("resnet18", 1)] == [1, 3]


# Training


def test_one_cycle_rises_and_falls() -> None:
    factors = [one_cycle(i / 1000) for i in range(1001)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == pytest.approx(1.0)
    assert 50 < factors.index(max(factors)) < 200
    assert factors[-1] == pytest.approx(0.0, abs=1e-12)
    assert one_cycle(1.5) == pytest.approx(0.0, abs=1e-12)


class Recorder(TrainingObserver):
    """Keeps what it is told, and asks for a stop at a step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.steps: list[int] = []
        self.params: list[int] = []
        self.reasons: list[str] = []

    def on_step(self, step: int, progress: float) -> None:
        self.steps.append(step)
        if step == self.stop_at:
            signal.raise_signal(signal.SIGINT)

    def on_resize(self, step: int, widths: object, params: int, reason: str) -> None:
        self.params.append(params)
        self.reasons.append(reason)


EVOLVING = TrainingConfig(epochs=3, batch_size=32, target_params=0.3, rounds=3, evolve_every=1)


def test_fit_evolves_to_the_target(digits: ImageData, tmp_path: Path) -> None:
    gm = traced_network(digits)
    recorder = Recorder()
    result = fit(gm, digits, EVOLVING, recorder)
    assert recorder.steps == list(range(1, 10))
    assert recorder.params == sorted(recorder.params, reverse=True)
    target = math.floor(0.3 * result.params_before)
    assert recorder.reasons == [f"resize {i} of 3 on the way to {target:,}" for i in (1, 2, 3)]
    assert (result.target, result.missed) == (target, False)
    assert result.params_after == recorder.params[-1] == parameter_count(gm) <= 0.3 * result.params_before
    assert result.test_accuracy == result.epochs[-1].test_accuracy == pytest.approx(evaluate(gm, digits)[1])
    assert len(result.losses) == result.steps == 9
    assert result.widths_after == all_widths(gm)
    assert not result.interrupted
    save_curves(result, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG"


def test_fit_breathes_at_its_target(digits: ImageData) -> None:
    gm, recorder = traced_network(digits), Recorder()
    result = fit(gm, digits, replace(EVOLVING, epochs=8, breathe=True), recorder)
    phases = [resize["phase"] for resize in result.resizes]
    assert phases[:5] == ["approach", "approach", "approach", "grow", "fold"]
    assert phases[-1] == "fold"
    assert result.resizes[-1]["step"] <= 18
    assert not result.missed
    assert "grows at its target" in recorder.reasons[3]
    assert "folds back" in recorder.reasons[4]


def test_fit_goes_by_thresholds(digits: ImageData) -> None:
    gm, recorder = traced_network(digits), Recorder()
    config = replace(EVOLVING, epochs=8, evolve_every=None, target_params=None, thresholds=True)
    result = fit(gm, digits, config, recorder)
    assert {resize["phase"] for resize in result.resizes} == {"thresholds"}
    assert [resize["step"] for resize in result.resizes] == [3 * i for i in range(1, len(result.resizes) + 1)]
    assert result.resizes[-1]["step"] <= 18
    assert set(recorder.reasons) == {"follows the singular values of each layer"}
    assert all(record["selection"] == "projection" for record in fxwidth.report(gm).resizes)
    assert (result.target, result.missed) == (None, False)


@pytest.mark.parametrize(("other", "named"), [({"target_params": 0.5}, "a target"), ({"breathe": True}, "--breathe")])
def test_thresholds_are_refused_beside_a_target(other: dict[str, object], named: str) -> None:
    with pytest.raises(FxwidthError, match=f"not with {named}"):
        TrainingConfig(thresholds=True, **other)


def test_fit_learns(digits: ImageData) -> None:
    gm = traced_network(digits)
    first = evaluate(gm, digits)
    config = replace(EVOLVING, epochs=15, learning_rate=3e-3)
    result = fit(gm, digits, config)
    assert first is not None
    assert result.test_accuracy > max(0.5, first[1])


def test_fit_is_reproducible(digits: ImageData) -> None:
    results = [fit(traced_network(digits), digits, EVOLVING) for _ in range(2)]
    assert results[0].losses == results[1].losses
    assert results[0].widths_after == results[1].widths_after


def test_fit_without_a_target_keeps_the_widths(digits: ImageData) -> None:
    result = fit(traced_network(digits), digits, replace(EVOLVING, target_params=None, epochs=1))
    assert result.params_after == result.params_before
    assert result.resizes == ()
    assert (result.target, result.missed) == (None, False)


def test_fit_ends_by_time(digits: ImageData) -> None:
    result = fit(traced_network(digits), digits, replace(EVOLVING, epochs=10_000, max_minutes=0.02))
    assert result.seconds < 10
    assert result.test_accuracy is not None
    assert not result.interrupted


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_training_follows_the_eager_one(backend: str, digits: ImageData) -> None:
    eager = fit(traced_network(digits), digits, EVOLVING)
    compiled = fit(traced_network(digits), digits, replace(EVOLVING, compile_backend=backend))
    assert compiled.widths_after == eager.widths_after
    np.testing.assert_allclose(compiled.losses, eager.losses, rtol=1e-3)


def test_interrupted_training_keeps_a_usable_network(digits: ImageData) -> None:
    gm = traced_network(digits)
    handler = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        result = fit(gm, digits, EVOLVING, Recorder(stop_at=2), stop)
    assert signal.getsignal(signal.SIGINT) is handler
    assert (result.interrupted, result.steps, result.test_accuracy, result.missed) == (True, 2, None, True)
    assert result.params_after == parameter_count(gm) < result.params_before
    assert evaluate(gm, digits) is not None
    assert evaluate(gm, digits, stop=lambda: True) is None


OTHERS = (
    {"evolve_every": 2},
    {"target_params": None},
    {"breathe": True, "rounds": 2},
    {"target_params": None, "thresholds": True},
)


@pytest.mark.parametrize("config", [EVOLVING, *(replace(EVOLVING, **other) for other in OTHERS)])
@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_run_goes_on_from_each_epoch_to_the_same_result(
    config: TrainingConfig, epoch: int, digits: ImageData, tmp_path: Path
) -> None:
    job = Job("small", "digits", None, None, "cpu", config)
    gm = traced_network(digits)

    def keep(state: dict[str, object]) -> None:
        if len(state["epochs"]) == epoch:  # type: ignore[arg-type]
            write_checkpoint(tmp_path, job, gm, state)

    wanted = fit(gm, digits, config, keep=keep)
    torch.manual_seed(5)
    read, state = read_checkpoint(tmp_path)
    assert read == job
    again = read_graph(tmp_path, lambda: fxwidth.trace(small_network(), digits.normalize(digits.test.images[:2])))
    result = fit(again, digits, config, state=state)
    assert replace(result, seconds=0.0, epochs=()) == replace(wanted, seconds=0.0, epochs=())
    assert [replace(one, seconds=0.0) for one in result.epochs] == [replace(one, seconds=0.0) for one in wanted.epochs]
    for (name, one), other in zip(gm.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_a_checkpoint_that_cannot_be_used_is_refused(digits: ImageData, tmp_path: Path) -> None:
    path, gm = tmp_path / "checkpoint.safetensors", traced_network(digits)
    with pytest.raises(
        FxwidthError, match=r"--resume .*: there is no checkpoint\.safetensors; a run writes it after each epoch"
    ):
        read_checkpoint(tmp_path)
    path.write_bytes(b"nothing")
    with pytest.raises(FxwidthError, match=r"--resume .*checkpoint\.safetensors is damaged"):
        read_checkpoint(tmp_path)
    for further, message in (
        (None, "or no run at all"),
        ({"version": 0}, "is of another version"),
        ({"version": 2, "job": {"model": "small"}, "state": {}}, "tells of no run"),
    ):
        save_tensors(gm, path, further=further)
        with pytest.raises(FxwidthError, match=message):
            read_checkpoint(tmp_path)


def test_a_checkpoint_runs_no_code(digits: ImageData, tmp_path: Path) -> None:
    """It is data alone; the pickle of an earlier version is refused unread, with what to do."""
    job = Job("small", "digits", None, None, "cpu", EVOLVING)
    gm = traced_network(digits)
    fit(gm, digits, replace(EVOLVING, epochs=1), keep=lambda state: write_checkpoint(tmp_path, job, gm, state))
    with files.watching_code() as seen:
        read_checkpoint(tmp_path)
        read_graph(tmp_path, lambda: traced_network(digits))
        (tmp_path / "checkpoint.safetensors").unlink()
        (tmp_path / "checkpoint.pt").write_bytes(files.pickle_bomb())
        with pytest.raises(FxwidthError, match=r"checkpoint\.pt is a pickle of an earlier fxwidth.*train anew"):
            read_checkpoint(tmp_path)
    assert not seen


@pytest.mark.parametrize("target", [None, 0.3])
def test_diverging_training_is_told(target: float | None, digits: ImageData) -> None:
    message = r"the training diverged by step \d+: the learning rate 1e\+12 is too high, lower --lr"
    with pytest.raises(FxwidthError, match=message):
        fit(traced_network(digits), digits, replace(EVOLVING, learning_rate=1e12, epochs=8, target_params=target))


def test_curves_of_a_run_that_was_stopped_at_once(tmp_path: Path) -> None:
    result = TrainingResult(
        test_accuracy=None, params_before=10, params_after=10, seconds=0.0, steps=0, interrupted=True,
        widths_before={"a": 3}, widths_after={"a": 3}, losses=(), epochs=(), resizes=(),
    )  # fmt: skip
    save_curves(result, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0
