"""How long a forward pass takes at given widths, from times measured on the device in use."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from fxwidth.analysis.replay import ResizedReplay
from fxwidth.analysis.result import Analysis
from fxwidth.axes.factors import Factor
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.axes.polynomials import Polynomial, entries_polynomial
from fxwidth.costs.counts import call_flops
from fxwidth.costs.registry import register
from fxwidth.errors import FxwidthError
from fxwidth.frontends.placeholder_calls import call_with
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.memo import per_graph
from fxwidth.recording.readonly_runs import left_as_it_is
from fxwidth.recording.tape import OpCall, tensors_in, unbind
from fxwidth.statistics.synthetic_inputs import noise_draws

# The shares of every free width at which each op is timed: three unknowns per op, and one time to spare.
SHARES = (1.0, 0.75, 0.5, 0.25)
_REPEATS = 5
_LEAST_SECONDS = 2e-3
_ROUNDS = 500
_MICROSECONDS = 1e6

Features = npt.NDArray[np.float64]


@dataclass
class LatencyTable:
    """Measured seconds of single ops, by device, op, shapes and literals; `LATENCIES` is the one that plans use."""

    seconds: dict[str, float]
    clearings: int = 0

    def clear(self) -> None:
        """Forget all measurements, e.g. after the machine's load has changed."""
        self.seconds.clear()
        self.clearings += 1


LATENCIES = LatencyTable({})


@register("latency", unit="microseconds")
def latency_polynomial(width_graph: WidthGraph) -> Polynomial:
    """Return the microseconds of a forward pass in eval mode on the example inputs, on the device of the parameters.

    Every op of the tape is timed by itself, at the present widths and with all free widths at 75, 50 and 25 %; its time
    is then taken to be a constant, plus so much per multiplication, plus so much per byte that it reads and writes,
    none of them negative. The sum is scaled so that it agrees with the time of the whole graph at the present widths.

    Raises:
        FxwidthError: the model is on the meta device, or an op does not run.

    Source: the form is the roofline's, S. Williams, A. Waterman and D. Patterson, Roofline: An Insightful Visual
        Performance Model for Multicore Architectures (2009), with a sum for its maximum.
    """
    return Polynomial.sum([(_MICROSECONDS, _measured(width_graph, LATENCIES.clearings))])


@per_graph
def _measured(width_graph: WidthGraph, _clearings: int) -> Polynomial:
    analysis = width_graph.analysis
    inputs = _inputs(analysis)
    times: dict[int, list[float]] = {}
    widths: list[dict[Factor, int]] = []
    with left_as_it_is(analysis.module):
        for share in SHARES:
            widths.append({g.factor: max(1, round(share * g.width)) for g in width_graph.free})
            maps = IndexMaps(analysis.space, {factor: np.arange(width) for factor, width in widths[-1].items()})
            for index, once in _TimedReplay(analysis, maps).times(inputs).items():
                times.setdefault(index, []).append(once)
        call = call_with(analysis.module, inputs)
        whole = seconds_of(lambda: analysis.module(*call.args, **call.kwargs), _device(analysis))
    parts = []
    for index, seconds in times.items():
        work = [call_flops(width_graph, analysis.calls[index]), traffic(analysis, analysis.calls[index])]
        features = np.array([[1.0, *(part(at) for part in work)] for at in widths])
        rates = nonnegative_fit(features, np.array(seconds)).tolist()
        parts += list(zip(rates, [Polynomial({(): 1}), *work], strict=True))
    total = Polynomial.sum(parts)
    return Polynomial.sum([(whole / total({}), total)]) if total({}) > 0 else Polynomial({(): whole})


def seconds_of(run: Callable[[], Any], device: torch.device, repeats: int = _REPEATS) -> float:
    """Return the least time of a call in seconds, after one to warm up; short calls are timed several at once."""
    with torch.no_grad():
        run()
        once = _elapsed(run, 1, device)
        loops = max(1, min(200, int(_LEAST_SECONDS / max(once, 1e-9))))
        # The least, since other work on the machine only ever adds.
        return min(_elapsed(run, loops, device) for _ in range(repeats)) / loops


