"""The `fxwidth` command, from its options to the files it leaves."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fxwidth
from fxwidth import cli
from fxwidth.training import command
from fxwidth.training.datasets import load_dataset
from fxwidth.training.options import with_defaults
from fxwidth.training.runs import TrainingConfig
from tests.zoo.small_network import small_network

LAST_LINE = re.compile(r"test accuracy (\d+\.\d\d %|not measured), parameters ([\d,]+) -> ([\d,]+), \d+ seconds")
SHORT = ["--epochs", "2", "--batch-size", "32", "--rounds", "2", "--evolve-every", "1", "--target-params", "0.01"]


@pytest.fixture(autouse=True)
def _few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "load_dataset", lambda *options: load_dataset(*options).subsample(96))


def run(*options: str) -> tuple[int, str]:
    result = CliRunner().invoke(command.app, list(options))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def check_outputs(out: Path) -> dict[str, object]:
    """Return the history that a run left in `out`, and check that its model and curves are usable."""
    history = json.loads((out / "history.json").read_text())
    gm = fxwidth.load(out / "model.pt", trusted=True)
    assert sum(parameter.numel() for parameter in gm.parameters()) == history["params_after"]
    assert gm(torch.randn(3, 1, 8, 8)).shape == (3, 10)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    return history


def test_train_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "new" / "run"
    code, output = run("train", *SHORT, "--device", "cpu", "--seed", "3", "--threads", "1", "--out", str(out))
    assert code == 0
    last = LAST_LINE.fullmatch(output.strip().splitlines()[-1])
    assert last is not None
    before, after = (int(number.replace(",", "")) for number in last.groups()[1:])
    assert (before, after <= 0.01 * before) == (1_881_308, True)
    assert output.count("epoch ") == 2
    history = check_outputs(out)
    assert history["params_after"] == after
    assert history["settings"]["seed"] == 3
    assert len(history["resizes"]) == 2
    for group, (_, width) in history["resizes"][-1]["widths"].items():
        assert history["widths_after"].get(group, width) == width


def test_train_takes_a_torchvision_model_and_grey_images(tmp_path: Path) -> None:
    options = ["--model", "squeezenet1_1", "--image-size", "32", "--target-params", "0.5", "--rounds", "1"]
    code, output = run(
        "train", *options, "--epochs", "1", "--batch-size", "32", "--evolve-every", "1", "--out", str(tmp_path)
    )
    assert code == 0
    last = LAST_LINE.fullmatch(output.strip().splitlines()[-1])
    assert last is not None
    before, after = (int(number.replace(",", "")) for number in last.groups()[1:])
    assert after <= before / 2


@pytest.mark.slow
def test_train_compiled_by_inductor(tmp_path: Path) -> None:
    code, _ = run("train", *SHORT, "--compile", "--out", str(tmp_path))
    assert code == 0
    check_outputs(tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [[], ["--compile"]])
def test_train_on_a_gpu(options: list[str], tmp_path: Path) -> None:
    code, output = run("train", *SHORT, "--device", "cuda", *options, "--out", str(tmp_path))
    assert code == 0
    assert LAST_LINE.search(output) is not None


def interrupt(
    at_step: int, times: int, monkeypatch: pytest.MonkeyPatch, number: signal.Signals = signal.SIGINT
) -> None:
    """Press Ctrl-C after a step of the next run, of a small network, and then while it is evaluated."""
    monkeypatch.setattr(command, "build_network", lambda *_, **__: small_network())

    def on_step(_: object, step: int, progress: float) -> None:
        if step == at_step:
            signal.raise_signal(number)

    monkeypatch.setattr(command.LiveDisplay, "on_step", on_step)
    original = command.evaluate

    def evaluate(gm: object, data: object, stop: object) -> object:
        for _ in range(times - 1):
            signal.raise_signal(signal.SIGINT)
        return original(gm, data, stop)

    monkeypatch.setattr(command, "evaluate", evaluate)


@pytest.mark.parametrize("at_step", [1, 2, 4])
def test_interrupted_training_leaves_everything(at_step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(at_step, 1, monkeypatch)
    code, output = run("train", *SHORT, "--target-params", "0.3", "--out", str(tmp_path))
    assert code == 130
    last = LAST_LINE.fullmatch(output.strip().splitlines()[-1])
    assert last is not None
    assert last.group(1) != "not measured"
    history = check_outputs(tmp_path)
    assert (history["interrupted"], history["steps"]) == (True, at_step)
    assert history["test_accuracy"] is not None


def test_a_second_interrupt_skips_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(2, 2, monkeypatch)
    code, output = run("train", *SHORT, "--target-params", "0.3", "--out", str(tmp_path))
    assert code == 130
    assert "test accuracy not measured, parameters" in output.splitlines()[-1]
    assert check_outputs(tmp_path)["test_accuracy"] is None


def small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "build_network", lambda *_, **__: small_network())


def same_run(one: Path, other: Path) -> bool:
    """Whether two runs have done the same, but for the time that it took."""
    histories = [json.loads((folder / "history.json").read_text()) for folder in (one, other)]
    for history in histories:
        history.pop("seconds")
        for record in history["epochs"]:
            record.pop("seconds")
    models = [fxwidth.load(folder / "model.pt", trusted=True).state_dict() for folder in (one, other)]
    same_tensors = all(torch.equal(models[0][name], models[1][name]) for name in models[1])
    return histories[0] == histories[1] and models[0].keys() == models[1].keys() and same_tensors


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    number: signal.Signals, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["train", *SHORT, "--epochs", "3", "--evolve-every", "3", "--target-params", "0.3", "--out"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    small_runs(monkeypatch)
    assert run(*options, str(whole))[0] == 0
    with monkeypatch.context() as patches:
        interrupt(5, 1, patches, number)
        code, output = run(*options, str(parts))
    assert code == status
    assert f"To go on from the last epoch: fxwidth train --resume {parts}" in output
    assert not same_run(whole, parts)
    code, output = run("train", "--resume", str(parts), "--threads", str(torch.get_num_threads()))
    assert code == 0
    assert output.count("epoch ") == 2
    assert same_run(whole, parts)


def test_resuming_takes_the_options_of_the_run(tmp_path: Path) -> None:
    code, output = run("train", "--resume", str(tmp_path), "--lr", "0.1", "--compile")
    assert code == 1
    assert output == "Error: --resume goes on with the options of the run; leave out --lr, --compile\n"
    code, output = run("train", "--resume", str(tmp_path))
    assert code == 1
    assert "there is no checkpoint.safetensors" in output


def test_a_run_is_not_overwritten_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_runs(monkeypatch)
    options = ["train", *SHORT, "--target-params", "0.3", "--out", str(tmp_path)]
    assert run(*options)[0] == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {"model.pt", "history.json", "curves.png", "checkpoint.safetensors"}
    code, output = run(*options, "--seed", "1")
    assert code == 1
    assert f"--out {tmp_path} holds a run already (history.json, " in output
    assert f"--resume {tmp_path}, or give --overwrite" in output
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert run(*options, "--seed", "1", "--overwrite")[0] == 0
    assert (tmp_path / "model.pt").read_bytes() != before["model.pt"]


def test_runs_without_a_folder_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_runs(monkeypatch)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run("train", *SHORT, "--target-params", "0.3")[0] == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["seed-resnet-digits", "seed-resnet-digits-2"]


def test_a_folder_that_cannot_be_written_to_is_told_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_runs(monkeypatch)
    monkeypatch.setattr(command, "fit", lambda *_, **__: pytest.fail("it has been trained"))
    (tmp_path / "file").write_text("")
    code, output = run("train", *SHORT, "--target-params", "0.3", "--out", str(tmp_path / "file" / "run"))
    assert code == 1
    assert re.search(r"--out .* cannot be written to \(.*\): choose another folder", output.replace("\n", " "))


def test_a_missed_target_is_told_and_another_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_runs(monkeypatch)
    code, output = run("train", *SHORT, "--target-params", "0.3", "--evolve-every", "5", "--out", str(tmp_path))
    assert code == 3
    assert re.search(
        r"Warning: the target of [\d,]+ parameters was missed, [\d,]+ are left: 1 of 2 resizes were", output
    )
    assert LAST_LINE.fullmatch(output.strip().splitlines()[-1])


def test_a_folder_of_photos_has_a_relative_target() -> None:
    config = TrainingConfig()
    for dataset, target in (("digits", 12_500), ("photos/of/cats", 0.1)):
        assert with_defaults(config, "seed-resnet", dataset, None, None, None).target_params == target


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "resnet19"], "no model 'resnet19'"),
        (["--dataset", "nowhere"], "'nowhere' is neither a data set"),
        (["--image-size", "2"], "an image size of 2 is too small"),
        # Before any data are looked for.
        (
            ["--dataset", "nowhere", "--target-params", "0"],
            r"params=0.0 as a ratio of the present cost must lie in (0, 100]",
        ),
        (
            ["--dataset", "nowhere", "--target-params", "inf"],
            r"params=inf as a ratio of the present cost must lie in (0, 100]",
        ),
    ],
)
def test_errors_are_one_message(options: list[str], message: str, tmp_path: Path) -> None:
    code, output = run("train", *options, "--out", str(tmp_path / "out"))
    assert code == 1
    assert output.startswith("Error: ")
    assert message in output
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device() -> None:
    code, output = run("train", "--device", "cuda")
    assert (code, output) == (1, "Error: --device cuda: torch sees no CUDA device here; use --device cpu or auto\n")


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["fxwidth", "--version"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"fxwidth {fxwidth.__version__}\n"


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_a_missing_extra_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith(("fxwidth.training.", f"{package}.")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=rf"fxwidth: this command needs {package}, .*pip install 'fxwidth\[demo\]'"):
        cli.main()


def test_thresholds_take_no_target_and_a_lower_rate(tmp_path: Path) -> None:
    status, output = run("train", "--thresholds", "--target-params", "0.5", "--out", str(tmp_path / "refused"))
    assert (status, not (tmp_path / "refused").exists()) == (1, True)
    assert "leave out one of them" in output
    status, _ = run("train", "--thresholds", "--epochs", "1", "--max-minutes", "0.05", "--out", str(tmp_path / "run"))
    settings = json.loads((tmp_path / "run" / "history.json").read_text(encoding="utf-8"))["settings"]
    assert (status, settings["learning_rate"], settings["target_params"]) == (0, 0.002, None)
