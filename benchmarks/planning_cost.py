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
import gc
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxwidth
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.importance.estimates import Evidence, gather_evidence
from fxwidth.reconstruction.basis_change import rotation
from fxwidth.selection.error_curves import lost_share
from fxwidth.selection.grams import Pairs, pairs_of
from fxwidth.selection.registry import channel_order

RESULTS = Path(__file__).parent / "results"
THREADS = 2
IMAGES, BATCH = 128, 16
GIB, MIB = 2**30, 2**20
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
ENVIRONMENT = {"OMP_NUM_THREADS": str(THREADS)}
FRUGAL = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}


class Clock:
    """CPU and wall seconds since it was made."""

    def __init__(self) -> None:
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def read(self) -> dict[str, float]:
        """Return the seconds so far."""
        return {"cpu": time.process_time() - self._cpu, "wall": time.perf_counter() - self._wall}


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
    before = _count(gm)
    held = _forget_peak()
    clock = Clock()
    fxwidth.evolve(gm, budget=fxwidth.Budget(params=0.5), data=data)
    times = clock.read()
    memory = {"model_mib": before * 4 / MIB, "mib": (_peak() - held) / MIB}
    return {
        "network": name,
        "images": int(images),
        "parameters": before,
        "left": _count(gm) / before,
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
        every = [end.pairs(moments) for ends in turned.ends for end in ends]
        return [pairs.seen.double() for pairs in every if pairs is not None]
    clock = Clock()
    pairs: Pairs | None = pairs_of(graph, group, moments)
    parts["pairs"] += clock.read()["cpu"]
    if pairs is None:
        return []
    clock = Clock()
    order = channel_order(graph, group, group.width // 2, pairs, evidence.selection)
    parts["selection"] += clock.read()["cpu"]
    clock = Clock()
    lost_share(pairs, order)
    parts["curves"] += clock.read()["cpu"]
    return [pairs.seen]


def measure_llama() -> dict[str, Any]:
    """Plan a llama without values to half its parameters, and carry the plan out."""
    transformers = importlib.import_module("transformers")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()
    tokens = torch.zeros(2, 16, dtype=torch.int64, device="meta")
    before, held = _count(model), _forget_peak()
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
    after = _count(gm)
    if after > before / 2 or after != plan.notes["cost"]["params"][1]:
        raise SystemExit(f"the plan leaves {after:,} of {before:,} parameters, and said {plan.notes['cost']}")
    evidence = plan.notes["evidence"] or "none: without values all spectra are flat"
    return {**result, "groups": len(plan), "left": after / before, "evidence": evidence, "mib": (_peak() - held) / MIB}


def measure_width(width: str, dtype: str, evidence: str) -> dict[str, Any]:
    """Plan and resize a network with one wide group, and say how far that goes above what was held before it."""
    size, kind = int(width), getattr(torch, dtype)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, size), nn.ReLU(), nn.Linear(size, 64)).to(kind).eval()
    x = torch.randn(ROWS, 64).to(kind)
    gm = fxwidth.trace(net, x[:2])
    held = _forget_peak()
    clock = Clock()
    fxwidth.evolve(gm, budget=fxwidth.Budget(params=0.5), data=[x] if evidence == "data" else None)
    peak = (_peak() - held) / (4 * size * size)
    return {"width": size, "dtype": dtype, "evidence": evidence, **clock.read(), "matrices": peak}


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _forget_peak() -> int:
    """Have the kernel take the present memory of this process for its peak, and return it in bytes."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _peak()


def _peak() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


# -- tables ------------------------------------------------------------------------------------------------------------


def render(record: dict[str, Any]) -> str:
    """Return the results as markdown."""
    lines = ["# The cost of planning and resizing", ""]
    lines += [f"- {name}: {value}" for name, value in record["machine"].items()]
    lines += [
        "",
        "Times are CPU seconds of two threads together (wall seconds in brackets), the load average beside them",
    ]
    lines += ["is that when the case began. Memory is how far a case goes above what was held before it.", ""]
    lines += ["## To half the parameters", "", "`fxwidth.evolve(gm, budget=fxwidth.Budget(params=0.5), data=...)`", ""]
    lines += _table(
        "network | parameters | images | plan and resize (s) | memory (MiB) | the model (MiB) | left | load"
    )
    for row in record["networks"]:
        counts = [row["network"], f"{row['parameters']:,}", row["images"] or "none"]
        memory = [f"{row['mib']:,.0f}", f"{row['model_mib']:,.0f}"]
        lines.append(_line(*counts, _seconds(row), *memory, f"{row['left']:.1%}", _load(row)))
    lines += ["", "## The spectral part", "", *_SPECTRAL_WORDS, ""]
    lines += _table(
        "network | groups | spectral part (s) | `torch.linalg.eigh` (s) | ratio | one per group (s) | ratio | load"
    )
    for row in record["spectra"]:
        single = [f"{row['one_per_group']:.1f}", f"{row['strict_ratio']:.2f}"]
        eigen = [f"{row['parts']['eigenvectors']:.1f}", f"{row['ratio']:.2f}"]
        lines.append(_line(row["network"], row["groups"], _seconds(row["spectral"]), *eigen, *single, _load(row)))
    for row in record["spectra"]:
        parts = ", ".join(
            f"{name} {row['parts'][name]:.1f} s" for name in ("pairs", "selection", "curves", "rotations")
        )
        sizes = ", ".join(f"{count} of {size}" for size, count in row["matrices"].items())
        lines += ["", f"{row['network']}: {parts}. Matrices: {sizes}."]
    lines += ["", "## A llama of 7 billion parameters on the meta device", ""]
    lines += _table("parameters | trace | analyze | plan | resize | groups that change | left | memory (MiB) | load")
    for row in record["llama"]:
        stages = [_seconds(row[stage]) for stage in ("trace", "analyze", "plan", "resize")]
        counts = [row["groups"], f"{row['left']:.2%}", f"{row['mib']:,.0f}"]
        lines.append(_line(f"{row['parameters']:,}", *stages, *counts, _load(row)))
        lines += [
            "",
            f"Evidence of the plan: {row['evidence']}; so it weighs parameters alone, and is a check of cost.",
        ]
    lines += ["", "## Memory of one wide group", "", *_WIDTH_WORDS, ""]
    lines += _table("channels | parameters | evidence | peak (matrices) | plan and resize (s) | load")
    for row in record["widths"]:
        cells = [f"{row['width']:,}", row["dtype"], row["evidence"], f"{row['matrices']:.1f}"]
        lines.append(_line(*cells, _seconds(row), _load(row)))
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


def _table(header: str) -> list[str]:
    return [f"| {header} |", "|---" * (header.count("|") + 1) + "|"]


def _line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _seconds(times: dict[str, float]) -> str:
    return f"{times['cpu']:.1f} ({times['wall']:.1f})"


def _load(row: dict[str, Any]) -> str:
    return f"{row['load']:.1f}"


# -- running -----------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, tuple[Callable[..., dict[str, Any]], Sequence[Sequence[str]], dict[str, str]]] = {
    "networks": (measure_network, NETWORKS, {}),
    "spectra": (measure_spectra, SPECTRA, {}),
    "llama": (measure_llama, [[]], {}),
    "widths": (measure_width, WIDTHS, FRUGAL),
}


def in_child(section: str, case: Sequence[str]) -> dict[str, Any]:
    """Return what a case measures in a process of its own, and the load of the machine when it began."""
    load = os.getloadavg()[0]
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", section, *case]
    environment = os.environ | ENVIRONMENT | SECTIONS[section][2]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**result, "load": load}


def _machine() -> dict[str, str]:
    versions = {"fxwidth": fxwidth.__version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in ("torch", "torchvision", "transformers")}
    return {"machine": f"{os.cpu_count()} cores, CPU, {THREADS} threads"} | versions


def main() -> None:
    """Run the cases of some sections, and write them with those of the others as they were; or one case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to measure anew")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        torch.set_num_threads(THREADS)
        warm_up()
        section, *case = options.measure
        print(json.dumps(SECTIONS[section][0](*case)))
        return
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / "planning-cost.json"
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    record = {"machine": _machine(), **{section: record.get(section, []) for section in SECTIONS}}
    for section in options.only:
        record[section] = []
        for case in SECTIONS[section][1]:
            record[section].append(in_child(section, case))
            print(record[section][-1], flush=True)
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    table = render(record)
    (options.results / "planning-cost.md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
