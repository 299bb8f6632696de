"""The typer application behind the `fxwidth` command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

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
from fxwidth.training.loop import State, evaluate, fit
from fxwidth.training.networks import SEED_RESNET, build_network, input_channels
from fxwidth.training.outputs import CHECKPOINT_FILE, output_folder, write_outputs
from fxwidth.training.run_checkpoint import Job, read_checkpoint, read_graph, write_checkpoint
from fxwidth.training.runs import TrainingConfig, TrainingResult
from fxwidth.untying.untie_copies import untie_copies

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Evolve the widths of PyTorch networks.")

_MISSED = 3
_STATUSES = (
    f"Exit status: 0 for a run that has reached its target, {_MISSED} for one that has not, 1 for an error, 2 for "
    "wrong options, 130 after Ctrl-C and 143 after SIGTERM, which both leave all files."
)


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


@app.command(epilog=_STATUSES)
def train(
    context: typer.Context,
    model: options.Model = SEED_RESNET,
    dataset: options.Dataset = "digits",
    data: options.Data = None,
    target_params: options.TargetParams = None,
    epochs: options.Epochs = None,
    batch_size: options.BatchSize = 64,
    lr: options.LearningRate = None,
    rounds: options.Rounds = 8,
    evolve_every: options.EvolveEvery = None,
    breathe: options.Breathe = False,
    thresholds: options.Thresholds = False,
    max_minutes: options.MaxMinutes = None,
    image_size: options.ImageSize = None,
    device: options.Place = options.Device.auto,
    compile_: options.Compile = False,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    resume: options.Resume = None,
) -> None:
    """Evolve a network while it trains; Ctrl-C ends the training and keeps what it has reached."""
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        place = _choose_device(device)
        if resume is not None:
            options.refuse_beside_resume(context)
            job, state = read_checkpoint(resume)
            status = _train(replace(job, device=str(place)), lambda _: resume, (resume, state))
        else:
            config = TrainingConfig(
                batch_size=batch_size,
                rounds=rounds,
                evolve_every=evolve_every,
                breathe=breathe,
                thresholds=thresholds,
                max_minutes=max_minutes,
                compile_backend="inductor" if compile_ else None,
                seed=seed,
            )
            config = options.with_defaults(config, model, dataset, epochs, lr, target_params)
            job = Job(model, dataset, None if data is None else str(data), image_size, str(place), config)
            status = _train(job, lambda name: output_folder(out, name, overwrite=overwrite))
    except FxwidthError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    if status:
        raise typer.Exit(status)


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


def _train(job: Job, folder_of: Callable[[str], Path], before: tuple[Path, State] | None = None) -> int:
    """Train, write the outputs, tell of the result, and return the exit status.

    Args:
        job: what is trained on what.
        folder_of: makes the output folder of a run, given its name.
        before: the folder of a run that goes on, and its state.
    """
    torch.manual_seed(job.config.seed)
    device = torch.device(job.device)
    images = load_dataset(job.dataset, None if job.data is None else Path(job.data), job.image_size).to(device)
    images = images.with_channels(input_channels(job.model, images.channels))
    first = partial(_first_graph, job.model, images)
    gm = first() if before is None else read_graph(before[0], first)
    # Before the first step: hours of training are not to end at a folder that cannot be written to.
    folder = folder_of(f"{job.model}-{Path(job.dataset).name}")
    with StopRequest() as stop:
        result = _run(job, gm, images, folder, None if before is None else before[1], stop)
    typer.echo(f"The evolved model, its history and its curves are in {folder}")
    if result.interrupted and (folder / CHECKPOINT_FILE).exists():
        typer.echo(f"To go on from the last epoch: fxwidth train --resume {folder}")
    if result.missed:
        typer.echo(_missed(result, job.config.rounds), err=True)
    typer.echo(summary(result))
    return stop.exit_status if result.interrupted else _MISSED if result.missed else 0


def _first_graph(model: str, data: ImageData) -> GraphModule:
    """Return the traced network, for images of the channels that it takes."""
    sizes = {"in_channels": data.channels, "num_classes": len(data.classes), "image_size": data.image_size}
    network = build_network(model, **sizes).to(data.train.labels.device)
    # Streams that are joined by tiles alone are to have widths of their own.
    return untie_copies(trace(network, data.normalize(data.test.images[:2])))


def _run(
    job: Job, gm: GraphModule, data: ImageData, out: Path, state: State | None, stop: StopRequest
) -> TrainingResult:
    """Train and evolve, write the outputs, and return the result; an interrupted run keeps all that it reached."""
    console, settings = Console(), job.settings()
    sizes = f"{len(data.train):,} training and {len(data.test):,} test images"
    console.print(f"{job.model} on {data.name}: {sizes}, {job.device}", highlight=False)
    with LiveDisplay(console) as display:
        keep = partial(write_checkpoint, out, job, gm)
        result = fit(gm, data, job.config, display, stop, keep=keep, state=state)
    write_outputs(out, gm, result, settings)
    if result.test_accuracy is None:
        console.print("Stopped; measuring the test accuracy (Ctrl-C skips that)", highlight=False)
        received = stop.count
        measured = evaluate(gm, data, lambda: stop.count > received)
        if measured is not None:
            result = replace(result, test_accuracy=measured[1])
            write_outputs(out, gm, result, settings)
    return result


def _missed(result: TrainingResult, rounds: int) -> str:
    """Return what is to be told of a target that was not reached."""
    return (
        f"Warning: the target of {result.target:,} parameters was missed, {result.params_after:,} are left: "
        f"{len(result.resizes)} of {rounds} resizes were done before the training ended; give it more --epochs or "
        "--max-minutes, or a smaller --evolve-every"
    )
