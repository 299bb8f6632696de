"""The figures that a training run reports, recomputed: from the models it had at each step, and from what it saved."""

from __future__ import annotations

import copy
import json
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import fxwidth
from fxwidth.evolution import evolve as evolution
from fxwidth.evolution.evolver import Evolver
from fxwidth.training import command, loop, outputs
from fxwidth.training.datasets import load_dataset
from fxwidth.training.images import ImageData
from fxwidth.training.loop import all_widths, fit, one_cycle
from fxwidth.training.runs import TrainingConfig, TrainingObserver, TrainingResult
from tests.zoo.small_network import small_network

CONFIG = TrainingConfig(epochs=2, batch_size=32, target_params=0.3, rounds=2, evolve_every=2, label_smoothing=0.1)
EPOCH_LINE = re.compile(r"epoch (\d+): loss ([\d.]+) \(test ([\d.]+)\), accuracy ([\d.]+) %, ([\d,]+) parameters")
LAST_LINE = re.compile(r"test accuracy (?:([\d.]+) %|not measured), parameters ([\d,]+) -> ([\d,]+), \d+ seconds")
STEPS = 3  # per epoch


def few_digits(*options: Any) -> ImageData:
    return load_dataset(*(options or ("digits",))).subsample(96)


def network() -> nn.Module:
    """A network with what differs between the modes."""
    torch.manual_seed(0)
    layers = list(small_network())
    return nn.Sequential(*layers[:2], nn.BatchNorm2d(12), *layers[2:])


def measured(gm: nn.Module, data: ImageData) -> tuple[float, float]:
    """Return the mean loss and the accuracy on the test images, all at once and in float64."""
    wide = copy.deepcopy(gm).double().eval()
    with torch.no_grad():
        logits = wide(data.normalize(data.test.images).double())
    right = logits.argmax(1) == data.test.labels
    return float(F.cross_entropy(logits, data.test.labels)), float(right.double().mean())


class Copies(TrainingObserver):
    """Keeps a copy of the network as it is after each step, from none on."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.copies: list[fx.GraphModule] = []

    def on_start(self, before: object, now: object, params: int) -> None:
        self.copies.append(copy.deepcopy(self.gm))

    def on_step(self, step: int, progress: float) -> None:
        self.copies.append(copy.deepcopy(self.gm))


def check_figures(result: TrainingResult, copies: list[fx.GraphModule], data: ImageData) -> None:
    """Recompute the losses of all steps and the records of all epochs from the networks that there were."""
    batches, generator = [], torch.Generator().manual_seed(CONFIG.seed)
    for _ in range(CONFIG.epochs):
        batches += data.training_batches(CONFIG.batch_size, generator)
    assert len(result.losses) == result.steps == len(copies) - 1
    for loss, gm, (images, labels) in zip(result.losses, copies, batches, strict=False):
        with torch.no_grad():
            expected = float(F.cross_entropy(copy.deepcopy(gm)(images), labels, label_smoothing=0.1))
        assert loss == pytest.approx(expected, rel=1e-5)
    for i, record in enumerate(result.epochs):
        gm = copies[record.step]
        assert (record.epoch, record.step) == (i + 1, STEPS * (i + 1))
        assert record.train_loss == pytest.approx(sum(result.losses[record.step - STEPS : record.step]) / STEPS)
        assert (record.test_loss, record.test_accuracy) == pytest.approx(measured(gm, data), rel=1e-5)
        assert record.params == sum(parameter.numel() for parameter in gm.parameters())
    assert result.widths_after == all_widths(copies[-1])


def trained() -> tuple[TrainingResult, list[fx.GraphModule], ImageData]:
    data = few_digits()
    gm = fxwidth.trace(network(), data.normalize(data.test.images[:2]))
    copies = Copies(gm)
    return fit(gm, data, CONFIG, copies), copies.copies, data


def test_losses_and_epochs_are_those_of_the_networks() -> None:
    result, copies, data = trained()
    assert len(result.resizes) == 2
    check_figures(result, copies, data)


@pytest.mark.parametrize("fault", ["another accuracy", "a lost loss", "a stale epoch"])
def test_a_figure_that_is_wrong_is_seen(fault: str) -> None:
    result, copies, data = trained()
    last = result.epochs[-1]
    wrong = {
        "another accuracy": replace(result, epochs=(*result.epochs[:-1], replace(last, test_accuracy=0.5))),
        "a lost loss": replace(result, losses=result.losses[:-1]),
        "a stale epoch": replace(result, epochs=(*result.epochs[:-1], replace(result.epochs[0], epoch=2, step=6))),
    }[fault]
    with pytest.raises(AssertionError):
        check_figures(wrong, copies, data)


# By the default, in so few steps, losses would be the same without any.
@pytest.mark.parametrize("decay", [CONFIG.weight_decay, 10.0])
def test_without_a_target_it_is_plain_training(decay: float) -> None:
    data, model = few_digits(), network()
    gm = fxwidth.trace(copy.deepcopy(model), data.normalize(data.test.images[:2]))
    result = fit(gm, data, replace(CONFIG, target_params=None, weight_decay=decay))
    optimizer = torch.optim.AdamW(model.parameters(), lr=CONFIG.learning_rate, weight_decay=decay, betas=(0.9, 0.99))
    generator, losses, steps = torch.Generator().manual_seed(CONFIG.seed), [], CONFIG.epochs * STEPS
    model.train().to(memory_format=torch.channels_last)
    for _ in range(CONFIG.epochs):
        for images, labels in data.training_batches(CONFIG.batch_size, generator):
            optimizer.param_groups[0]["lr"] = CONFIG.learning_rate * one_cycle(len(losses) / steps)
            loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert result.losses == pytest.approx(losses, rel=1e-4)
    assert result.test_accuracy == pytest.approx(measured(model, data)[1])
    assert losses[-1] < losses[0]


# The command, and Ctrl-C at any moment of it


def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    monkeypatch.setattr(command, "build_network", lambda *_, **__: network())
    monkeypatch.setattr(command, "load_dataset", few_digits)
    options = ["--epochs", "2", "--batch-size", "32", "--rounds", "2", "--evolve-every", "2", "--target-params", "0.3"]
    result = CliRunner().invoke(command.app, ["train", *options, "--device", "cpu", "--out", str(folder)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def check_report(folder: Path, output: str) -> dict[str, Any]:
    """Recompute from the saved model what a run printed and wrote, and return what it wrote."""
    history = json.loads((folder / "history.json").read_text())
    gm, data = fxwidth.load(folder / "model.pt", trusted=True), few_digits()
    loss, accuracy = measured(gm, data)
    params = sum(parameter.numel() for parameter in gm.parameters())
    last = LAST_LINE.fullmatch(output.strip().splitlines()[-1])
    assert last is not None
    assert last.group(1) == (None if history["test_accuracy"] is None else f"{100 * accuracy:.2f}")
    assert history["test_accuracy"] in (None, pytest.approx(accuracy))
    assert [int(last.group(i).replace(",", "")) for i in (2, 3)] == [history["params_before"], history["params_after"]]
    assert history["params_after"] == params
    assert history["widths_after"] == all_widths(gm)
    assert len(history["losses"]) == history["steps"]
    assert [record["params_after"] for record in history["resizes"]] == sorted(
        (record["params_after"] for record in history["resizes"]), reverse=True
    )
    assert [record["params_after"] for record in history["resizes"][-1:]] in ([], [params])
    printed = EPOCH_LINE.findall(output)
    assert len(printed) == len(history["epochs"])
    for i, (line, record) in enumerate(zip(printed, history["epochs"], strict=True)):
        assert int(line[0]) == record["epoch"] == i + 1
        assert record["step"] == STEPS * (i + 1) <= history["steps"]
        recent = history["losses"][STEPS * i : STEPS * (i + 1)]
        assert record["train_loss"] == pytest.approx(sum(recent) / STEPS)
        told = record["train_loss"], record["test_loss"], 100 * record["test_accuracy"], record["params"]
        assert [float(number.replace(",", "")) for number in line[1:]] == pytest.approx(told, abs=6e-3)
        if record["step"] == history["steps"]:
            assert (record["test_loss"], record["test_accuracy"]) == pytest.approx((loss, accuracy), rel=1e-5)
            assert record["params"] == params
    return history


def test_what_the_command_reports_is_what_it_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, output = run(tmp_path, monkeypatch)
    history = check_report(tmp_path, output)
    assert (code, history["steps"], len(history["epochs"]), len(history["resizes"])) == (0, 6, 2, 2)
    assert history["test_accuracy"] == history["epochs"][-1]["test_accuracy"]


def pressed(call: Callable[..., Any], at: int, after: bool = False) -> Callable[..., Any]:
    """Return a function that has Ctrl-C pressed in its call of a number, before or after what it does."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at and not after:
            signal.raise_signal(signal.SIGINT)
        result = call(*args, **kwargs)
        if calls == at and after:
            signal.raise_signal(signal.SIGINT)
        return result

    return wrapped


