"""What does it take to plan and resize a network to half its parameters: seconds, and memory?

    python benchmarks/planning_cost.py

Networks of torchvision, without data and with 128 images; the spectral part of a plan beside a plain eigendecomposition
of the same matrices; a llama of 7 billion parameters on the meta device; and the peak of memory for one wide group.
Each case runs in a process of its own with two threads, after a small one that warms it up. Weights and images are
random, which changes what is kept but not what it takes to find it. Times are CPU and wall seconds. Writes a JSON and a
markdown table to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import fxwidth
from benchmarks.support.children import in_child
from benchmarks.support.machine import machine
from benchmarks.support.measures import MIB, Clock, forget_peak, peak, told
from benchmarks.support.results import options_of, read_record, write, write_record
from benchmarks.support.tables import header, heading, line
from fxwidth.evolution.evolver import parameter_count
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.importance.estimates import Evidence, gather_evidence
from fxwidth.reconstruction.basis_change import rotation
from fxwidth.selection.error_curves import lost_share
from fxwidth.selection.grams import Grams, grams_of
from fxwidth.selection.orders import channel_order
from fxwidth.weights.readers import wiring_of

THREADS = 2
IMAGES, BATCH = 128, 16
NETWORKS = [[name, images] for name in ("resnet50", "vit_b_16", "resnet152") for images in ("0", str(IMAGES))]
SPECTRA = [["resnet50"], ["vit_b_16"]]
WIDTHS = [
    [width, dtype, evidence]
    for width in ("2048", "4096", "8192")
    for dtype in ("float32", "bfloat16")
    for evidence in ("noise", "data")
]
LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
ROWS = 512
# Of a wide group freed matrices go back to the system at once: the peak is of what is held, not of what malloc keeps.
FRUGAL = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}


def network(name: str) -> torch.fx.GraphModule:
    """Return the traced network of a case."""
    torch.manual_seed(0)
    model = importlib.import_module("torchvision.models").get_model(name, weights=None).eval()
    return fxwidth.trace(model, torch.randn(2, 3, 224, 224))


def batches(images: int) -> list[Tensor] | None:
    """Return random images in batches; None for none."""
    return [torch.randn(BATCH, 3, 224, 224) for _ in range(images // BATCH)] or None


def warm_up() -> None:
    """Plan and resize a small network, so that no case pays for what the first call of anything costs."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    images = torch.randn(4, 3, 8, 8)
    for data in (None, [images]):
        fxwidth.evolve(net, images, budget=fxwidth.Budget(params=0.8), data=data)


def measure_network(name: str, images: str) -> dict[str, Any]:
    """Plan and resize a network to half its parameters."""
    gm, data = network(name), batches(int(images))
    before = parameter_count(gm)
    held = forget_peak()
    clock = Clock()
    fxwidth.evolve(gm, budget=fxwidth.Budget(params=0.5), data=data)
    times = clock.read()
    memory = {"model_mib": before * 4 / MIB, "mib": (peak() - held) / MIB}
    return {
        "network": name,
        "images": int(images),
        "parameters": before,
        "left": parameter_count(gm) / before,
        **times,
        **memory,
    }


def measure_spectra(name: str) -> dict[str, Any]:
    """Time what happens between moments and width curves, and the eigenvectors of the same matrices."""
    graph = fxwidth.analyze(network(name))
    evidence = gather_evidence(graph, None, rotates=True)
    assert evidence.moments is not None
    clock = Clock()
    for group in graph.free:
        evidence.errors(group)
    whole = clock.read()
    parts = {"pairs": 0.0, "selection": 0.0, "curves": 0.0, "rotations": 0.0, "eigenvectors": 0.0}
    merged, sizes = 0.0, Counter[str]()
    for group in graph.free:
        found = _timed_parts(evidence, group, parts)
        for seen in found:
            clock = Clock()
            torch.linalg.eigh(seen)
            parts["eigenvectors"] += clock.read()["cpu"]
            sizes[f"{seen.shape[1]} ({str(seen.dtype).removeprefix('torch.')})"] += len(seen)
        clock = Clock()
        for seen in found:
            torch.linalg.eigh(seen.sum(0) if evidence.rotation(group) is None else seen)
        merged += clock.read()["cpu"]
    ratio, strict = whole["cpu"] / parts["eigenvectors"], whole["cpu"] / merged
    result = {"network": name, "groups": len(graph.free), "spectral": whole, "parts": parts, "ratio": ratio}
    return result | {"one_per_group": merged, "strict_ratio": strict, "matrices": dict(sizes)}


