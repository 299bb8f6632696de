"""Of the models of the field, how many can be halved without a word of code for them, and how many of those rightly?

    python benchmarks/coverage.py torchvision --jobs 2              # or timm, transformers
    python benchmarks/coverage.py torchvision --only 'swin*'        # a part, put into the last result

Every model with random weights: trace, analyse, halve every free group, run, compare with the replay oracle; the graph
beside the model in both modes and at another batch size, and the model's state before and after. Beside it
Torch-Pruning's first example. Each model has a process of its own with a bound on time and memory. Writes a JSON
and a markdown table to benchmarks/results/; a model that was right in the last result and is no more is a failure.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib.metadata
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.coverage_cases import names
from benchmarks.coverage_check import check_to_file
from benchmarks.coverage_modes import COLUMNS, RIGHT, summed_up
from benchmarks.support.results import RESULTS, read_record, write_record
from benchmarks.support.tables import header, line

TOOLS = ("fxwidth", "torch-pruning")
GOOD = {"fxwidth": "right", "torch-pruning": "runs"}
Row = dict[str, Any]

# Each model has a process of its own, forked from one that has imported everything.
_PROCESSES = multiprocessing.get_context("forkserver")


def main() -> None:
    """Run a sweep, print it, and write it down if it was a whole one."""
    options = _parse_options()
    os.environ["OMP_NUM_THREADS"] = "1"
    suite = options.suite
    _PROCESSES.set_forkserver_preload(["benchmarks.coverage_check", "torch._dynamo", "torchvision", suite])
    chosen = [name for name in names(suite) if fnmatch.fnmatch(name, options.only)]
    known = _known(suite)
    if options.only == "missing":
        chosen = [name for name in names(suite) if not _was_right(known.get(name))]
    chosen = [name for name in chosen if not any(fnmatch.fnmatch(name, pattern) for pattern in options.skip)]
    rows = {name: row for name, row in known.items() if name in names(suite)}
    with ThreadPoolExecutor(options.jobs) as pool:
        for name, row in zip(chosen, pool.map(lambda n: _row(suite, n, options), chosen), strict=True):
            rows[name] = known.get(name, {}) | row
            _write(suite, dict(sorted(rows.items())))
    print(_summary(rows))
    lost = [name for name in chosen if _was_right(known.get(name)) and not _was_right(rows[name])]
    if lost:
        raise SystemExit(f"lost since the last result: {', '.join(lost)}")


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=["torchvision", "timm", "transformers"])
    parser.add_argument("--only", default="*", help="a pattern of model names, or 'missing'")
    parser.add_argument("--skip", nargs="*", default=[], help="patterns of model names")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10, help="bound per model")
    parser.add_argument("--gigabytes", type=float, default=10, help="bound per model")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS, help="what is not named keeps its rows")
    return parser.parse_args()


def _row(suite: str, name: str, options: argparse.Namespace) -> Row:
    row = {tool: _run(tool, suite, name, options) for tool in options.tools}
    print(name, " | ".join(_told(tool, result) for tool, result in row.items()), flush=True)
    return row


def _run(tool: str, suite: str, name: str, options: argparse.Namespace) -> Row:
    """Run one model in a process of its own and return what it found, or how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        process = _PROCESSES.Process(target=check_to_file, args=(tool, suite, name, str(out)))
        process.start()
        bound = _watch(process, options)
        if bound:
            return {"status": bound}
        if not out.exists():
            return {"status": "crashed", "reason": f"exit {process.exitcode}"}
        result: Row = json.loads(out.read_text())
    return result


def _watch(process: BaseProcess, options: argparse.Namespace) -> str | None:
    deadline = time.monotonic() + 60 * options.minutes
    while process.is_alive():
        process.join(0.2)
        if time.monotonic() > deadline:
            process.kill()
            return "out of time"
        if _gigabytes(process.pid) > options.gigabytes:
            process.kill()
            return "out of memory"
    return None


def _gigabytes(pid: int | None) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def _told(tool: str, result: Row) -> str:
    share = f" {_share(result):.0%}" if "parameters_after" in result else ""
    detail = result.get("reason") or (f"difference {result['difference']:.0e}" if "difference" in result else "")
    return f"{tool}: {result['status']}{share} {detail}".rstrip()


def _share(result: Row) -> float:
    return float(result["parameters_after"] / result["parameters"])


def _was_right(row: Row | None) -> bool:
    return row is not None and row.get("fxwidth", {}).get("status") == GOOD["fxwidth"]


def _summary(rows: dict[str, Row]) -> str:
    lines = []
    for tool in TOOLS:
        results = [row[tool] for row in rows.values() if tool in row]
        good = sum(result["status"] == GOOD[tool] for result in results)
        if results:
            lines.append(f"{tool}: {good} of {len(results)} {GOOD[tool]}")
    checked = [row["fxwidth"]["checks"] for row in rows.values() if "checks" in row.get("fxwidth", {})]
    for column in COLUMNS if checked else ():
        counts = Counter(summed_up(words, column) for words in checked)
        wrong = sum(count for cell, count in counts.items() if cell.startswith("wrong"))
        others = [f"{count} {cell}" for cell, count in sorted(counts.items()) if cell and not cell.startswith("wrong")]
        lines.append(f"{column}: {', '.join([*others, f'{wrong} wrong'])}")
    return "\n".join(lines)


