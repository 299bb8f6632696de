"""What would it take to plan widths for language models of 7 and 70 billion parameters from data, on 8 GPUs?

    python benchmarks/scale.py

Both are llama configurations of the second generation on the meta device: parameters have shapes and types alone. They
are traced, analysed and planned under budgets of half of the parameters and half of the flops, in one process with one
thread each. What moments and eigenproblems would take is not measured but counted, by the formulas in the table, from
the probes and groups of the analysis. Writes a JSON and a markdown table to benchmarks/results/.
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
from benchmarks.giants import LLAMA
from benchmarks.support.children import in_child
from benchmarks.support.machine import machine
from benchmarks.support.measures import GIB, Clock, peak, told
from benchmarks.support.results import options_of, write
from benchmarks.support.tables import header, heading, line
from fxwidth.costs.registry import cost_polynomial
from fxwidth.evolution.evolver import parameter_count
from fxwidth.statistics.observation_points import Measure, find_probes
from fxwidth.weights.readers import wiring_of

BATCH, TOKENS, ALIGN = 2, 16, 64
MODELS: dict[str, dict[str, Any]] = {
    "7 billion": {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "70 billion": {"num_hidden_layers": 80},
}
# The machine that is assumed: of each of 8 GPUs the bytes of memory, the flops a second of bf16 products and of float32
# and float64 ones, and the bytes a second from one to another.
GPUS, MEMORY, HALF, FULL, LINK = 8, 80 * GIB, 3e14, 2e13, 2e11
# How many tokens are looked at: 1,024 samples of 2,048.
SEEN = 1024 * 2048
_TITLE = "Language models of {} parameters: planned without values, and counted with"
FORMULAS = """\
- sums: 8 Σ C² bytes, over the places where readers see C contracted channels (one sum in float64 per place)
- taking them: 2 N Σ C² flops in float32 for N rows, of which each GPU has an eighth; the forward passes beside, N times
  the flops of a token in bf16
