"""How much quicker is half of the FLOPs where a network runs: eagerly, compiled, packaged, and in onnxruntime?

    python benchmarks/deployment.py [--models NAME ...]

Networks of torchvision with random weights are resized to half of their FLOPs, widths in multiples of eight, by
magnitude: times go by widths alone. Each form of the network and of the resized one is timed in turns, in one process
for each model, with one thread. The figures are medians of the milliseconds of a forward pass: CPU time in the table,
so that other work on the machine counts less, and wall time in the record, as is the largest difference to the eager
network. Needs a C++ compiler and `pip install -e '.[deploy]'`. Writes a JSON and a markdown table to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import fxwidth
from benchmarks.support.children import in_child
from benchmarks.support.machine import machine, processor
from benchmarks.support.results import options_of, write
from benchmarks.support.tables import header, heading, line

MODELS = ("resnet50", "mobilenet_v2", "vit_b_16")
SIZE, BATCH = 224, 1
TURNS, CALLS = 7, 3
Run = Callable[[Tensor], Tensor]


def eager(model: nn.Module, _images: Tensor, _folder: Path) -> Run:
    """Return the network as it is."""
    return model


def compiled(model: nn.Module, _images: Tensor, _folder: Path) -> Run:
    """Return the network compiled by inductor."""
    return torch.compile(model)


def packaged(model: nn.Module, images: Tensor, folder: Path) -> Run:
    """Return the AOTInductor package of the network."""
    path = str(folder / f"{id(model)}.pt2")
    torch._inductor.aoti_compile_and_package(torch.export.export(model, (images,)), package_path=path)
    run: Run = torch._inductor.aoti_load_package(path)
    return run


def in_onnxruntime(model: nn.Module, images: Tensor, folder: Path) -> Run:
    """Return a session of onnxruntime for the network."""
    onnxruntime = importlib.import_module("onnxruntime")
    path = folder / f"{id(model)}.onnx"
    written = torch.onnx.export(model, (images,), dynamo=True, verbose=False)
    assert written is not None
    written.save(path)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda given: torch.from_numpy(session.run(None, {name: given.numpy()})[0])


FORMS = {"eager": eager, "inductor": compiled, "AOTInductor": packaged, "onnxruntime": in_onnxruntime}


def flops_of(gm: torch.fx.GraphModule) -> float:
    """Return the floating-point operations of a forward pass."""
    return fxwidth.cost_polynomial(fxwidth.analyze(gm), "flops")({})


def milliseconds(run: Run, images: Tensor) -> tuple[float, float]:
    """Return the CPU and the wall milliseconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(CALLS):
        run(images)
    return 1e3 * (time.process_time() - cpu) / CALLS, 1e3 * (time.perf_counter() - wall) / CALLS


@torch.no_grad()
def measure(name: str) -> dict[str, Any]:
    """Time all forms of one model before and after a resize, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    build: Callable[..., nn.Module] = importlib.import_module("torchvision.models").get_model
    images = torch.randn(BATCH, 3, SIZE, SIZE)
    before = fxwidth.trace(build(name, weights=None).eval(), images)
    after = fxwidth.trace(build(name, weights=None).eval(), images)
    fxwidth.evolve(after, flops=0.5, align=8, selection="magnitude", fold=False)
    networks = {"before": before, "after": after}
    result: dict[str, Any] = {"model": name, "flops": [flops_of(before), flops_of(after)]}
    for form, make in FORMS.items():
        with tempfile.TemporaryDirectory() as folder:
            runs = {when: make(network, images, Path(folder)) for when, network in networks.items()}
            apart = [float((runs[when](images) - network(images)).abs().max()) for when, network in networks.items()]
            times: dict[str, list[tuple[float, float]]] = {"before": [], "after": []}
            for _ in range(TURNS):
                for when, run in runs.items():
                    times[when].append(milliseconds(run, images))
        kinds = {"cpu": 0, "wall": 1}
        medians = {
            k: {w: statistics.median(t[i] for t in found) for w, found in times.items()} for k, i in kinds.items()
        }
        result[form] = {**medians, "difference": max(apart)}
    return result


def render(rows: list[dict[str, Any]], facts: dict[str, str]) -> str:
    """Return the results as markdown."""
    lines = heading("Latency at half of the FLOPs", facts)
    lines += [
        f"CPU milliseconds of a forward pass of {BATCH} image of {SIZE} x {SIZE}: before -> after (share). Medians of"
    ]
    lines += [f"{TURNS} turns of {CALLS} calls, before and after in turns.", ""]
    lines += header("model", "FLOPs left", *FORMS)
    for row in rows:
        before, after = row["flops"]
        times = [(row[form]["cpu"]["before"], row[form]["cpu"]["after"]) for form in FORMS]
        cells = [f"{old:.1f} -> {new:.1f} ({new / old:.0%})" for old, new in times]
        lines.append(line(row["model"], f"{after / before:.0%}", *cells))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all models and write the results, or one model in the role of a child."""
    parser = options_of(__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names in torchvision.models")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    facts = machine("torch", "torchvision", "onnx", "onnxruntime") | {"processor": processor()}
    rows = []
    for name in options.models:
        rows.append(in_child(__file__, "--measure", name))
        print(rows[-1], flush=True)
        write("deployment", render(rows, facts), {"machine": facts, "cases": rows}, options.results)


if __name__ == "__main__":
    main()
