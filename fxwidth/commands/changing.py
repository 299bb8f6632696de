"""The commands that choose new widths and resize a model: plan, evolve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxwidth.commands import options
from fxwidth.commands.faults import InputError, telling
from fxwidth.commands.input_texts import number
from fxwidth.commands.printing import show, show_json

if TYPE_CHECKING:
    import fxwidth
    from fxwidth.commands.models import Opened

PLAN_EXAMPLES = (
    "fxwidth plan torchvision:mobilenet_v3_small --input 1x3x64x64 --params 0.5 --out plan.json",
    "fxwidth plan torchvision:squeezenet1_1 --params 0.7 --flops 0.5 --min-width 8 --json",
    "fxwidth plan torchvision:squeezenet1_1 --input 1x3x64x64 --frontier --params 0.9,0.75,0.5",
)
EVOLVE_EXAMPLES = (
    "fxwidth evolve torchvision:mobilenet_v3_small --input 1x3x64x64 --plan plan.json --out small.pt2",
    "fxwidth evolve torchvision:squeezenet1_1 --input 1x3x64x64 --params 0.5 --out small.safetensors",
)
_SAVED = (".pt2", ".safetensors", ".pt")


@telling
def plan(
    model: options.Model,
    params: options.Params = None,
    flops: options.Flops = None,
    activation_memory: options.ActivationMemory = None,
    latency: options.Latency = None,
    frontier: options.Frontier = False,
    data: options.Data = None,
    ratio: options.Ratio = None,
    min_width: options.MinWidth = "1",
    align: options.Align = 1,
    only: options.Only = None,
    keep: options.Keep = None,
    within: options.Within = None,
    out: Annotated[Path | None, typer.Option(help="File to write the plan to, as JSON.")] = None,
    overwrite: options.Overwrite = False,
    input_: options.Inputs = None,
    weights: options.Weights = None,
    architecture: options.Architecture = None,
    trusted: options.Trusted = False,
    as_json: options.AsJson = False,
) -> None:
    """Choose new widths under a budget, for a frontier of many, or by the spectra of the weights without one."""
    import fxwidth
    from fxwidth.commands.calibration import batches
    from fxwidth.commands.models import open_model
    from fxwidth.runtime.atomic_files import replacing

    options.refuse_unwritable(out, overwrite=overwrite)
    bounds = (params, flops, activation_memory, latency)
    if not frontier:
        options.refuse_lists(*bounds)
    target: dict[str, Any] = options.frontier_bounds(*bounds) if frontier else _within(options.budget(*bounds))
    source = options.source(model, input_, weights, architecture, trusted)
    opened = open_model(source, for_values=data is not None or latency is not None)
    graph = fxwidth.analyze(opened.trace())
    evidence: dict[str, Any] = {} if data is None else {"data": batches(data, opened.inputs)}
    chosen = {**target, **_planning(ratio, min_width, align, only, keep, within), **evidence}
    found = fxwidth.frontier(graph, **chosen) if frontier else fxwidth.plan(graph, **chosen)
    if out is not None:
        with replacing(out) as beside:
            beside.write_text(found.to_json() + "\n", encoding="utf-8")
    if as_json:
        typer.echo(found.to_json())
        return
    _tell_of_missing_weights(opened)
    show(f"{'Frontier of' if frontier else 'Plan for'} {opened.name}", found.table())
    if out is not None:
        typer.echo(f"written to {out}")


@telling
def evolve(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="File to write: .pt2, .safetensors or .pt.", show_default=False)],
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Plan as JSON, in the place of a budget.")] = None,
    params: options.Params = None,
    flops: options.Flops = None,
    activation_memory: options.ActivationMemory = None,
    latency: options.Latency = None,
    data: options.Data = None,
    ratio: options.Ratio = None,
    min_width: options.MinWidth = "1",
    align: options.Align = 1,
    only: options.Only = None,
    keep: options.Keep = None,
    within: options.Within = None,
    overwrite: options.Overwrite = False,
    input_: options.Inputs = None,
    weights: options.Weights = None,
    architecture: options.Architecture = None,
    trusted: options.Trusted = False,
    as_json: options.AsJson = False,
) -> None:
    """Resize a model by a plan or to a budget, and save it."""
    import fxwidth
    from fxwidth.commands.calibration import batches
    from fxwidth.commands.models import open_model

    if out.suffix not in _SAVED:
        raise InputError(f"--out {out}: a graph is saved in a file that ends in {', '.join(_SAVED)}.")
    options.refuse_unwritable(out, overwrite=overwrite)
    target = options.budget(params, flops, activation_memory, latency)
    if (plan_file is None) == (target is None and ratio is None):
        raise InputError("evolve takes either --plan or a budget, such as --params 0.5, or --ratio.")
    chosen = None if plan_file is None else _read_plan(plan_file)
    opened = open_model(options.source(model, input_, weights, architecture, trusted), for_values=True)
    evidence: dict[str, Any] = {} if data is None else {"data": batches(data, opened.inputs)}
    gm = opened.trace()
    if chosen is None:
        gm = fxwidth.evolve(gm, **_within(target), **_planning(ratio, min_width, align, only, keep, within), **evidence)
    else:
        gm = fxwidth.resize(gm, chosen, **evidence)
    fxwidth.save(gm, out)
    found = fxwidth.report(gm)
    if as_json:
        show_json({"model": opened.name, "file": str(out), "resizes": list(found.resizes)})
        return
    _tell_of_missing_weights(opened)
    typer.echo(str(found))
    typer.echo(f"written to {out}")


def _within(target: fxwidth.Budget | None) -> dict[str, Any]:
    return {} if target is None else {"budget": target}


def _planning(
    ratio: float | None,
    min_width: str,
    align: int,
    only: list[str] | None,
    keep: list[str] | None,
    within: list[str] | None,
) -> dict[str, Any]:
    """Return the options of a plan that are given, but for budgets."""
    found: dict[str, Any] = {"min_width": number("--min-width", min_width, options.WIDTHS), "align": align}
    given = {"ratio": ratio, "only": only, "keep": keep, "within": within}
    return found | {name: value for name, value in given.items() if value not in (None, [])}


def _read_plan(path: Path) -> fxwidth.Plan:
    import fxwidth

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--plan {path} cannot be read: {error}") from error
    try:
        return fxwidth.Plan.from_json(text)
    except fxwidth.FxwidthError as error:
        raise InputError(f"--plan {path}: {error}") from error


def _tell_of_missing_weights(opened: Opened) -> None:
    if not opened.has_values:
        typer.echo("no trained weights were given: only sizes are told by this; see --weights", err=True)


def add_to(app: typer.Typer) -> None:
    """Add the commands to an application."""
    for command, examples in ((plan, PLAN_EXAMPLES), (evolve, EVOLVE_EXAMPLES)):
        app.command(epilog=options.epilog(examples))(command)
