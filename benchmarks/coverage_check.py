"""One model of a coverage sweep, in a process of its own: halve every free group and compare with the replay oracle.

    python -m benchmarks.coverage_check fxwidth|torch-pruning SUITE MODEL

The last line printed is the result as JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxwidth
from benchmarks.coverage_cases import Call, Case, case
from benchmarks.coverage_modes import ModeChecks, holds, warnings_of
from benchmarks.coverage_values import TOLERANCE, cast, leaves_of, of_the_signal, rounding_of, runs_in_float64
from benchmarks.coverage_values import difference as difference_of
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.frontends import call_signature
from fxwidth.frontends.placeholder_calls import bound_to_placeholders
from fxwidth.runtime.pytrees import deep_tensors
from fxwidth.verification.replay_oracle import reference_outputs
from fxwidth.verification.stepwise import prescribed_difference, stepwise_difference

# Parameters from which on a model is run in float32.
GIANT = 150_000_000
# Where rounding is a larger part of what depends on the input, agreement would say nothing.
BLIND = 0.2


def main() -> None:
    """Check one model and print what came of it."""
    print(json.dumps(check(*sys.argv[1:])))


def check_to_file(tool: str, suite: str, name: str, path: str) -> None:
    """Check one model and write what came of it; an error on the way is a result as well."""
    try:
        result = check(tool, suite, name)
    except Exception as error:
        result = {"status": "crashed", "reason": f"{type(error).__name__}: {error}"[:500]}
    Path(path).write_text(json.dumps(result))


def check(tool: str, suite: str, name: str) -> dict[str, Any]:
    """Check one model and return what came of it, as plain data."""
    model, call = made_ready(case(suite, name))
    result = {"fxwidth": check_fxwidth, "torch-pruning": check_torch_pruning}[tool](model, call)
    return result | {"peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}


def made_ready(chosen: Case) -> tuple[nn.Module, Call]:
    """Return the model of a case, such that what is missed in it is seen in its values, and its call."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = chosen.make().eval()
    call = chosen.call(model)
    set_apart(model)
    settle_batch_norms(model, call)
    return model, call


def check_fxwidth(model: nn.Module, call: Call) -> dict[str, Any]:
    """Hold a model to all checks: the values after every free group was halved, both modes, another batch size."""
    parameters = count_parameters(model)
    dtype = torch.float64 if parameters < GIANT and runs_in_float64(model, call) else torch.float32
    model, call = model.to(dtype), cast(call, dtype)
    checks = ModeChecks(model, call)
    result = {"parameters": parameters} | _halved(model, call, dtype, checks)
    faults = [f"{name}: {word}" for name, word in checks.words.items() if not holds(word)]
    if faults and result["status"] in ("right", "pinned"):
        result |= {"status": "wrong", "reason": "; ".join(faults)[:1000]}
    return result | {"checks": checks.words}