def _known(suite: str) -> dict[str, Row]:
    return dict((read_record(f"coverage-{suite}") or {"rows": {}})["rows"])


def _write(suite: str, rows: dict[str, Row]) -> None:
    packages = ("torch", "torchvision", "timm", "transformers", "torch-pruning")
    # Of a tool that is not installed the rows are the earlier ones, and so is its version.
    known = (read_record(f"coverage-{suite}") or {}).get("versions", {})
    found = {package: _version(package) or known.get(package) for package in packages}
    versions = {package: version for package, version in found.items() if version is not None}
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, 1 thread per model"
    content = {"machine": machine, "versions": versions, "rows": rows}
    write_record(f"coverage-{suite}", content)
    (RESULTS / f"coverage-{suite}.md").write_text(_markdown(suite, rows, machine, versions))


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _markdown(suite: str, rows: dict[str, Row], machine: str, versions: dict[str, str]) -> str:
    ours = ("fxwidth", "parameters left", "difference", "analyze, s", "pinned groups", *COLUMNS)
    columns = ("model", *ours, "Torch-Pruning", "left")
    head = [
        f"# Coverage: {suite}",
        "",
        f"{machine}; {', '.join(f'{package} {version}' for package, version in versions.items())}.",
        "Every free group halved, random weights. *right*: runs, keeps the shapes of its outputs and agrees with the",
        "replay oracle, and all checks hold; detectors scale images to 256 pixels. Torch-Pruning: the first example of",
        "its README; *runs* says nothing of values.",
        "",
        "- *state*: `trace` and `analyze` leave every tensor, attribute, container and random state of the model as it",
        "  was, and the graph has all its parameters and buffers by their names.",
        "- *modes*: the graph is the model in `eval()` (twice: equal to the bit) and in `train()` (outputs with the",
        "  same noise, buffers written), traced in eval and traced in train; the resized graph has finite gradients.",
        "- *other batch*: three rows instead of two: before the resize the graph is the model, after it each row is as",
        "  it is in another batch.",
        "- *model itself*: the model does not run so, or is not the same twice. *told*: `trace` warned of it.",
        "",
        *(f"- {line}" for line in _summary(rows).splitlines()),
        "",
        *header(*columns),
    ]
    lines = [_line(name, row) for name, row in rows.items()]
    return "\n".join([*head, *lines, *_pins(rows), *_exceptions(rows)]) + "\n"


def _line(name: str, row: Row) -> str:
    ours, theirs = (row.get(tool, {"status": ""}) for tool in TOOLS)
    left = [f"{_share(result):.1%}" if "parameters_after" in result else "" for result in (ours, theirs)]
    difference = f"{ours['difference']:.0e}" if "difference" in ours else ""
    analyze = ours.get("seconds", {}).get("analyze", "")
    pinned = f"{ours['pinned']} of {ours['pinned'] + ours['free']}" if "pinned" in ours else ""
    checks = [summed_up(ours.get("checks", {}), column) for column in COLUMNS]
    cells = [name, ours["status"], left[0], difference, analyze, pinned, *checks, theirs["status"], left[1]]
    return line(*cells)


def _pins(rows: dict[str, Row]) -> list[str]:
    """Return what is said of the models that were refused, or kept wider than Torch-Pruning keeps them."""
    lines = []
    for name, row in rows.items():
        ours, theirs = row.get("fxwidth", {"status": ""}), row.get("torch-pruning", {})
        if ours["status"] != GOOD["fxwidth"]:
            lines.append(f"- {name}: {ours['status']}: {ours.get('reason', ours.get('pinned_reasons', ''))}")
        elif theirs.get("status") == "runs" and _share(ours) > _share(theirs) + 1e-3:
            reasons = "; ".join(f"{count} x {reason}" for reason, count in ours["pinned_reasons"])
            lines.append(f"- {name}: {_share(ours):.1%} left, Torch-Pruning {_share(theirs):.1%}; pinned: {reasons}")
    return ["", "## Refused, or with more left than by Torch-Pruning", "", *lines] if lines else []


def _exceptions(rows: dict[str, Row]) -> list[str]:
    """Return what the checks say of models that are right, but not held to all of them."""
    lines = []
    for name, row in rows.items():
        words = row.get("fxwidth", {}).get("checks", {}) if _was_right(row) else {}
        lines += [f"- {name}: {check}: {word}" for check, word in words.items() if word != RIGHT]
    return ["", "## Not held to every check", "", *lines] if lines else []


if __name__ == "__main__":
    main()
