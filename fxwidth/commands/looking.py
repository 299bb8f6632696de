"""The commands that look at a model and leave it as it is: inspect, explain, compare, report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxwidth.commands import options
from fxwidth.commands.faults import InputError, telling
from fxwidth.commands.printing import show, show_json

if TYPE_CHECKING:
    import fxwidth
    from fxwidth.commands.models import Opened

INSPECT_EXAMPLES = (
    "fxwidth inspect torchvision:resnet18",
    "fxwidth inspect torchvision:resnet18 --input 1x3x64x64 --json",
)
EXPLAIN_EXAMPLES = (
    "fxwidth explain torchvision:resnet18 conv1 layer1.0.conv2.weight:0",
    "fxwidth explain torchvision:resnet18 fc",
)
COMPARE_EXAMPLES = (
    "fxwidth compare torchvision:mobilenet_v3_small torchvision:squeezenet1_1 --input 1x3x64x64",
    "fxwidth compare torchvision:resnet18 torchvision:resnet34 --no-run",
)
REPORT_EXAMPLES = (
    "fxwidth report small.pt2 --html small.html",
    "fxwidth report torchvision:squeezenet1_1 --input 1x3x64x64 --html squeezenet.html",
)


@telling
def inspect(
    model: options.Model,
    input_: options.Inputs = None,
    weights: options.Weights = None,
    architecture: options.Architecture = None,
    trusted: options.Trusted = False,
    as_json: options.AsJson = False,
) -> None:
    """Show the channel groups of a model, why some are pinned, and what each layer costs."""
    import fxwidth
    from fxwidth.commands.models import open_model

    opened = open_model(options.source(model, input_, weights, architecture, trusted))
    graph = fxwidth.analyze(opened.trace())
    spectra = fxwidth.spectrum(graph, errors=False) if opened.has_values else None
    costs = fxwidth.cost(graph)
    if as_json:
        show_json(_inspected(opened, graph, costs, spectra))
        return
    free = f"{len(graph.free)} of {len(graph.groups)} groups are free"
    typer.echo(f"{opened.name}: {costs.params:,} parameters, {costs.flops:,} flops, {free}\n")
    show("Groups", graph.table(folds=True))
    if spectra is not None:
        show("Spectra", spectra.table())
    show("Layers (each)", costs.table(folds=True))


def _inspected(
    opened: Opened, graph: fxwidth.WidthGraph, costs: fxwidth.LayerCosts, spectra: fxwidth.Spectra | None
) -> dict[str, Any]:
    groups = [
        {
            "name": group.name,
            "width": group.width,
            "kind": str(graph.kinds[group.name]),
            "pinned": group.pinned,
            "mixed": group.mixed,
            "sites": [{"parameter": one.parameter, "dim": one.dim, "role": str(one.role)} for one in group.sites],
        }
        for group in graph.groups
    ]
    found: dict[str, Any] = {"model": opened.name, **costs.as_plain(), "groups": groups}
    if spectra is not None:
        found["spectra"] = {name: one.as_plain() for name, one in spectra.items()}
    return found


@telling
def explain(
    model: options.Model,
    a: Annotated[str, typer.Argument(help="A group, or a parameter's dim as conv1.weight:0.", show_default=False)],
    b: Annotated[str | None, typer.Argument(help="Another; without, why the first is pinned.")] = None,
    input_: options.Inputs = None,
    weights: options.Weights = None,
    architecture: options.Architecture = None,
    trusted: options.Trusted = False,
    as_json: options.AsJson = False,
) -> None:
    """Tell why two groups share channels, or why one keeps its width."""
    import fxwidth
    from fxwidth.commands.models import open_model

    opened = open_model(options.source(model, input_, weights, architecture, trusted))
    graph = fxwidth.analyze(opened.trace())
    try:
        text = graph.why_pinned(a) if b is None else graph.explain(a, b)
    except fxwidth.FxwidthError as error:
        # What was typed is no group of this model.
        raise InputError(str(error)) from error
    if as_json:
        show_json({"model": opened.name, "a": a, "b": b, "explanation": text})
    else:
        typer.echo(text)


@telling
def compare(
    a: options.Model,
    b: options.Model,
    input_: options.Inputs = None,
    weights: options.Weights = None,
    architecture: options.Architecture = None,
    runs: Annotated[bool, typer.Option("--run/--no-run", help="Whether to run both, for times and outputs.")] = True,
    trusted: options.Trusted = False,
    as_json: options.AsJson = False,
) -> None:
    """Compare what two models cost, how long they take, and what they return for the same inputs."""
    from fxwidth.commands import comparison
    from fxwidth.commands.models import open_model

    def opened(name: str) -> Opened:
        of_file = architecture if name.endswith(".safetensors") else None
        return open_model(
            options.source(name, input_, weights if ":" in name else None, of_file, trusted), for_values=runs
        )

    if architecture is not None and not any(name.endswith(".safetensors") for name in (a, b)):
        raise InputError("--architecture tells what a .safetensors file belongs to, and neither model is one.")
    pair = opened(a), opened(b)
    found = comparison.compared(*pair, runs=runs)
    if as_json:
        show_json(found)
    else:
        show("", comparison.table(found))


@telling
def report(
    model: options.Model,
    html: Annotated[Path | None, typer.Option(help="File to write a page to: costs, spectra, groups, layers.")] = None,
    overwrite: options.Overwrite = False,
    input_: options.Inputs = None,
    weights: options.Weights = None,
    architecture: options.Architecture = None,
    trusted: options.Trusted = False,
    as_json: options.AsJson = False,
) -> None:
    """Tell what has been done to a graph that was saved; with --html, show all that is known of any model."""
    import fxwidth
    from fxwidth.commands.models import open_model

    if html is None and (":" in model or not Path(model).suffix):
        raise InputError(
            f"{model!r} is no file; a report is of what fxwidth.save has written, such as small.pt2, or, with --html, "
            "a page on any model."
        )
    options.refuse_unwritable(html, overwrite=overwrite, option="--html")
    gm = open_model(options.source(model, input_, weights, architecture, trusted)).trace()
    found = fxwidth.report(gm)
    if html is not None:
        found.to_html(html)
    if as_json:
        show_json({"file": model, "resizes": list(found.resizes)})
        return
    typer.echo(f"{found}\n")
    if html is not None:
        typer.echo(f"written to {html}")
    if found.resizes:
        show("Widths", found.table())


def add_to(app: typer.Typer) -> None:
    """Add the commands to an application."""
    for command, examples in (
        (inspect, INSPECT_EXAMPLES),
        (explain, EXPLAIN_EXAMPLES),
        (compare, COMPARE_EXAMPLES),
        (report, REPORT_EXAMPLES),
    ):
        app.command(epilog=options.epilog(examples))(command)