def _elapsed(run: Callable[[], Any], loops: int, device: torch.device) -> float:
    _synchronize(device)
    started = time.perf_counter()
    for _ in range(loops):
        run()
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _device(analysis: Analysis) -> torch.device:
    tensors = [entry.tensor for entry in analysis.parameters.values()]
    device = tensors[0].device if tensors else torch.device("cpu")
    if device.type == "meta":
        raise FxwidthError("the model is on the meta device, where nothing can be timed; leave latency out.")
    return device


def _inputs(analysis: Analysis) -> list[Any]:
    """Return noise of the recorded shapes."""
    _device(analysis)
    values = next(iter(noise_draws(analysis, [], 0, 0.0))).batch()
    pairs = zip(values, analysis.inputs, strict=True)
    # As many samples as were recorded, again and again the same where there are more.
    return [
        value[torch.arange(len(like)) % len(value)] if isinstance(like, Tensor) and like.dim() else value
        for value, like in pairs
    ]


def traffic(analysis: Analysis, call: OpCall) -> Polynomial:
    """Return the bytes of an op's operands and results."""
    tensors = [(tensor, call.axes[tensor]) for tensor in {tensor: tensor for tensor in call.inputs}.values()]
    tensors += list(zip(call.outputs, call.output_axes, strict=True))
    return Polynomial.sum(
        (tensor.element_size(), entries_polynomial(analysis.space, [axes])) for tensor, axes in tensors
    )


class _TimedReplay(ResizedReplay):
    """Runs the prescribed ops on sliced parameters and times each."""

    def __init__(self, analysis: Analysis, maps: IndexMaps) -> None:
        super().__init__(analysis, maps, None)
        self._seconds: dict[int, float] = {}
        self._where = _device(analysis)
        self._index = 0

    def times(self, inputs: Sequence[Any]) -> Mapping[int, float]:
        """Return the seconds of each op that does any work, by its index."""
        self.run(inputs)
        return self._seconds

    def execute(self, call: OpCall) -> list[Tensor]:
        """Run one op."""
        self._index = call.index
        return super().execute(call)

    def call_op(self, func: OpOverload, arguments: dict[str, Any], lift: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Run an op and time it, unless it only looks at memory in another way or has been timed before."""
        concrete = {
            name: pytree.tree_map(lambda leaf: lift(leaf) if isinstance(leaf, Tensor) else leaf, value)
            for name, value in arguments.items()
        }
        args, kwargs = unbind(func, concrete)
        operands = {tensor.untyped_storage().data_ptr() for tensor in tensors_in(concrete)}
        if func._schema.is_mutable:
            # On copies, so that what repeated calls write does not pile up in what the next op reads.
            args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
        result = super().call_op(func, arguments, lift)
        if func._schema.is_mutable or any(out.untyped_storage().data_ptr() not in operands for out in result):
            key = repr((_device_name(self._where), str(func), pytree.tree_map(_described, concrete)))
            if key not in LATENCIES.seconds:
                LATENCIES.seconds[key] = seconds_of(lambda: func(*args, **kwargs), self._where)
            self._seconds[self._index] = LATENCIES.seconds[key]
        return result


def _described(value: Any) -> Any:
    return (tuple(value.shape), value.stride(), str(value.dtype)) if isinstance(value, Tensor) else value


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{device.type} {platform.processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def nonnegative_fit(features: Features, values: Features) -> Features:
    """Return weights x >= 0 of least squared relative error of features @ x against positive values.

    Args:
        features: [n, k], none negative.
        values: [n].

    Source: coordinate descent for non-negative least squares, as in V. Franc, V. Hlavac and M. Navara, Sequential
        Coordinate-Wise Algorithm for the Non-negative Least Squares Problem (2005).
    """
    rows = features / np.maximum(values, 1e-12)[:, None]
    sizes = np.maximum(np.sqrt((rows**2).sum(0)), 1e-300)
    rows = rows / sizes
    gram, target = rows.T @ rows, rows.T @ np.ones(len(values))
    weights = np.zeros(features.shape[1])
    for _ in range(_ROUNDS):
        for k in range(len(weights)):
            if gram[k, k] > 0:
                weights[k] = max(0.0, weights[k] + (target[k] - gram[k] @ weights) / gram[k, k])
    return np.asarray(weights / sizes, dtype=np.float64)