def _timed_parts(evidence: Evidence, group: ChannelGroup, parts: dict[str, float]) -> list[Tensor]:
    """Add the CPU seconds of each step for a group; return the matrices that it works on, as it works on them."""
    graph, moments = evidence.width_graph, evidence.moments
    assert moments is not None
    clock = Clock()
    turned = rotation(graph, group, moments)
    if turned is not None:
        parts["rotations"] += clock.read()["cpu"]
        every = [one.grams(moments) for consumers in turned.consumers for one in consumers]
        return [pairs.activation.double() for pairs in every if pairs is not None]
    clock = Clock()
    pairs: Grams | None = grams_of(wiring_of(graph), group, moments)
    parts["pairs"] += clock.read()["cpu"]
    if pairs is None:
        return []
    clock = Clock()
    order = channel_order(graph, group, group.width // 2, pairs, evidence.selection)
    parts["selection"] += clock.read()["cpu"]
    clock = Clock()
    lost_share(pairs, order)
    parts["curves"] += clock.read()["cpu"]
    return [pairs.activation]


def measure_llama() -> dict[str, Any]:
    """Plan a llama without values to half its parameters, and carry the plan out."""
    transformers = importlib.import_module("transformers")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()
    tokens = torch.zeros(2, 16, dtype=torch.int64, device="meta")
    before, held = parameter_count(model), forget_peak()
    result: dict[str, Any] = {"parameters": before}
    clock = Clock()
    gm = fxwidth.trace(model, {"input_ids": tokens})
    result["trace"], clock = clock.read(), Clock()
    graph = fxwidth.analyze(gm)
    result["analyze"], clock = clock.read(), Clock()
    plan = fxwidth.plan(graph, budget=fxwidth.Budget(params=0.5))
    result["plan"], clock = clock.read(), Clock()
    fxwidth.resize(gm, plan)
    result["resize"] = clock.read()
    after = parameter_count(gm)
    if after > before / 2 or after != plan.notes["cost"]["params"][1]:
        raise SystemExit(f"the plan leaves {after:,} of {before:,} parameters, and said {plan.notes['cost']}")
    evidence = plan.notes["evidence"] or "none: without values all spectra are flat"
    return {**result, "groups": len(plan), "left": after / before, "evidence": evidence, "mib": (peak() - held) / MIB}


def measure_width(width: str, dtype: str, evidence: str) -> dict[str, Any]:
    """Plan and resize a network with one wide group, and say how far that goes above what was held before it."""
    size, kind = int(width), getattr(torch, dtype)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, size), nn.ReLU(), nn.Linear(size, 64)).to(kind).eval()
    x = torch.randn(ROWS, 64).to(kind)
    gm = fxwidth.trace(net, x[:2])
    held = forget_peak()
    clock = Clock()
    fxwidth.evolve(gm, budget=fxwidth.Budget(params=0.5), data=[x] if evidence == "data" else None)
    matrices = (peak() - held) / (4 * size * size)
    return {"width": size, "dtype": dtype, "evidence": evidence, **clock.read(), "matrices": matrices}


# -- tables ------------------------------------------------------------------------------------------------------------


