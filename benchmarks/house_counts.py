"""Count how one tree of the package is laid out and how a resize walks through it, or time its `analyze`.

    python benchmarks/house_counts.py TREE [--time NETWORK ...]

It prints JSON. Apart from benchmarks/house.py, since the tree to be measured is the one that is imported: nothing here
imports the package that this file belongs to.
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib
import json
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

LONG_FUNCTION, LONG_FILE = 40, 300
REPEATS = 15
PRODUCTS = {"mm", "addmm"}
BATCH_NORMS = {"native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "_batch_norm_no_update"}


def sources(tree: Path) -> list[Path]:
    """Return the files of the package, and those of its passes, which a link may have there a second time."""
    files = sorted((tree / "fxwidth").rglob("*.py")) + sorted((tree / "passes").glob("*.py"))
    return list({file.resolve(): file for file in files}.values())


def layout(tree: Path) -> dict[str, Any]:
    """Return how many modules there are, where they lie, and which of them and their functions are long."""
    files = sources(tree)
    texts = {str(file.relative_to(tree)): file.read_text(encoding="utf-8") for file in files}
    modules = [file for file in files if file.name != "__init__.py"]
    named = [set(_ops(ast.parse(text))) for text in texts.values()]
    lengths = {name: text.count("\n") for name, text in texts.items()}
    functions = {f"{name}:{found}": size for name, text in texts.items() for found, size in _functions(ast.parse(text))}
    return {
        "modules": len(modules),
        "in one folder": max(Counter(file.parent for file in modules).values()),
        "lines": sum(lengths.values()),
        "uses of id(": sum(len(re.findall(r"\bid\(", text)) for text in texts.values()),
        "files that name the op of a product": sum(not PRODUCTS.isdisjoint(ops) for ops in named),
        "files that name the op of a batch norm": sum(not BATCH_NORMS.isdisjoint(ops) for ops in named),
        "long functions": {name: size for name, size in functions.items() if size > LONG_FUNCTION},
        "long files": {name: size for name, size in lengths.items() if size > LONG_FILE},
    }


def _functions(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield each function and the lines that it has below its signature and docstring."""
    for found in ast.walk(tree):
        if isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef):
            has_text = ast.get_docstring(found) is not None and len(found.body) > 1
            first = found.body[1 if has_text else 0]
            yield found.name, (found.end_lineno or first.lineno) - first.lineno + 1


def _ops(tree: ast.AST) -> Iterator[str]:
    """Yield what may name an op: words of strings, such as "mm", and what is looked up, such as aten.mm."""
    for found in ast.walk(tree):
        if isinstance(found, ast.Constant) and isinstance(found.value, str):
            yield from found.value.split()
        elif isinstance(found, ast.Attribute) and not (isinstance(found.value, ast.Name) and found.value.id == "torch"):
            yield found.attr


def imports() -> dict[str, Any]:
    """Return how long the longest chain of imports is, and how many circles there are; each circle counts as one."""
    grimp, networkx = importlib.import_module("grimp"), importlib.import_module("networkx")
    found = grimp.build_graph("fxwidth", cache_dir=None)
    pairs = ((one, other) for one in found.modules for other in found.find_modules_directly_imported_by(one))
    graph = networkx.DiGraph(pairs)
    circles = [part for part in networkx.strongly_connected_components(graph) if len(part) > 1]
    chain = networkx.dag_longest_path_length(networkx.condensation(graph)) + 1
    return {"longest chain of imports": chain, "circles": len(circles)}


def walk() -> dict[str, Any]:
    """Return through which files the width graph goes while a small network is resized by data, call by call.

    A return is a call into a file that was left before.
    """
    import torch
    from torch import nn

    import fxwidth

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 10, 1), nn.BatchNorm2d(10), nn.ReLU(),
        nn.Flatten(), nn.Linear(90, 3),
    )  # fmt: skip
    images = torch.randn(32, 2, 5, 5)
    gm = fxwidth.trace(model, images)
    group = fxwidth.analyze(gm).free[0].name
    root = str(Path(fxwidth.__file__).parent)
    visited: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(root):
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            if any(isinstance(frame.f_locals.get(name), fxwidth.WidthGraph) for name in names):
                visited.append(code.co_filename)

    sys.settrace(note)
    try:
        fxwidth.resize(gm, {group: 6}, data=[images])
    finally:
        sys.settrace(None)
    entered = [file for i, file in enumerate(visited) if i == 0 or file != visited[i - 1]]
    return {
        "files that the width graph goes through": len(set(entered)),
        "returns to files left": len(entered) - len(set(entered)),
    }


def times(networks: Iterable[str]) -> dict[str, float]:
    """Return the median CPU milliseconds of `analyze` for traced networks of torchvision."""
    import torch

    import fxwidth

    torch.set_num_threads(1)
    models, found = importlib.import_module("torchvision.models"), {}
    for name in networks:
        gm = fxwidth.trace(models.get_model(name, weights=None).eval(), torch.randn(2, 3, 224, 224))
        taken = []
        for _ in range(REPEATS + 1):
            gc.collect()
            started = time.process_time()
            fxwidth.analyze(gm)
            taken.append(1000 * (time.process_time() - started))
        found[name] = statistics.median(taken[1:])  # the first fills caches
    return found


def main() -> None:
    """Print the counts of a tree, or its times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path)
    parser.add_argument("--time", nargs="+", metavar="NETWORK")
    options = parser.parse_args()
    tree = options.tree.resolve()
    sys.path[0] = str(tree)
    if not Path(importlib.import_module("fxwidth").__file__ or "").is_relative_to(tree):
        raise SystemExit(f"the package that is imported is not that of {tree}")
    print(json.dumps(times(options.time) if options.time else layout(tree) | imports() | walk()))


if __name__ == "__main__":
    main()