- adding them over the ranks: 3 times their bytes over the link (an all-reduce passes each twice, a broadcast once)
- Gram matrices: 2 Σ n² m + n² flops, over the readers of a group of n channels with m outputs
- orders of channels, chosen one by one: 2 n³ flops a group; its spectrum, where that is asked for: 9 n³
- refitting readers to k = n / 2 channels: k³ / 3 + 2 k² n + 2 k n m flops a reader
"""


def measure(name: str) -> dict[str, Any]:
    """Trace, analyse and plan one model, in this process, and count what its moments would take."""
    transformers = importlib.import_module("transformers")
    torch.set_num_threads(1)
    config = transformers.LlamaConfig(**{**LLAMA, **MODELS[name]}, use_cache=False)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).eval()
    result: dict[str, Any] = {"model": name, "parameters": parameter_count(model), "plans": {}}
    clock = Clock()
    gm = fxwidth.trace(model, {"input_ids": torch.zeros(BATCH, TOKENS, dtype=torch.int64, device="meta")})
    result["trace"] = clock.read()
    graph = fxwidth.analyze(gm)
    result["analyze"] = clock.read()
    for budget in ("params", "flops"):
        plan = fxwidth.plan(graph, align=ALIGN, progress=False, **{budget: 0.5})  # type: ignore[arg-type]
        result["plans"][budget] = {
            "seconds": clock.read(),
            "groups": len(plan),
            "cost": {key: [int(before), int(after)] for key, (before, after) in plan.notes["cost"].items()},
        }
    return result | {"free": len(graph.free), "needs": needs(graph), "gib": peak() / GIB}


def needs(graph: fxwidth.WidthGraph) -> dict[str, float]:
    """Return the bytes and flops of moments and of what is computed from them, by the formulas."""
    probes = {probe.keys: probe for probe in find_probes(graph) if probe.measure is Measure.MOMENT}
    channels = [probe.call.arguments[probe.argument].shape[probe.dims[0]] for probe in probes.values()]
    wiring = wiring_of(graph)
    grams = orders = spectra = refits = largest = 0.0
    for group in graph.free:
        n, k = float(group.width), group.width / 2
        largest = max(largest, n)
        orders += 2 * n**3
        spectra += 9 * n**3
        for reader in wiring.readers:
            if group.factor not in graph.analysis.space.factors(reader.axis):
                continue
            outputs = reader.call.arguments[reader.weight].numel() / max(1, _size(graph, reader))
            grams += 2 * n * n * outputs + n * n
            refits += k**3 / 3 + 2 * k * k * n + 2 * k * n * outputs
    return {
        "sums": 8.0 * sum(c * c for c in channels),
        "places": float(len(channels)),
        "largest sum": 8.0 * max(channels) ** 2,
        "sums flops a row": 2.0 * sum(c * c for c in channels),
        "forward flops a token": float(cost_polynomial(graph, "flops")({})) / (BATCH * TOKENS),
        "grams": grams,
        "orders": orders,
        "spectra": spectra,
        "refits": refits,
        "largest group": largest,
    }


def _size(graph: fxwidth.WidthGraph, reader: Any) -> int:
    size = 1
    for factor in graph.analysis.space.factors(reader.axis):
        size *= int(factor.size)
    return size


def estimate(row: dict[str, Any]) -> dict[str, float]:
    """Return gibibytes and seconds on the machine that is assumed."""
    need = row["needs"]
    weights = 2.0 * row["parameters"]
    products = need["grams"] + need["orders"] + need["refits"]
    return {
        "weights": weights / GIB,
        "sums": need["sums"] / GIB,
        "sums of a rank, by group": need["sums"] / GPUS / GIB,
        "weights and sums, as it is": (weights + need["sums"]) / GIB,
        "weights and sums, all shared": (weights + need["sums"]) / GPUS / GIB,
        "forward": need["forward flops a token"] * SEEN / GPUS / HALF,
        "taking sums": need["sums flops a row"] * SEEN / GPUS / FULL,
        "adding sums": 3 * need["sums"] / LINK,
        "choosing, as it is": products / FULL,
        "choosing, by group": products / GPUS / FULL,
        "spectra, as it is": need["spectra"] / FULL,
    }


def render(rows: list[dict[str, Any]], facts: dict[str, str]) -> str:
    """Return the results as markdown."""
    lines = heading(_TITLE.format(" and ".join(row["model"] for row in rows)), facts)
    lines += ["CPU seconds of one thread (wall seconds in brackets); memory is the peak of the whole process.", ""]
    lines += header(
        "model", "parameters", "free groups", "trace", "analyze", "plan params=0.5", "plan flops=0.5", "memory"
    )
    for row in rows:
        plans = [told(row["plans"][budget]["seconds"]) for budget in ("params", "flops")]
        times = [told(row["trace"]), told(row["analyze"]), *plans]
        lines.append(line(row["model"], row["parameters"], row["free"], *times, f"{row['gib']:.2f} GiB"))
    lines += ["", *header("model", "budget", "groups that change", "parameters left", "flops left")]
    for row in rows:
        for budget, plan in row["plans"].items():
            left = [f"{after / before:.1%}" for before, after in (plan["cost"][key] for key in ("params", "flops"))]
            lines.append(line(row["model"], f"{budget}=0.5", plan["groups"], *left))
    lines += ["", "## Moments and eigenproblems on 8 GPUs: counted, not measured", ""]
    assumed = (
        f"Assumed: {GPUS} GPUs of {MEMORY / GIB:.0f} GiB, {HALF:.0e} flops a second in bf16, {FULL:.0e} in float32 "
        f"and float64, {LINK:.0e} bytes a second between them; {SEEN:,} tokens; weights in bf16."
    )
    lines += [
        assumed,
        "",
        FORMULAS,
        *header("", *(row["model"] for row in rows)),
    ]
    estimates = [estimate(row) for row in rows]
    for key in estimates[0]:
        unit = "GiB" if "weights" in key or key.startswith("sums") else "s"
        lines.append(line(key, *(f"{one[key]:,.2f} {unit}" for one in estimates)))
    fits = [one["weights and sums, as it is"] * GIB <= MEMORY for one in estimates]
    lines += [
        "",
        "As it is, each rank holds the whole network and all sums, and chooses channels for all groups: of data "
        "parallelism, batches alone are shared. "
        + " ".join(
            f"With {row['model']} parameters that {'fits' if fit else 'does not fit'} one GPU."
            for row, fit in zip(rows, fits, strict=True)
        )
        + " Sums and choices shared by group are not made yet; the table tells what they would save.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run both models, each in a process of its own, and write the results; or one of them."""
    parser = options_of(__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    facts = machine("torch", "transformers")
    rows = []
    for name in options.models:
        rows.append(in_child(__file__, "--measure", name))
        record = {"machine": facts, "cases": rows, "estimates": [estimate(row) for row in rows]}
        write("scale", render(rows, facts), record, options.results)


if __name__ == "__main__":
    main()
