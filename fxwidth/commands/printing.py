"""Output: tables in a terminal, plain columns in a pipe, or JSON."""

from __future__ import annotations

import json
from typing import Any

import typer

from fxwidth.tables import Table


def show(title: str, table: Table) -> None:
    """Print a table below a title: fitted to a terminal, or as it is where there is none."""
    from rich import box
    from rich import table as rich_tables
    from rich.console import Console
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        typer.echo("\n".join([*([title] if title else []), str(table), ""]))
        return
    drawn = rich_tables.Table(box=box.SIMPLE_HEAD, title=Text(title, style="bold"), title_justify="left")
    for i, name in enumerate(table.columns):
        drawn.add_column(Text(name), justify="right" if table.is_numeric(i) else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    for line in table.above:
        console.print(Text(line))
    if table.rows:
        console.print(drawn)
    for line in table.below:
        console.print(Text(line))


def show_json(data: Any) -> None:
    """Print plain data as JSON."""
    typer.echo(json.dumps(data, indent=2))
