"""The arguments and options that commands share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxwidth.commands.faults import STATUSES, InputError
from fxwidth.commands.input_texts import bound
from fxwidth.commands.models import Source

if TYPE_CHECKING:
    import fxwidth

_MODEL_HELP = (
    "torchvision:NAME, timm:NAME, hf:NAME (or a folder, or a config.json), ultralytics:FILE.yaml, a file of "
    "fxwidth.save, or package.module:function."
)

Model = Annotated[str, typer.Argument(help=_MODEL_HELP, show_default=False)]
Inputs = Annotated[
    list[str] | None,
    typer.Option("--input", help="Shape of an input, as 1x3x224x224, 1x16:int64 or name=1x16; one for each input."),
]
Weights = Annotated[
    str | None, typer.Option(help="'default' for the library's trained weights, or the file of a state dict.")
]
Architecture = Annotated[
    str | None, typer.Option(help="The model that a .safetensors file of fxwidth.save belongs to.")
]
Trusted = Annotated[bool, typer.Option("--trusted", help="Read a .pt file, which can run any code.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Params = Annotated[str | None, typer.Option(help="Parameters: a count, or a part of the present ones, as 0.5.")]
Flops = Annotated[str | None, typer.Option(help="Operations of a forward pass: a count, or a part.")]
ActivationMemory = Annotated[str | None, typer.Option(help="Bytes kept for the backward pass: a count, or a part.")]
Latency = Annotated[str | None, typer.Option(help="Microseconds of a forward pass: a count, or a part.")]
Data = Annotated[
    str | None,
    typer.Option(help="Batches to look at: a .pt file of tensors, a folder of images, or package.module:function."),
]
Only = Annotated[
    list[str] | None, typer.Option(help="Names or patterns, as inspect shows them, of groups that may change.")
]
Keep = Annotated[list[str] | None, typer.Option(help="Likewise of groups that must not.")]
WIDTHS = "a whole number, such as 8, or one with a point for a part of the first width, such as 0.1"
MinWidth = Annotated[str, typer.Option(help="No group gets below this: a width, or a part of the first, as 0.1.")]
Ratio = Annotated[float | None, typer.Option(help="The part of its channels that every group keeps, as 0.5.")]
Within = Annotated[list[str] | None, typer.Option(help="Paths or patterns of modules: nothing outside changes.")]
Align = Annotated[int, typer.Option(help="Widths are multiples of this.")]
Frontier = Annotated[
    bool,
    typer.Option("--frontier", help="Plan for many budgets at once: bounds are lists, as --params 0.9,0.75,0.5,0.25."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")]
# The parts of the parameters that a frontier is of where nothing else is typed.
_SHARES = (0.9, 0.75, 0.5, 0.25)


def epilog(examples: Sequence[str]) -> str:
    """Return the end of a command's help: its examples, and what its exit status says."""
    return "\n\n".join(["Examples:", *examples, STATUSES])


def source(
    model: str, inputs: list[str] | None, weights: str | None, architecture: str | None, trusted: bool
) -> Source:
    """Return how a model is named."""
    return Source(model, tuple(inputs or ()), weights, architecture, trusted)


def budget(params: str | None, flops: str | None, memory: str | None, latency: str | None) -> fxwidth.Budget | None:
    """Return the budget that is typed, or None where nothing is bounded.

    Raises:
        InputError: a bound is no number.
        FxwidthError: it is out of range.
    """
    import fxwidth

    texts = _texts(params, flops, memory, latency)
    bounds = {name: bound(_option(name), text) for name, text in texts.items()}
    given: dict[str, Any] = {name: value for name, value in bounds.items() if value is not None}
    return fxwidth.Budget(**given) if given else None


def refuse_lists(*texts: str | None) -> None:
    """Check that no bound is a list, where there is one plan.

    Raises:
        InputError: one is.
    """
    for text in texts:
        if text is not None and "," in text:
            raise InputError(f"{text} are bounds for several plans; add --frontier for one plan for each.")


def frontier_bounds(
    params: str | None, flops: str | None, memory: str | None, latency: str | None
) -> dict[str, int | float | list[int | float]]:
    """Return the bounds of a frontier: those typed with commas are lists, and others are for all plans.

    Raises:
        InputError: one is no number.
    """
    found: dict[str, int | float | list[int | float]] = {}
    for name, text in _texts(params, flops, memory, latency).items():
        if text is not None:
            numbers = [one for part in text.split(",") if part and (one := bound(_option(name), part)) is not None]
            found[name] = numbers if "," in text else numbers[0]
    return found or {"params": list(_SHARES)}


def _texts(params: str | None, flops: str | None, memory: str | None, latency: str | None) -> dict[str, str | None]:
    return {"params": params, "flops": flops, "activation_memory": memory, "latency": latency}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def refuse_unwritable(path: Path | None, *, overwrite: bool, option: str = "--out") -> None:
    """Check that a file can be written, before the work.

    Raises:
        InputError: its folder is missing, or it is there and not to be replaced.
    """
    if path is None:
        return
    if not path.parent.is_dir():
        raise InputError(f"{option} {path}: there is no folder {path.parent}; make it first.")
    if path.exists() and not overwrite:
        raise InputError(f"{option} {path} is there already; choose another name, or replace it with --overwrite.")