# By moment: where a function is, its name, in which call of it, whether behind it; and the steps and resizes then done.
MOMENTS: dict[str, tuple[Any, str, int, bool, int, int]] = {
    "in the first forward pass": (F, "cross_entropy", 1, False, 1, 0),
    "in the second epoch": (torch.optim.AdamW, "step", 5, True, 5, 2),
    "before a resize": (Evolver, "step", 4, False, 4, 2),
    "in a resize": (evolution, "resize_analyzed", 1, False, 2, 1),
    "behind a resize": (Evolver, "step", 2, True, 2, 1),
    "before an evaluation": (loop, "evaluate", 1, False, 3, 1),
    "behind an evaluation": (loop, "evaluate", 1, True, 3, 1),
    "in the last evaluation": (loop, "evaluate", 2, False, 6, 2),
    "behind the last evaluation": (loop, "evaluate", 2, True, 6, 2),
    "when an epoch is told": (command.LiveDisplay, "on_epoch", 1, False, 3, 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_after_an_interruption_too(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, at, after, steps, resizes = MOMENTS[moment]
    monkeypatch.setattr(owner, name, pressed(getattr(owner, name), at, after))
    code, output = run(tmp_path, monkeypatch)
    history = check_report(tmp_path, output)
    assert (code, history["interrupted"]) == (130, True)
    assert (history["steps"], len(history["resizes"])) == (steps, resizes)
    assert history["test_accuracy"] is not None


@pytest.mark.parametrize("name", ["save", "save_curves"])
def test_ctrl_c_cuts_no_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, name, pressed(getattr(outputs, name), 1))
    code, output = run(tmp_path, monkeypatch)
    history = check_report(tmp_path, output)
    assert (code, history["interrupted"], history["steps"]) == (0, False, 6)


def test_an_evaluation_of_the_wrong_mode_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_training(gm: nn.Module, data: ImageData, stop: object = None) -> tuple[float, float]:
        with torch.no_grad():
            logits = gm.train()(data.normalize(data.test.images))
        return F.cross_entropy(logits, data.test.labels).item(), 0.0

    monkeypatch.setattr(loop, "evaluate", in_training)
    _, output = run(tmp_path, monkeypatch)
    with pytest.raises(AssertionError):
        check_report(tmp_path, output)
