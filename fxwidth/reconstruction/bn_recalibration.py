"""Batch norm statistics after a resize, by what the same inputs show in the network before it and after it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from fxwidth.analysis.result import Analysis
from fxwidth.axes.index_maps import NEW, Indices
from fxwidth.recording.readonly_runs import copies, looking_on
from fxwidth.recording.tape import OpCall, bind
from fxwidth.rules.family_table import running_norm
from fxwidth.runtime.process_groups import of_all_ranks, rank_share
from fxwidth.runtime.tensor_slots import tensor_slots
from fxwidth.statistics.calibration_data import batches_from, cut_anew
from fxwidth.weights.readers import Wiring
from fxwidth.work_progress import each

# Differences between two runs on the same inputs take few of these to be seen well.
SAMPLES = 512


@dataclass(frozen=True)
class _Statistics:
    """Mean and variance per channel of what a batch norm is given, over so many values of each, and its eps."""

    rows: int
    mean: Tensor
    variance: Tensor
    eps: float

    def at(self, kept: Tensor) -> _Statistics:
        """Return those of some channels."""
        return _Statistics(self.rows, self.mean[kept], self.variance[kept], self.eps)


@dataclass(frozen=True)
class _Running:
    """The running statistics that a batch norm starts from.

    Attributes:
        mean: per channel that was there before.
        variance: likewise.
        kept: the old positions of the channels that have one.
        places: and their new positions.
    """

    mean: Tensor
    variance: Tensor
    kept: Tensor
    places: Tensor

    def corrected(self, before: _Statistics, after: _Statistics) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the channels that were there before, by the change from one run to another."""
        before, after, eps = before.at(self.kept), after.at(self.places), after.eps
        # Batch norm divides by the variance and eps: so a channel that hardly varies is not moved by rounding errors.
        share = (after.variance + eps) / (before.variance + eps)
        mean, variance = self.mean[self.kept].to(share), self.variance[self.kept].to(share)
        return mean + (after.mean - before.mean), ((variance + eps) * share - eps).clamp_min(0)


class Recalibration:
    """Batch norm's running statistics, corrected by what a resize has done to the inputs of each batch norm.

    The running mean moves by the difference between the means that some inputs give after the resize and before it;
    the running variance is multiplied by the quotient of the variances. So what the statistics owe to the whole of
    training stays, and a resize that loses nothing changes nothing.

    Args:
        analysis: the graph before the resize.
        data: batches as for `fxwidth.resize`, of which the first `SAMPLES` inputs are kept in memory.
        others: the names of running statistics that stay as they are, with their batch norms.

    Raises:
        FxwidthError: the data cannot be used.
    """

    def __init__(self, analysis: Analysis, data: Iterable[Any], others: Collection[str] = ()) -> None:
        self._module = analysis.module
        self._others = frozenset(others)
        # Each batch is normalised by itself after the resize, so results would depend on how the data are cut.
        own = batches_from(analysis, data, rank_share(SAMPLES))
        self._batches = list(cut_anew(analysis, of_all_ranks("the batches for batch norms", own), SAMPLES))
        self._tensors = {name: tensor.detach().clone() for name, (tensor, _) in _buffers(self._module).items()}
        self._before = [self._run(values, None, {}) for values in self._batches]

    def corrected(self, kept: Mapping[str, Indices]) -> dict[str, Tensor]:
        """Return the running statistics that the module, which has been resized by now, should have, by buffer name.

        Args:
            kept: for each buffer of another size the old position of each new entry, `NEW` for none.
        """
        running = {
            names: _running_of(self._tensors[names[0]], self._tensors[names[1]], kept.get(names[0]))
            for names in dict.fromkeys(names for before in self._before for names in before)
        }
        pairs = list(zip(self._batches, self._before, strict=True))
        after = [self._run(values, before, running) for values, before in each(pairs, "recalibrating batch norms")]
        result: dict[str, Tensor] = {}
        slots = _buffers(self._module)
        for names, start in running.items():
            pooled = [_pooled([one for run in runs for one in run.get(names, [])]) for runs in (self._before, after)]
            if pooled[0] is None or pooled[1] is None or not len(start.kept):
                continue
            moved = start.corrected(pooled[0], pooled[1])
            for name, values in zip(names, moved, strict=True):
                tensor = slots[name][0].detach().clone()
                tensor[start.places] = values.to(tensor)
                if bool(tensor.isfinite().all()):
                    result[name] = tensor
        return result

    def _run(
        self,
        values: Sequence[Any],
        before: Mapping[tuple[str, str], list[_Statistics]] | None,
        running: Mapping[tuple[str, str], _Running],
    ) -> dict[tuple[str, str], list[_Statistics]]:
        """Run the module and return what its batch norms are given, by the names of their running statistics."""
        with looking_on(self._module):
            # By their addresses while the module runs on copies of them.
            buffers = {name: slot for name, slot in _buffers(self._module).items() if name not in self._others}
            strided = {name: tensor for name, (tensor, _) in buffers.items() if tensor.layout is torch.strided}
            names = {tensor.data_ptr(): name for name, tensor in strided.items() if tensor.numel()}
            watch = _Watch(names, before, running)
            with watch:
                fx.Interpreter(self._module).run(*copies(values), enable_io_processing=False)
        return watch.seen


