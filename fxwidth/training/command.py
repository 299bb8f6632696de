"""The typer application behind the `fxwidth` command."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch.fx import GraphModule

import fxwidth
from fxwidth.errors import FxwidthError
from fxwidth.tracing.trace import trace
from fxwidth.training import options
from fxwidth.training.datasets import load_dataset
from fxwidth.training.display import LiveDisplay
from fxwidth.training.images import ImageData
from fxwidth.training.interrupts import StopRequest
from fxwidth.training.loop import TrainingConfig, TrainingResult, evaluate, fit
from fxwidth.training.networks import SEED_RESNET, build_network, input_channels
from fxwidth.training.outputs import write_outputs
from fxwidth.untying.untie_copies import untie_copies

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Evolve the widths of PyTorch networks.")

_INTERRUPTED = 130  # the exit status of a program ended by Ctrl-C


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fxwidth {fxwidth.__version__}")
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
    model: options.Model = SEED_RESNET,
    dataset: options.Dataset = "digits",
    data: options.Data = None,
    target_params: options.TargetParams = None,
    epochs: options.Epochs = None,
    batch_size: options.BatchSize = 64,
    lr: options.LearningRate = None,
    rounds: options.Rounds = 8,
    evolve_every: options.EvolveEvery = None,
    max_minutes: options.MaxMinutes = None,
    image_size: options.ImageSize = None,
    device: options.Place = options.Device.auto,
    compile_: options.Compile = False,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    out: options.Out = None,
) -> None:
    """Evolve a network while it trains; Ctrl-C ends the training and keeps what it has reached."""
    folder = out or Path("runs") / f"{model}-{Path(dataset).name}"
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    try:
        config = TrainingConfig(
            batch_size=batch_size,
            rounds=rounds,
            evolve_every=evolve_every,
            max_minutes=max_minutes,
            compile_backend="inductor" if compile_ else None,
            seed=seed,
        )
        config = options.with_defaults(config, model, dataset, epochs, lr, target_params)
        place = _choose_device(device)
        gm, images = _prepare(model, load_dataset(dataset, data, image_size).to(place), place)
        settings = {"model": model, "dataset": dataset, "device": str(place), **asdict(config), **_versions()}
        result = _run(gm, images, config, folder, settings)
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


def _choose_device(device: options.Device) -> torch.device:
    """Return the device to train on.

    Raises:
        FxwidthError: CUDA is asked for and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if device is options.Device.cuda and not has_cuda:
        raise FxwidthError("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    return torch.device("cuda" if has_cuda and device is not options.Device.cpu else "cpu")


def _prepare(model: str, data: ImageData, device: torch.device) -> tuple[GraphModule, ImageData]:
    """Return the traced network, and the data with the channels that it takes."""
    channels = input_channels(model, data.channels)
    data = data.with_channels(channels)
    network = build_network(model, in_channels=channels, num_classes=len(data.classes), image_size=data.image_size).to(
        device
    )
    # Streams that are joined by tiles alone are to have widths of their own.
    return untie_copies(trace(network, data.normalize(data.test.images[:2]))), data


def _run(
    gm: GraphModule, data: ImageData, config: TrainingConfig, out: Path, settings: dict[str, Any]
) -> TrainingResult:
    """Train and evolve, write the outputs, and return the result; an interrupted run keeps all that it reached."""
    console = Console()
    sizes = f"{len(data.train):,} training and {len(data.test):,} test images"
    console.print(f"{settings['model']} on {data.name}: {sizes}, {settings['device']}", highlight=False)
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
    return {"fxwidth": fxwidth.__version__, "torch": torch.__version__}
