"""What does it take to analyse and halve a language model of 70 billion parameters that has no values?

    python benchmarks/giants.py

The model is llama's largest configuration of its second generation (grouped-query attention, 80 layers), on the meta
device: parameters have shapes and types alone. It is traced, analysed, and every free group is halved, in one process
with one thread; fewer layers show how the cost grows. Times are CPU and wall seconds; memory is the process's peak.
Writes a JSON and a markdown table to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fxwidth

RESULTS = Path(__file__).parent / "results"
LAYERS = (10, 20, 40, 80)
TOKENS = 16
STAGES = ("trace", "analyze", "resize")
LLAMA = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}


def measure(layers: int) -> dict[str, Any]:
    """Trace, analyse and halve a llama with so many layers, in this process."""
    transformers = importlib.import_module("transformers")
    torch.set_num_threads(1)
    before = _peak_gib()
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=layers, **LLAMA)).eval()
    tokens = torch.zeros(2, TOKENS, dtype=torch.int64, device="meta")
    result: dict[str, Any] = {"layers": layers, "before": _count(model), "gib_at_start": before}
    clock = _Clock(result)
    gm = fxwidth.trace(model, {"input_ids": tokens})
    clock.ends("trace")
    graph = fxwidth.analyze(gm)
    clock.ends("analyze")
    halves = {group.name: max(group.least.width, group.width // 2) for group in graph.free}
    result |= {"ops": len(graph.analysis.calls), "groups": len(graph.groups), "free": len(graph.free)}
    del graph
    clock.starts()
    fxwidth.resize(gm, halves)
    clock.ends("resize")
    after = {group.name: group.width for group in fxwidth.analyze(gm).groups}
    left = [name for name, width in halves.items() if after.get(name) != width]
    if left:
        raise SystemExit(f"{len(left)} groups are not halved, among them {left[0]}")
    return result | {"after": _count(gm), "gib": _peak_gib()}


class _Clock:
    def __init__(self, result: dict[str, Any]) -> None:
        self._result = result
        self.starts()

    def starts(self) -> None:
        """Begin a stage."""
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def ends(self, stage: str) -> None:
        """Note what a stage took; the next begins."""
        self._result[stage] = time.process_time() - self._cpu
        self._result[f"{stage}_wall"] = time.perf_counter() - self._wall
        self.starts()


def _count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def exponent(rows: list[dict[str, Any]], stage: str) -> float:
    """Return the slope of log time over log layers, by least squares."""
    slope, _ = np.polyfit([log(row["layers"]) for row in rows], [log(row[stage]) for row in rows], 1)
    return float(slope)


def render(rows: list[dict[str, Any]], machine: dict[str, str]) -> str:
    """Return the results as markdown."""
    lines = ["# A llama of 70 billion parameters on the meta device", ""]
    lines += [f"- {name}: {value}" for name, value in machine.items()]
    lines += ["", "CPU seconds of one thread (wall seconds in brackets); memory is the peak of the whole process.", ""]
    header = "layers | parameters | ops | free groups | trace | analyze | halve every free group | all | left | memory"
    lines += [f"| {header} |", "|---" * 10 + "|"]
    for row in rows:
        stages = [f"{row[stage]:.1f} ({row[f'{stage}_wall']:.1f})" for stage in STAGES]
        total = f"{sum(row[stage] for stage in STAGES):.1f} ({sum(row[f'{stage}_wall'] for stage in STAGES):.1f})"
        counts = [f"{row['before'] / 1e9:.1f}e9", f"{row['ops']:,}", f"{row['free']:,}"]
        left = f"{row['after'] / row['before']:.1%}"
        cells = [str(row["layers"]), *counts, *stages, total, left, f"{row['gib']:.2f} GiB"]
        lines.append(f"| {' | '.join(cells)} |")
    told = ", ".join(f"{stage} layers^{exponent(rows, stage):.2f}" for stage in STAGES)
    return "\n".join([*lines, "", f"Growth, fitted by least squares over all rows: {told}."]) + "\n"


def _machine(load: float) -> dict[str, str]:
    versions = {"fxwidth": fxwidth.__version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in ("torch", "transformers")}
    cores = f"{os.cpu_count()} cores, CPU, one thread; load average {load:.1f} when the run began"
    return {"machine": cores} | versions


def main() -> None:
    """Run all cases, each in a process of its own, and write the results; or one case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    machine = _machine(os.getloadavg()[0])
    rows = []
    for layers in options.layers:
        command = [sys.executable, str(Path(__file__).resolve()), "--measure", str(layers)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    options.results.mkdir(parents=True, exist_ok=True)
    record = json.dumps({"machine": machine, "cases": rows}, indent=1)
    (options.results / "giants.json").write_text(record + "\n", encoding="utf-8")
    table = render(rows, machine)
    (options.results / "giants.md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
