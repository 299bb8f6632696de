"""One model of the sweep of modules, in a process of its own: halved, written back to its class, compared.

    python -m benchmarks.module_check torchvision|timm|transformers MODEL

The last line printed is the result as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import fxwidth
from benchmarks.coverage_cases import Call, Case
from benchmarks.coverage_check import count_parameters, made_ready
from benchmarks.coverage_values import cast, difference, leaves_of, runs_in_float64
from benchmarks.module_cases import module_case

# What is asked, and what is tried where that is out of reach.
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)
# Parameters from which on a model is run in float32.
LARGE = 2_000_000
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def main() -> None:
    """Check one model and print what came of it; an error on the way is a result as well."""
    suite, name = sys.argv[1:]
    try:
        result = check(suite, name)
    except Exception as error:
        result = {"status": "crashed", "reason": f"{type(error).__name__}: {error}"[:600]}
    print(json.dumps(result))


def check(suite: str, name: str) -> dict[str, Any]:
    """Check one model and return what came of it, as plain data."""
    chosen = module_case(suite, name)
    model, call = made_ready(chosen)
    # Plans for larger models take several times as long in float64.
    is_wide = count_parameters(model) < LARGE and runs_in_float64(model, call)
    dtype = torch.float64 if is_wide else torch.float32
    model, call = model.to(dtype), cast(call, dtype)
    seconds: dict[str, float] = {}
    result: dict[str, Any] = {"status": "refused", "parameters": count_parameters(model), "seconds": seconds}
    try:
        with _timed(seconds, "trace"):
            gm = fxwidth.trace(model, call.args, call.kwargs)
            graph = fxwidth.analyze(gm)
        with _timed(seconds, "plan"):
            share, plan, refusal = _planned_by_sizes(suite, chosen, graph, model, call)
        if plan is None:
            return result | {"reason": refusal[:600]}
        told = plan.notes["for_module"]
        result |= {"share": share, "ties": len(told["ties"]), "staying": len(told["staying"]), "at_half": refusal[:400]}
        with _timed(seconds, "resize"):
            # Which channels stay, and what readers make of it, is another question.
            fxwidth.resize(gm, plan, selection="magnitude", fold=False, rotate=False)
        result["in_resize"] = fxwidth.report(gm).resizes[-1]["original"]
        with _timed(seconds, "write_back"):
            fxwidth.write_back(gm, model)
    except fxwidth.FxwidthError as error:
        return result | {"reason": str(error)[:1000]}
    result["parameters_after"] = count_parameters(model)
    worst, found = 0.0, {}
    for kind, make in _targets(suite, chosen, model, dtype).items():
        try:
            other = make()
        except Exception as error:
            found[kind] = f"not built: {type(error).__name__}"
            continue
        try:
            if other is not model and kind != "loaded":
                fxwidth.write_back(gm, other)
            own = _difference(gm, other, call)
            worst = max(worst, own)
            found[kind] = f"{own:.0e}"
        except fxwidth.FxwidthError as error:
            found[kind] = f"refused: {error}"[:400]
            worst = float("inf")
    is_right = worst <= TOLERANCE[dtype]
    return result | {"status": "right" if is_right else "wrong", "difference": worst, "targets": found}


def _planned_by_sizes(
    suite: str, chosen: Case, graph: fxwidth.WidthGraph, model: nn.Module, call: Call
) -> tuple[float, fxwidth.Plan | None, str]:
    """Return a plan as `_planned` does; of the large models of vision, one that is made on the meta device."""
    if suite == "transformers":
        return _planned(graph, model)
    try:
        with torch.device("meta"):
            hollow = chosen.make().eval().to(next(model.parameters()).dtype)
        meta = pytree.tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, call.args)
        hollow_graph = fxwidth.analyze(fxwidth.trace(hollow, meta, call.kwargs or None))
        if [group.name for group in hollow_graph.free] == [group.name for group in graph.free]:
            return _planned(hollow_graph, hollow)
    except Exception as error:
        print(f"not planned on the meta device: {error}"[:300], file=sys.stderr)
    return _planned(graph, model)


def _planned(graph: fxwidth.WidthGraph, model: nn.Module) -> tuple[float, fxwidth.Plan | None, str]:
    """Return the smallest share that is in reach, its plan, and why half of the parameters is not."""
    refusal = ""
    for share in SHARES:
        try:
            plan = fxwidth.plan(graph, params=share, for_module=model)
            return share, plan, refusal
        except fxwidth.FxwidthError as error:
            refusal = refusal or str(error)
            if "out of reach" not in str(error):
                break
    return 1.0, None, refusal


def _targets(suite: str, chosen: Case, model: nn.Module, dtype: torch.dtype) -> dict[str, Callable[[], nn.Module]]:
    """Return what is to hold the widths: the model itself, a fresh one, one on the meta device, one that is loaded."""

    def on_meta() -> nn.Module:
        with torch.device("meta"):
            return chosen.make().eval().to(dtype)

    result: dict[str, Callable[[], nn.Module]] = {
        "itself": lambda: model,
        "fresh": lambda: chosen.make().eval().to(dtype),
        "meta": on_meta,
    }
    if suite == "transformers":

        def loaded() -> nn.Module:
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)  # type: ignore[operator]
                again: nn.Module = type(model).from_pretrained(folder, dtype=dtype).eval()  # type: ignore[attr-defined]
                return again

        result["loaded"] = loaded
    return result


def _difference(gm: nn.Module, model: nn.Module, call: Call) -> float:
    with torch.no_grad():
        expected = leaves_of(gm(*call.args, **call.kwargs))
        return difference(leaves_of(model.eval()(*call.args, **call.kwargs)), expected)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = round(time.perf_counter() - start, 1)


if __name__ == "__main__":
    main()