def render(record: dict[str, Any]) -> str:
    """Return the results as markdown."""
    lines = heading("The cost of planning and resizing", record["machine"])
    lines += [
        "Times are CPU seconds of two threads together (wall seconds in brackets), the load average beside them",
    ]
    lines += ["is that when the case began. Memory is how far a case goes above what was held before it.", ""]
    lines += ["## To half the parameters", "", "`fxwidth.evolve(gm, budget=fxwidth.Budget(params=0.5), data=...)`", ""]
    lines += header(
        "network", "parameters", "images", "plan and resize (s)", "memory (MiB)", "the model (MiB)", "left", "load"
    )
    for row in record["networks"]:
        counts = [row["network"], f"{row['parameters']:,}", row["images"] or "none"]
        memory = [f"{row['mib']:,.0f}", f"{row['model_mib']:,.0f}"]
        lines.append(line(*counts, told(row), *memory, f"{row['left']:.1%}", _load(row)))
    lines += ["", "## The spectral part", "", *_SPECTRAL_WORDS, ""]
    lines += header(
        "network",
        "groups",
        "spectral part (s)",
        "`torch.linalg.eigh` (s)",
        "ratio",
        "one per group (s)",
        "ratio",
        "load",
    )
    for row in record["spectra"]:
        single = [f"{row['one_per_group']:.1f}", f"{row['strict_ratio']:.2f}"]
        eigen = [f"{row['parts']['eigenvectors']:.1f}", f"{row['ratio']:.2f}"]
        lines.append(line(row["network"], row["groups"], told(row["spectral"]), *eigen, *single, _load(row)))
    for row in record["spectra"]:
        parts = ", ".join(
            f"{name} {row['parts'][name]:.1f} s" for name in ("pairs", "selection", "curves", "rotations")
        )
        sizes = ", ".join(f"{count} of {size}" for size, count in row["matrices"].items())
        lines += ["", f"{row['network']}: {parts}. Matrices: {sizes}."]
    lines += ["", "## A llama of 7 billion parameters on the meta device", ""]
    lines += header(
        "parameters", "trace", "analyze", "plan", "resize", "groups that change", "left", "memory (MiB)", "load"
    )
    for row in record["llama"]:
        stages = [told(row[stage]) for stage in ("trace", "analyze", "plan", "resize")]
        counts = [row["groups"], f"{row['left']:.2%}", f"{row['mib']:,.0f}"]
        lines.append(line(f"{row['parameters']:,}", *stages, *counts, _load(row)))
        lines += [
            "",
            f"Evidence of the plan: {row['evidence']}; so it weighs parameters alone, and is a check of cost.",
        ]
    lines += ["", "## Memory of one wide group", "", *_WIDTH_WORDS, ""]
    lines += header("channels", "parameters", "evidence", "peak (matrices)", "plan and resize (s)", "load")
    for row in record["widths"]:
        cells = [f"{row['width']:,}", row["dtype"], row["evidence"], f"{row['matrices']:.1f}"]
        lines.append(line(*cells, told(row), _load(row)))
    return "\n".join(lines) + "\n"


_SPECTRAL_WORDS = [
    "All that happens between the moments of a network and the width curves of its groups: what readers see and want",
    "of the channels (S and D), the order in which channels are kept, the errors of all widths, and the rotations of",
    "linear groups. Beside it a plain eigendecomposition of the same matrices S in the same precision, in the same",
    "process; in the last columns that of one matrix per group, the sum over its readers.",
]
_WIDTH_WORDS = [
    f"Linear(64, n), ReLU, Linear(n, 64) to half its parameters; with {ROWS} rows of data, or without. The peak is in",
    "n x n matrices of float32; two of them are the covariance, in float64.",
]


def _load(row: dict[str, Any]) -> str:
    return f"{row['load']:.1f}"


# -- running -----------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, tuple[Callable[..., dict[str, Any]], Sequence[Sequence[str]], dict[str, str]]] = {
    "networks": (measure_network, NETWORKS, {}),
    "spectra": (measure_spectra, SPECTRA, {}),
    "llama": (measure_llama, [[]], {}),
    "widths": (measure_width, WIDTHS, FRUGAL),
}


def run_case(section: str, case: Sequence[str]) -> dict[str, Any]:
    """Return what a case measures in a process of its own, and the load of the machine when it began."""
    load = os.getloadavg()[0]
    arguments = ("--measure", section, *case)
    return {**in_child(__file__, *arguments, threads=THREADS, environment=SECTIONS[section][2]), "load": load}


def main() -> None:
    """Run the cases of some sections, and write them with those of the others as they were; or one case."""
    parser = options_of(__doc__)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to measure anew")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        torch.set_num_threads(THREADS)
        warm_up()
        section, *case = options.measure
        print(json.dumps(SECTIONS[section][0](*case)))
        return
    known = read_record("planning-cost", options.results) or {}
    facts = machine("torch", "torchvision", "transformers", threads=THREADS)
    record = {"machine": facts, **{section: known.get(section, []) for section in SECTIONS}}
    for section in options.only:
        record[section] = []
        for case in SECTIONS[section][1]:
            record[section].append(run_case(section, case))
            print(record[section][-1], flush=True)
            write_record("planning-cost", record, options.results)
    write("planning-cost", render(record), record, options.results)


if __name__ == "__main__":
    main()
