"""What does a resize by magnitude cost, from the model to the smaller one, beside Torch-Pruning's?

    python benchmarks/resize_cost.py

Half of the channels of every free group go, without folding. Ours is `trace`, `analyze` and `resize`; Torch-Pruning's
is `MagnitudePruner` with its dependency graph, and one step at half of the channels. Every run is a process of its own
with one thread, in turns. The figures are CPU seconds, so that other work on the machine does not count: of the first
run in a process, as a user has it, and the best of those after it. Writes a JSON and a markdown table to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import fxwidth
from benchmarks.machine import one_thread

RESULTS = Path(__file__).parent / "results"
MODELS = ("resnet18", "resnet50")
SIZE = 224
TURNS, REPEATS = 3, 3
_COLUMNS = [(key, who) for key in ("first", "later") for who in ("fxwidth", "Torch-Pruning")]


def build(name: str) -> tuple[nn.Module, Tensor]:
    """Return a model in eval mode, and an input for it."""
    torch.manual_seed(0)
    models = importlib.import_module("torchvision.models")
    return models.get_model(name, weights=None).eval(), torch.randn(1, 3, SIZE, SIZE)


def shrink(model: nn.Module, example: Tensor) -> int:
    """Halve all free groups; return how many parameters are left."""
    gm = fxwidth.trace(model, example)
    widths = {group.name: max(1, group.width // 2) for group in fxwidth.analyze(gm).free}
    fxwidth.resize(gm, widths, selection="magnitude", fold=False)
    return sum(parameter.numel() for parameter in gm.parameters())


def prune(model: nn.Module, example: Tensor) -> int:
    """Do so with Torch-Pruning, as its documentation shows."""
    pruning = importlib.import_module("torch_pruning")
    classifier = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 1000]
    importance = pruning.importance.MagnitudeImportance(p=2)
    pruner = pruning.pruner.MagnitudePruner(model, example, importance, pruning_ratio=0.5, ignored_layers=classifier)
    pruner.step()
    return sum(parameter.numel() for parameter in model.parameters())


def measure(name: str, who: str) -> dict[str, Any]:
    """Time one contestant, in this process."""
    torch.set_num_threads(1)
    times, left = [], 0
    for _ in range(1 + REPEATS):
        model, example = build(name)
        start = time.process_time()
        left = {"fxwidth": shrink, "torch_pruning": prune}[who](model, example)
        times.append(time.process_time() - start)
    return {"first": times[0], "later": min(times[1:]), "parameters": left}


def in_child(name: str, who: str) -> dict[str, Any]:
    """Time one contestant in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--measure", name, who]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


def run_case(name: str) -> dict[str, Any]:
    """Time both contestants in turns; return medians over the turns."""
    runs: dict[str, list[dict[str, Any]]] = {"fxwidth": [], "torch_pruning": []}
    for _ in range(TURNS):
        for who, found in runs.items():
            found.append(in_child(name, who))
    row: dict[str, Any] = {"model": name}
    for who, found in runs.items():
        row[who] = {key: statistics.median(run[key] for run in found) for key in ("first", "later", "parameters")}
    return row


def render(rows: list[dict[str, Any]], machine: dict[str, str]) -> str:
    """Return the results as markdown."""
    lines = ["# The cost of a resize by magnitude", "", *(f"- {name}: {value}" for name, value in machine.items()), ""]
    lines += [f"CPU seconds for one image of {SIZE} x {SIZE}; half of the channels of every free group go."]
    lines += ["First is the first run in a process, later the best of those after it; medians over processes.", ""]
    lines += [
        "| model | fxwidth, first | Torch-Pruning, first | ratio | fxwidth, later | Torch-Pruning, later | ratio |"
    ]
    lines += ["|---" * 7 + "|"]
    for row in rows:
        cells = [row["model"]]
        for key in ("first", "later"):
            own, other = row["fxwidth"][key], row["torch_pruning"][key]
            cells += [f"{own:.2f}", f"{other:.2f}", f"{own / other:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all cases and write the results, or one case in the role of a child."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    rows = []
    for name in MODELS:
        rows.append(run_case(name))
        print(rows[-1], flush=True)
    machine = one_thread()
    options.results.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine, "cases": rows}
    (options.results / "resize-cost.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    table = render(rows, machine)
    (options.results / "resize-cost.md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
