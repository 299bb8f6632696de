"""How is the package laid out, and what does `analyze` take, beside earlier states of both?

    git worktree add ../before COMMIT && python benchmarks/house.py --beside ../before

Each tree is measured in processes of its own, by the same script (house_counts.py). The trees take turns at `analyze`,
with one thread; its figures are medians of CPU milliseconds over all turns. Writes a JSON and a markdown table to
benchmarks/results/.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.support.children import in_child
from benchmarks.support.machine import machine
from benchmarks.support.results import options_of, write
from benchmarks.support.tables import header, heading, line

ROOT = Path(__file__).resolve().parent.parent
NETWORKS = ("resnet50", "vit_b_16", "swin_t", "convnext_tiny", "densenet201")
TURNS = 5
COUNTS = Path(__file__).with_name("house_counts.py")


def commit_of(tree: Path) -> str:
    """Return a tree's commit, and whether it has changed since."""
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=tree, capture_output=True, text=True, check=True
    )
    return told.stdout.strip()


def timed(trees: Sequence[Path], turns: int) -> dict[str, list[dict[str, float]]]:
    """Return of each network what each turn of each tree took."""
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in NETWORKS}
    for turn in range(turns):
        # Each turn begins with another tree: what warms or slows the machine must not count for one of them.
        order = [trees[(turn + i) % len(trees)] for i in range(len(trees))]
        found = {commit_of(tree): in_child(str(COUNTS), tree, "--time", *NETWORKS) for tree in order}
        for name in NETWORKS:
            taken[name].append({commit: times[name] for commit, times in found.items()})
        print(f"turn {turn + 1}: {found}", flush=True)
    return taken


def render(record: dict[str, Any]) -> str:
    """Return the results as markdown."""
    commits = list(record["counts"])
    lines = heading("The layout of the package, beside earlier ones", record["machine"])
    lines += header("", *commits)
    for name in record["counts"][commits[0]]:
        found = [record["counts"][commit][name] for commit in commits]
        lines.append(line(_label(name, found), *(len(one) if isinstance(one, dict) else one for one in found)))
    for kind in ("long functions", "long files"):
        last = record["counts"][commits[-1]][kind]
        named = ", ".join(f"{name.removeprefix('fxwidth/')} {size}" for name, size in last.items())
        lines += ["", f"{kind.capitalize()} of {commits[-1]}, in lines: {named or 'none'}."]
    lines += ["", "The width graph is followed while a small convolutional network is resized with data, call by call."]
    lines += ["A circle of imports counts as one module in the longest chain."]
    if record["times"]:
        lines += ["", "## `analyze`", "", "Medians of CPU milliseconds, with the least and the greatest turn.", ""]
        lines += header("network", *commits, f"{commits[-1]} / {commits[-2]}")
        for name, turns in record["times"].items():
            own = {commit: [turn[commit] for turn in turns] for commit in commits}
            cells = [f"{statistics.median(ms):.1f} ({min(ms):.1f} to {max(ms):.1f})" for ms in own.values()]
            ratio = statistics.median(own[commits[-1]]) / statistics.median(own[commits[-2]])
            lines.append(line(name, *cells, f"{ratio:.2f}"))
    return "\n".join(lines) + "\n"


def _label(name: str, found: Sequence[object]) -> str:
    limits = {"long functions": "functions of over 40 lines below docstring", "long files": "files of over 300 lines"}
    return limits[name] if isinstance(found[0], dict) else name


def main() -> None:
    """Measure this tree and those beside it."""
    parser = options_of(__doc__)
    parser.add_argument("--beside", type=Path, nargs="+", required=True, help="checkouts of earlier commits, in order")
    parser.add_argument("--turns", type=int, default=TURNS, help="turns of timing; 0 for counts alone")
    options = parser.parse_args()
    trees = [*(tree.resolve() for tree in options.beside), ROOT]
    counts = {commit_of(tree): in_child(str(COUNTS), tree) for tree in trees}
    facts = machine("torch", "torchvision", "networkx", "grimp")
    record = {"machine": facts, "counts": counts, "times": timed(trees, options.turns) if options.turns else {}}
    write("house", render(record), record, options.results)


if __name__ == "__main__":
    main()
