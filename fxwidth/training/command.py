"""The typer application behind the `fxwidth` command."""

from __future__ import annotations

from dataclasses import asdict, replace
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch.fx import GraphModule

from fxwidth.errors import FxwidthError
from fxwidth.tracing import trace
from fxwidth.training.datasets import DATASETS, ImageData, load_dataset
from fxwidth.training.display import LiveDisplay
from fxwidth.training.interrupts import StopRequest
from fxwidth.training.loop import TrainingConfig, TrainingResult, evaluate, fit
from fxwidth.training.networks import SEED_RESNET, build_network, input_channels
from fxwidth.training.outputs import write_outputs

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Evolve the widths of PyTorch networks.")

# Epochs by default. Digits are few and small, so an epoch is short.
_EPOCHS = {"digits": 60, "mnist": 16, "fashion-mnist": 16, "cifar10": 30}
_FOLDER_EPOCHS = 30
# The seed network is far too wide for what it is given; of a network made by hand less can go.
_SEED_TARGET, _TORCHVISION_TARGET = 12_500.0, 0.5
_INTERRUPTED = 130  # the exit status of a program ended by Ctrl-C


class Device(StrEnum):
    """Where to train."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fxwidth {version('fxwidth')}")
        raise typer.Exit


@app.callback()
def _fxwidth(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    model: Annotated[str, typer.Option(help=f"{SEED_RESNET}, or a torchvision classification model.")] = SEED_RESNET,
    dataset: Annotated[str, typer.Option(help=f"{', '.join(DATASETS)}, or a folder of images.")] = "digits",
    data: Annotated[Path | None, typer.Option(help="Folder of the data set's files, downloaded if missing.")] = None,
    target_params: Annotated[
        float | None,
        typer.Option(min=0.0, help="Parameters to end at; below 1: a part of those at the start. Default: "
                     f"{_SEED_TARGET:,.0f} for {SEED_RESNET}, {_TORCHVISION_TARGET} for others."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs. Default: by data set.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a training step.")] = 64,
    lr: Annotated[float, typer.Option(min=0.0, help="Peak learning rate of AdamW's one-cycle schedule.")] = 1e-2,
    rounds: Annotated[int, typer.Option(min=1, help="Resizes on the way to the target.")] = 8,
    evolve_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between resizes. Default: all are done early.")
    ] = None,
    max_minutes: Annotated[
        float | None, typer.Option(min=0.0, help="End the training, schedule included, by then.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Scale the images to this size.")] = None,
    device: Annotated[Device, typer.Option(help="Where to train.")] = Device.auto,
    compile_: Annotated[bool, typer.Option("--compile", help="Use torch.compile once the widths are final.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Output folder: model, history, curves. Default: runs/MODEL-DATASET.")
    ] = None,
) -> None:  # fmt: skip
    """Evolve a network while it trains; Ctrl-C ends the training and keeps what it has reached."""
    config = TrainingConfig(
        epochs=epochs or _EPOCHS.get(dataset, _FOLDER_EPOCHS),
        batch_size=batch_size,
        learning_rate=lr,
        target_params=target_params or (_SEED_TARGET if model == SEED_RESNET else _TORCHVISION_TARGET),
        rounds=rounds,
        evolve_every=evolve_every,
        max_minutes=max_minutes,
        compile_backend="inductor" if compile_ else None,
        seed=seed,
    )
    console = Console()
    try:
        place = _choose_device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        torch.manual_seed(seed)
        images = load_dataset(dataset, data, image_size).to(place)
        gm, images = _prepare(model, images, place)
        settings = {"model": model, "dataset": dataset, "device": str(place), **asdict(config), **_versions()}
        folder = out or Path("runs") / f"{model}-{Path(dataset).name}"
        result = _run(gm, images, config, console, folder, settings)
    except FxwidthError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"The evolved model, its history and its curves are in {folder}")
    typer.echo(summary(result))
    if result.interrupted:
        raise typer.Exit(_INTERRUPTED)


def summary(result: TrainingResult) -> str:
    """Return the last line of a run: test accuracy, parameters before and after, seconds."""
    accuracy = "not measured" if result.test_accuracy is None else f"{100 * result.test_accuracy:.2f} %"
    return (
        f"test accuracy {accuracy}, parameters {result.params_before:,} -> {result.params_after:,}, "
        f"{result.seconds:.0f} seconds"
    )


def _choose_device(device: Device) -> torch.device:
    """Return the device to train on.

    Raises:
        FxwidthError: CUDA is asked for and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if device is Device.cuda and not has_cuda:
        raise FxwidthError("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    return torch.device("cuda" if has_cuda and device is not Device.cpu else "cpu")


def _prepare(model: str, data: ImageData, device: torch.device) -> tuple[GraphModule, ImageData]:
    """Return the traced network, and the data with the channels that it takes."""
    channels = input_channels(model, data.channels)
    data = data.with_channels(channels)
    network = build_network(model, in_channels=channels, num_classes=len(data.classes), image_size=data.image_size).to(
        device
    )
    return trace(network, data.normalize(data.test.images[:2])), data


def _run(
    gm: GraphModule,
    data: ImageData,
    config: TrainingConfig,
    console: Console,
    out: Path,
    settings: dict[str, Any],
) -> TrainingResult:
    """Train and evolve, write the outputs, and return the result; an interrupted run keeps all that it reached."""
    with StopRequest() as stop:
        with LiveDisplay(console) as display:
            result = fit(gm, data, config, display, stop)
        write_outputs(out, gm, result, settings)
        if result.test_accuracy is None:
            console.print("Stopped; measuring the test accuracy (Ctrl-C skips that)", highlight=False)
            received = stop.count
            measured = evaluate(gm, data, lambda: stop.count > received)
            if measured is not None:
                result = replace(result, test_accuracy=measured[1])
                write_outputs(out, gm, result, settings)
    return result


def _versions() -> dict[str, str]:
    """Return the versions that a run depends on."""
    return {"fxwidth": version("fxwidth"), "torch": torch.__version__}
