"""How many classes of the field hold a joint plan to half their parameters, outputs equal to the graph's?

    python benchmarks/modules.py torchvision            # or timm, transformers
    python benchmarks/modules.py timm --only 'test_*'   # a part

Every model with random weights: traced, planned by `fxwidth.plan(graph, params=0.5, for_module=model)`, resized, and
written back to the model itself, a fresh one and one on the meta device; models of transformers are saved and loaded
too. Each model has a process of its own. The record is written after each, and a run goes on from it: models that are
there already are left out, but those that crashed. Writes JSON and a markdown table to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.module_cases import names
from benchmarks.support.results import RESULTS, read_record, write_record
from benchmarks.support.tables import header, line

SUITES = ("torchvision", "timm", "transformers")
Row = dict[str, Any]


def main() -> None:
    """Run a suite, or a part of one, and write down what came of it after each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--only", default="*", help="a pattern of model names")
    parser.add_argument("--again", action="store_true", help="models that are on record too")
    parser.add_argument("--minutes", type=float, default=10, help="bound per model")
    options = parser.parse_args()
    for name in names(options.suite):
        rows = _rows()
        known = rows.setdefault(options.suite, {}).get(name)
        if not fnmatch.fnmatch(name, options.only) or (_is_done(known) and not options.again):
            continue
        row = _row(options.suite, name, options.minutes)
        print(name, _told(row), flush=True)
        rows = _rows()
        rows.setdefault(options.suite, {})[name] = row
        _write(rows)


def _row(suite: str, name: str, minutes: float) -> Row:
    """Check one model in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.module_check", suite, name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=60 * minutes,
            cwd=Path(__file__).parent.parent,
            env=environment,
            check=False,
        )
        row: Row = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"status": "out of time", "reason": f"more than {minutes} minutes"}
    except (IndexError, ValueError):
        return {"status": "crashed", "reason": f"exit {done.returncode}: {done.stderr[-300:]}"}
    return row


def _rows() -> dict[str, dict[str, Row]]:
    return dict((read_record("modules") or {"rows": {}})["rows"])


def _told(row: Row) -> str:
    return f"{row['status']} at {row.get('share')}: {row.get('reason', row.get('targets', ''))}"[:300]


def _is_done(row: Row | None) -> bool:
    return row is not None and row["status"] not in ("crashed", "out of time")


def _is_half(row: Row) -> bool:
    return bool(row["status"] == "right" and row["share"] == 0.5)


def _write(rows: dict[str, dict[str, Row]]) -> None:
    packages = ("torch", "torchvision", "timm", "transformers")
    versions = {package: importlib.metadata.version(package) for package in packages}
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, 1 thread per model"
    ordered = {suite: dict(sorted(rows[suite].items())) for suite in SUITES if suite in rows}
    write_record("modules", {"machine": machine, "versions": versions, "rows": ordered})
    told = ", ".join(f"{package} {version}" for package, version in versions.items())
    lines = [
        "# Module in, module out",
        "",
        f"{machine}; {told}.",
        "Joint plans to half by `fxwidth.plan(graph, params=0.5, for_module=model)`, random weights,",
        "written back to classes: the model itself, a fresh one, one on the meta device; of transformers, one that",
        "was saved and loaded. *right*: all outputs equal those of the graph (1e-10 in float64, 1e-5 where a model",
        "runs in float32 alone). Where half is out of reach, as a size that must stay holds more, the share that is.",
        "",
    ]
    for suite, own in ordered.items():
        half, right = sum(map(_is_half, own.values())), sum(row["status"] == "right" for row in own.values())
        lines.append(
            f"- {suite}: {half} of {len(own)} hold half of their parameters, {right} that or the nearest share in reach"
            f" ({len(names(suite)) - len(own)} not run)"
        )
    for suite, own in ordered.items():
        lines += ["", f"## {suite}", "", *header("model", "status", "share", "parameters", "after", *_TARGETS, "s")]
        lines += [_line(name, row) for name, row in own.items()]
        reasons = [(name, row.get("reason") or row.get("at_half")) for name, row in own.items() if not _is_half(row)]
        lines += ["", *(f"- {name}: {reason}" for name, reason in reasons)]
    (RESULTS / "modules.md").write_text("\n".join(lines) + "\n")


_TARGETS = ("itself", "fresh", "meta", "loaded")


def _line(name: str, row: Row) -> str:
    targets = [row.get("targets", {}).get(kind, "") for kind in _TARGETS]
    seconds = round(sum(row.get("seconds", {}).values()))
    share, before, after = row.get("share", ""), row.get("parameters", ""), row.get("parameters_after", "")
    return line(name, row["status"], share, before, after, *(cell.partition(":")[0] for cell in targets), seconds)


if __name__ == "__main__":
    main()