def _halved(model: nn.Module, call: Call, dtype: torch.dtype, checks: ModeChecks) -> dict[str, Any]:
    """Trace, analyse, halve every free group, run, and compare shapes and values with the replay oracle."""
    with torch.no_grad():
        before = leaves_of(model(*call.args, **call.kwargs))
    seconds: dict[str, float] = {}
    told: list[str] = []
    result: dict[str, Any] = {"status": "refused", "seconds": seconds}
    try:
        with _timed(seconds, "trace"), checks.looking("state", model), warnings_of(told):
            gm = fxwidth.trace(model, call.args, call.kwargs)
        with torch.no_grad():
            traced = difference_of(leaves_of(gm(*call.args, **call.kwargs)), before)
        if not traced < TOLERANCE[dtype]:
            return result | {"status": "wrong", "reason": f"the traced graph differs by {traced:.1e}"}
        with _timed(seconds, "modes"):
            checks.traced(gm, told)
            checks.traced_in_training()
        with _timed(seconds, "analyze"), checks.looking("state, analysed", model):
            graph = fxwidth.analyze(gm)
        free = graph.free
        pinned = [group for group in graph.groups if group.pinned is not None]
        result |= {
            "free": len(free),
            "pinned": len(pinned),
            "pinned_reasons": Counter(str(group.pinned) for group in pinned).most_common(),
        }
        plan = {group.name: _some(group.width, max(group.least.width, group.width // 2)) for group in free}
        maps = IndexMaps(graph.analysis.space, {graph[name].factor: np.array(own) for name, own in plan.items()})
        values = bound_to_placeholders(gm, call_signature.Call(call.args, call.kwargs))
        trial = _Trial(gm, graph, plan, maps, values, call, before, seconds)
        if graph.analysis.record is not None:
            result |= _check_by_steps(trial)
            checks.resized(gm)
            return result
        return result | _check_outputs(trial, dtype, checks)
    except fxwidth.FxwidthError as error:
        return result | {"reason": str(error)[:1000]}


@dataclass(frozen=True)
class _Trial:
    """A graph that is to be halved: which channels stay, what it is called with, and what it gave before."""

    gm: fx.GraphModule
    graph: fxwidth.WidthGraph
    plan: dict[str, list[int]]
    maps: IndexMaps
    values: list[Any]
    call: Call
    before: list[Tensor]
    seconds: dict[str, float]

    def resize(self) -> None:
        """Halve it."""
        with _timed(self.seconds, "resize"), _as_the_oracle_keeps():
            fxwidth.resize(self.gm, self.plan, fold=False)

    def answer(self) -> Any:
        """Call it."""
        with torch.no_grad():
            return self.gm(*self.call.args, **self.call.kwargs)

    def in_history(self) -> dict[str, int]:
        """Return what is left of it."""
        lowered = len(self.gm.meta["fxwidth_history"][-1]["lowered"]) if self.plan else 0
        return {"parameters_after": count_parameters(self.gm), "lowered": lowered}

    def status(self, right: bool) -> str:
        """Return the word for it."""
        return ("right" if self.plan else "pinned") if right else "wrong"


def _check_outputs(trial: _Trial, dtype: torch.dtype, checks: ModeChecks) -> dict[str, Any]:
    """Compare the outputs of the resized graph with those of the replay oracle."""
    analysis, maps, values = trial.graph.analysis, trial.maps, trial.values
    with _timed(trial.seconds, "oracle"):
        reference = reference_outputs(analysis, maps, values, dtype)
    trial.resize()
    answer = trial.answer()
    with _timed(trial.seconds, "modes, resized"):
        checks.resized(trial.gm)
    # Caches are compared, too, but may have other sizes.
    difference = of_the_signal(deep_tensors(answer), reference)
    rounding = rounding_of(reference, dtype)
    if difference >= max(TOLERANCE[dtype], rounding):
        # Some models compute in float32 whatever they are given: what that alone changes is no fault.
        own = reference_outputs(analysis, maps, values, None)
        rounding = max(rounding, 10 * of_the_signal(own, reference))
    shapes_kept = [t.shape for t in leaves_of(answer)] == [t.shape for t in trial.before]
    right = shapes_kept and difference < max(TOLERANCE[dtype], rounding) and rounding < BLIND
    found = {"shapes_kept": shapes_kept, "difference": difference, "rounding": rounding}
    return {**trial.in_history(), **found, "status": trial.status(right)}


def _check_by_steps(trial: _Trial) -> dict[str, Any]:
    """Compare every op with the replay oracle, for models that answer with whatever they have found."""
    gm, call, analysis = trial.gm, trial.call, trial.graph.analysis
    dtype = next(gm.parameters()).dtype
    before = leaves_of(trial.answer())
    with _timed(trial.seconds, "oracle"):
        difference, place = stepwise_difference(analysis, trial.maps, trial.values, dtype)
    trial.resize()
    # Some models compute in float32 whatever they are given, anchors for instance: so must the oracle then.
    own, compared = prescribed_difference(gm, analysis, trial.maps, trial.values, None)
    after = leaves_of(trial.answer())
    with torch.no_grad():
        # Another number of things found, in images of other sizes.
        others = pytree.tree_map_only(Tensor, lambda image: torch.rand_like(image[..., 3:, :-5]), call.args)
        gm(*others, **call.kwargs)
    kept = [t.shape[1:] for t in after] == [t.shape[1:] for t in before]
    worst = max(difference, own)
    right = kept and worst < TOLERANCE[dtype] and compared > 0
    found = {"shapes_kept": kept, "difference": worst, "place": place, "compared": compared}
    return {**trial.in_history(), **found, "status": trial.status(right)}


def check_torch_pruning(model: nn.Module, call: Call) -> dict[str, Any]:
    """Do what the first example of Torch-Pruning's README does: halve everything but the classifier, and run."""
    import torch_pruning

    parameters = count_parameters(model)
    with torch.no_grad():
        before = leaves_of(model(*call.args, **call.kwargs))
    example = call.args if not call.kwargs else dict(call.kwargs)
    if isinstance(example, tuple) and len(example) == 1:
        example = example[0]
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    result: dict[str, Any] = {"status": "failed", "parameters": parameters}
    start = time.perf_counter()
    try:
        pruner = torch_pruning.pruner.MagnitudePruner(
            model,
            example,
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=heads,
        )
        pruner.step()
        with torch.no_grad():
            after = leaves_of(model(*call.args, **call.kwargs))
    except Exception as error:
        return result | {"reason": f"{type(error).__name__}: {error}"[:500]}
    same = [t.shape for t in after] == [t.shape for t in before]
    return result | {
        "status": "runs" if same else "other shapes",
        "parameters_after": count_parameters(model),
        "seconds": {"all": time.perf_counter() - start},
    }


def count_parameters(module: nn.Module) -> int:
    """Return the number of entries of a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 3)


@contextmanager
def _as_the_oracle_keeps() -> Iterator[None]:
    """Leave gains alone, which the oracle does not rescale either."""
    with mock.patch("fxwidth.resizing.parameters.variance_ratio", return_value=1.0):
        yield


def _some(width: int, kept: int) -> list[int]:
    """Return the channels of a group to keep."""
    return sorted(np.random.default_rng(width).permutation(width)[:kept].tolist())


def set_apart(model: nn.Module) -> nn.Module:
    """Set vectors away from their defaults, and all that starts as one number: fresh, a wrong index map hides there."""
    generator = torch.Generator().manual_seed(0)
    parameters = {id(parameter) for parameter in model.parameters()}
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            last = name.rpartition(".")[2]
            uniform = tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all())
            redrawn = (last in _VECTORS and tensor.dim() == 1) or (uniform and id(tensor) in parameters)
            if not redrawn or not tensor.is_floating_point():
                continue
            noise = torch.rand(tensor.shape, generator=generator).to(tensor)
            is_scale = _VECTORS.get(last, False) if tensor.dim() == 1 else float(tensor.flatten()[0]) != 0
            tensor.copy_(0.75 + noise / 2 if is_scale else noise / 2 - 0.25)
    return model


def settle_batch_norms(model: nn.Module, call: Call) -> None:
    """Take running statistics near those of the input, without which deep networks let little of it through."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.8
        norm.train()
    with torch.no_grad(), suppress(Exception):
        model(*call.args, **call.kwargs)
        for norm in norms:
            if norm.running_var is not None:
                norm.running_var.mul_(0.5)  # half the channels will be gone, and half the variance
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


# Vector -> whether it is a scale; others, such as frequencies, mean something unless they start as one number.
_VECTORS = {"weight": True, "gamma": True, "running_var": True, "bias": False, "running_mean": False}


if __name__ == "__main__":
    main()
