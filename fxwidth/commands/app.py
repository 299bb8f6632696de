"""The typer application behind the `fxwidth` command; torch is imported by work alone."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from fxwidth.commands import changing, looking
from fxwidth.commands.options import epilog
from fxwidth.version import __version__

# The commands whose options cannot be known without torch: where they are, and what is told of them beside the others.
_LATE = {
    "train": (
        "fxwidth.training.command",
        "Evolve a network while it trains; Ctrl-C ends the training and keeps what it has reached.",
    )
}


class LateGroup(TyperGroup):
    """A group of commands of which some are imported when they are called."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands."""
        return [*super().list_commands(ctx), *_LATE]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command, or, of one that is imported late, what the list of commands shows of it."""
        if cmd_name in _LATE:
            return TyperCommand(cmd_name, help=_LATE[cmd_name][1])
        return super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that is called, imported."""
        name, command, rest = super().resolve_command(ctx, args)
        if name in _LATE:
            group: Any = get_command(import_module(_LATE[name][0]).app)
            command = group.commands[name]
        return name, command, rest


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fxwidth {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=LateGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Evolve the widths of PyTorch networks.",
    epilog=epilog(["fxwidth inspect torchvision:resnet18", "fxwidth COMMAND --help"]),
)
looking.add_to(app)
changing.add_to(app)


@app.callback()
def _fxwidth(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
