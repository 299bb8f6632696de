"""How many small faults, planted one at a time, do the tests find?

    python benchmarks/faults.py --jobs 2                # all of benchmarks/fault_cases.py
    python benchmarks/faults.py --only 'resizing*'      # those of some files

Each fault is put into a copy of the sources, in which the tests run until one fails: first those that stand nearest to
the fault, then all that are not slow. A fault that no test finds survives. Writes a markdown table to
benchmarks/results/, and fails if fewer than nine tenths are found.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.fault_cases import FAULTS, Fault
from benchmarks.support.results import write
from benchmarks.support.tables import header, line

ROOT = Path(__file__).parent.parent
_COPIED = ("fxwidth", "passes", "tests", "benchmarks", "pyproject.toml", "README.md", "docs")
_FAILED_TEST = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)
_NEEDED = 0.9


@dataclass(frozen=True)
class Outcome:
    """What became of a fault: the test that found it, or None."""

    fault: Fault
    found_by: str | None
    seconds: float


def main() -> None:
    """Plant all faults, print what is found, and write it down."""
    options = _parse_options()
    chosen = [fault for fault in FAULTS if fnmatch.fnmatch(fault.file, f"*{options.only}")]
    for fault in chosen:
        check(fault)
    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = list(pool.map(lambda fault: _told(plant(fault, options.nearest)), chosen))
    table = render(outcomes)
    if len(chosen) == len(FAULTS) and not options.nearest:
        write("faults", table)
    else:
        print(table)
    if sum(outcome.found_by is not None for outcome in outcomes) < _NEEDED * len(outcomes):
        raise SystemExit("fewer than nine tenths of the faults were found")


def check(fault: Fault) -> None:
    """Check that a fault can be planted: what it replaces stands exactly once in its file."""
    count = (ROOT / fault.file).read_text(encoding="utf-8").count(fault.old)
    if count != 1:
        raise SystemExit(f"{fault.file} holds {fault.old!r} {count} times, not once")


def plant(fault: Fault, only_nearest: bool) -> Outcome:
    """Run the tests on a copy of the sources with a fault in it."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in _COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        file = copy / fault.file
        file.write_text(file.read_text(encoding="utf-8").replace(fault.old, fault.new), encoding="utf-8")
        found_by = _first_failure(copy, [f"tests/{test}" for test in fault.tests])
        if found_by is None and not only_nearest:
            found_by = _first_failure(copy, [])
    return Outcome(fault, found_by, time.perf_counter() - started)


def _first_failure(copy: Path, tests: list[str]) -> str | None:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CI": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    if run.returncode == 0:
        return None
    failed = _FAILED_TEST.search(run.stdout)
    return failed[1] if failed else f"pytest ends with {run.returncode}"


def _told(outcome: Outcome) -> Outcome:
    found = outcome.found_by or "SURVIVES"
    print(f"{outcome.fault.file}: {outcome.fault.what}: {found} ({outcome.seconds:.0f} s)", flush=True)
    return outcome


def render(outcomes: list[Outcome]) -> str:
    """Return the outcomes as markdown."""
    found = sum(outcome.found_by is not None for outcome in outcomes)
    versions = f"torch {version('torch')}, Python {sys.version.split()[0]}"
    lines = [
        "# Faults planted by hand, one at a time",
        "",
        f"{versions}. {found} of {len(outcomes)} are found by the tests that are not slow.",
        "",
        *header("file", "fault", "found by"),
    ]
    lines += [line(o.fault.file, o.fault.what, o.found_by or "**none**") for o in outcomes]
    return "\n".join(lines) + "\n"


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="a pattern of file names")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--nearest", action="store_true", help="run the nearest tests alone, and write no table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
