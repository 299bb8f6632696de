"""Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping


def heading(title: str, facts: Mapping[str, str]) -> list[str]:
    """Return the lines of a title and of a list of facts below it."""
    return [f"# {title}", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]


def header(*titles: str) -> list[str]:
    """Return the two lines with which a table begins."""
    return [line(*titles), "|---" * len(titles) + "|"]


def line(*cells: object) -> str:
    """Return one line of a table; whole numbers get commas."""
    return "| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells) + " |"
