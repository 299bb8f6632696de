"""The files in which a benchmark leaves what it found."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


def write(name: str, table: str, record: Any = None, folder: Path = RESULTS) -> None:
    """Write a markdown table, and a record beside it as JSON, and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    if record is not None:
        write_record(name, record, folder)
    (folder / f"{name}.md").write_text(table, encoding="utf-8")
    print(table)


def write_record(name: str, record: Any, folder: Path = RESULTS) -> None:
    """Write a record as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_record(name: str, folder: Path = RESULTS) -> Any:
    """Return a record that was written, or None."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def earlier_runs(name: str, facts: Mapping[str, str], folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Return the runs of a record, which a benchmark goes on from.

    Args:
        name: that of the record.
        facts: the circumstances of the runs that are to come; those of the record have to be the same.
        folder: where the record lies.
    """
    before = read_record(name, folder)
    if before is None:
        return []
    if before["machine"] != facts:
        raise SystemExit(f"the record is of {before['machine']}, and this would be of {facts}: leave out --resume")
    runs: list[dict[str, Any]] = before["runs"]
    return runs


def options_of(text: str | None) -> argparse.ArgumentParser:
    """Return a parser of the command line with the options that all benchmarks have; the text is the file's own."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    return parser
