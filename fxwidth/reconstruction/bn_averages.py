"""Running statistics of batch norms as averages over data, whatever they were before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from fxwidth.analysis.result import Analysis
from fxwidth.errors import FxwidthError
from fxwidth.recording.readonly_runs import copies, left_as_it_is
from fxwidth.recording.tape import bind
from fxwidth.rules.family_table import running_norm
from fxwidth.runtime.module_state import walk
from fxwidth.runtime.tensor_slots import tensor_slots
from fxwidth.statistics.calibration_data import batches_from
from fxwidth.work_progress import each

_COUNT = "num_batches_tracked"


def averaged_statistics(analysis: Analysis, data: Iterable[Any]) -> dict[str, Tensor]:
    """Return new running statistics and counts of batches, by buffer name: averages over all batches, alike in weight.

    Args:
        analysis: the graph, which is run in training mode, and left as it was.
        data: batches as for `fxwidth.resize`.

    Raises:
        FxwidthError: the data do not fit or are none, or a batch norm sees numbers that are not finite.

    Source: P. Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization (2018), section 3.2.
    """
    module = analysis.module
    seen: dict[tuple[str, str], _Sums] = {}
    number = 0
    with _in_training(module):
        for values in each(batches_from(analysis, data, None), "recalibrating batch norms"):
            number += 1
            _run(module, values, seen)
    if not number:
        raise FxwidthError("RecalibrateBatchNorm: data= holds no batch; pass at least one.")
    slots, result = tensor_slots(module), dict[str, Tensor]()
    for (mean, variance), sums in seen.items():
        averages = {mean: sums.mean / sums.count, variance: sums.variance / sums.count}
        for name, average in averages.items():
            if not bool(average.isfinite().all()):
                raise FxwidthError(
                    f"{name} would not be finite: its batch norm sees numbers that are not, or a single one per "
                    "channel in a batch. Pass batches of several inputs, and leave out such that are not finite."
                )
            result[name] = average
        counter = f"{mean.rpartition('.')[0]}.{_COUNT}".lstrip(".")
        if counter in slots:
            result[counter] = torch.full_like(slots[counter][0], sums.count)
    return result


@contextmanager
def _in_training(module: fx.GraphModule) -> Iterator[None]:
    """Put a graph in training mode for a while, in which frozen parts stay in evaluation."""
    before = [(part, part.training) for _, part in walk(module)]
    try:
        module.train()
        yield
    finally:
        for part, mode in before:
            part.training = mode


@dataclass
class _Sums:
    """Sums over batches of what a batch norm is given."""

    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    variance: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, mean: Tensor, variance: Tensor) -> None:
        self.count += 1
        self.mean, self.variance = mean + self.mean.to(mean), variance + self.variance.to(variance)


def _run(module: fx.GraphModule, values: Sequence[Any], seen: dict[tuple[str, str], _Sums]) -> None:
    with left_as_it_is(module, evaluates=False), torch.no_grad():
        # By their addresses while the module runs on copies of them.
        buffers = {name: own for name, (own, _) in tensor_slots(module).items() if not isinstance(own, nn.Parameter)}
        names = {own.data_ptr(): name for name, own in buffers.items() if own.layout is torch.strided and own.numel()}
        with _Watch(names, seen):
            fx.Interpreter(module).run(*copies(values), enable_io_processing=False)


class _Watch(TorchDispatchMode):
    """Notes what every batch norm that is in training is given."""

    def __init__(self, names: Mapping[int, str], seen: dict[tuple[str, str], _Sums]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = names
        self._seen = seen

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one op."""
        norm = running_norm(func)
        if norm is not None:
            arguments = bind(func, args, kwargs or {})
            tensors = [arguments[norm.mean], arguments[norm.variance]]
            names = [None if tensor is None else self._names.get(tensor.data_ptr()) for tensor in tensors]
            if names[0] is not None and names[1] is not None and arguments.get("training", arguments.get("train")):
                signal = arguments["input"]
                wide = signal if signal.dtype == torch.float64 else signal.float()
                variance, mean = torch.var_mean(wide, [dim for dim in range(signal.dim()) if dim != 1], correction=1)
                self._seen.setdefault((names[0], names[1]), _Sums()).add(mean, variance)
        return func(*args, **(kwargs or {}))