def statistics_used_elsewhere(wiring: Wiring) -> dict[str, str]:
    """Return the running statistics of batch norms that are not to be corrected, since others use them, and why."""
    names = wiring.analysis.names

    def as_statistic(call: OpCall, tensor: Tensor) -> bool:
        return any(own is tensor for own in _running_statistics(call))

    calls = wiring.analysis.calls
    found = {names.get(own) for call in calls for own in _running_statistics(call)} - {None}
    return {
        name: "it is used for something else too"
        for name in sorted(map(str, found))
        if not wiring.used_only(name, as_statistic)
    }


def _running_statistics(call: OpCall) -> list[Any]:
    norm = running_norm(call.func)
    return [] if norm is None else [call.arguments.get(norm.mean), call.arguments.get(norm.variance)]


def _buffers(module: nn.Module) -> dict[str, tuple[Tensor, Any]]:
    return {name: slot for name, slot in tensor_slots(module).items() if not isinstance(slot[0], nn.Parameter)}


def _running_of(mean: Tensor, variance: Tensor, kept: Indices | None) -> _Running:
    kept = np.arange(len(mean)) if kept is None else kept
    places = np.flatnonzero(kept != NEW)
    return _Running(mean, variance, *(torch.from_numpy(indices).to(mean.device) for indices in (kept[places], places)))


def _pooled(parts: Sequence[_Statistics]) -> _Statistics | None:
    """Return the statistics of several batches taken together."""
    if not parts:
        return None
    rows = sum(part.rows for part in parts)
    mean = torch.stack([part.mean * (part.rows / rows) for part in parts]).sum(0)
    spread = [(part.variance + (part.mean - mean).square()) * (part.rows / rows) for part in parts]
    return _Statistics(rows, mean, torch.stack(spread).sum(0), parts[0].eps)


class _Watch(TorchDispatchMode):
    """Notes what every batch norm is given, and lets it normalise by statistics that are corrected by it."""

    def __init__(
        self,
        names: Mapping[int, str],
        before: Mapping[tuple[str, str], list[_Statistics]] | None,
        running: Mapping[tuple[str, str], _Running],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: dict[tuple[str, str], list[_Statistics]] = {}
        self._names = names
        self._before = before
        self._running = running

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one op."""
        norm = running_norm(func)
        if norm is None:
            return func(*args, **(kwargs or {}))
        arguments = bind(func, args, kwargs or {})
        tensors = [arguments[norm.mean], arguments[norm.variance]]
        names = [None if tensor is None else self._names.get(tensor.data_ptr()) for tensor in tensors]
        result = func(*args, **(kwargs or {}))
        if names[0] is None or names[1] is None:
            return result
        key = names[0], names[1]
        signal = arguments["input"]
        wide = signal if signal.dtype == torch.float64 else signal.float()
        variance, mean = torch.var_mean(wide, [dim for dim in range(signal.dim()) if dim != 1], correction=0)
        eps = arguments[norm.eps]
        calls = self.seen.setdefault(key, [])
        calls.append(_Statistics(signal.numel() // signal.shape[1], mean, variance, eps))
        if self._before is None or len(self._before.get(key, ())) < len(calls):
            return result
        start = self._running[key]
        moved = start.corrected(self._before[key][len(calls) - 1], calls[-1])
        center, spread = (tensor.detach().to(wide.dtype).clone() for tensor in tensors)
        center[start.places], spread[start.places] = (values.to(wide.dtype) for values in moved)
        gain = (spread + eps).rsqrt() * (1.0 if arguments["weight"] is None else arguments["weight"])
        shift = (0.0 if arguments[norm.bias] is None else arguments[norm.bias]) - center * gain
        shape = [-1, *[1] * (signal.dim() - 2)]
        return (torch.addcmul(shift.view(shape), wide, gain.view(shape)).to(signal.dtype), *result[1:])
