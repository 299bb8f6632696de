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
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import fxwidth
from benchmarks.support.children import in_child
from benchmarks.support.machine import machine
from benchmarks.support.measures import GIB, Clock, exponent, peak, told
from benchmarks.support.results import options_of, write
from benchmarks.support.tables import header, heading, line
from fxwidth.evolution.evolver import parameter_count

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
    before = peak() / GIB
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=layers, **LLAMA)).eval()
    tokens = torch.zeros(2, TOKENS, dtype=torch.int64, device="meta")
    result: dict[str, Any] = {"layers": layers, "before": parameter_count(model), "gib_at_start": before}
    clock = Clock()
    gm = fxwidth.trace(model, {"input_ids": tokens})
    result["trace"] = clock.read()
    graph = fxwidth.analyze(gm)
    result["analyze"] = clock.read()
    halves = {group.name: max(group.least.width, group.width // 2) for group in graph.free}
    result |= {"ops": len(graph.analysis.calls), "groups": len(graph.groups), "free": len(graph.free)}
    del graph
    clock.read()
    fxwidth.resize(gm, halves)
    result["resize"] = clock.read()
    after = {group.name: group.width for group in fxwidth.analyze(gm).groups}
    left = [name for name, width in halves.items() if after.get(name) != width]
    if left:
        raise SystemExit(f"{len(left)} groups are not halved, among them {left[0]}")
    return result | {"after": parameter_count(gm), "gib": peak() / GIB}


def render(rows: list[dict[str, Any]], facts: dict[str, str]) -> str:
    """Return the results as markdown."""
    lines = heading("A llama of 70 billion parameters on the meta device", facts)
    lines += ["CPU seconds of one thread (wall seconds in brackets); memory is the peak of the whole process.", ""]
    stages = ("trace", "analyze", "halve every free group", "all")
    lines += header("layers", "parameters", "ops", "free groups", *stages, "left", "memory")
    for row in rows:
        whole = {kind: sum(row[stage][kind] for stage in STAGES) for kind in ("cpu", "wall")}
        times = [told(row[stage]) for stage in STAGES]
        counts = [f"{row['before'] / 1e9:.1f}e9", row["ops"], row["free"]]
        left = f"{row['after'] / row['before']:.1%}"
        lines.append(line(row["layers"], *counts, *times, told(whole), left, f"{row['gib']:.2f} GiB"))
    layers = [row["layers"] for row in rows]
    grown = [f"{stage} layers^{exponent(layers, [row[stage]['cpu'] for row in rows]):.2f}" for stage in STAGES]
    return "\n".join([*lines, "", f"Growth, fitted by least squares over all rows: {', '.join(grown)}."]) + "\n"


def main() -> None:
    """Run all cases, each in a process of its own, and write the results; or one case."""
    parser = options_of(__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    facts = machine("torch", "transformers")
    rows = []
    for layers in options.layers:
        rows.append(in_child(__file__, "--measure", layers))
        print(rows[-1], flush=True)
    write("giants", render(rows, facts), {"machine": facts, "cases": rows}, options.results)


if __name__ == "__main__":
    main()
