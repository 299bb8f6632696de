"""The replay oracle op by op, for models whose outputs hide what they have computed, such as lists of boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxwidth.analysis.op_signatures import is_copy, is_view
from fxwidth.analysis.replay import ResizedReplay, ZeroedReplay, is_replayed
from fxwidth.analysis.result import Analysis
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.recording.data_dependent import depends_on_values
from fxwidth.recording.tape import OpCall, TapeRecorder, plain_kernels
from fxwidth.rules.registry import keeps
from fxwidth.runtime.contexts import evaluating
from fxwidth.verification.replay_oracle import largest_difference

aten = torch.ops.aten

# What these hold is chance until it is written to.
_CHANCE = (aten.empty, aten.new_empty, aten.empty_like, aten.empty_strided, aten.detach)


def stepwise_difference(
    analysis: Analysis, maps: IndexMaps, inputs: Sequence[Any], dtype: torch.dtype | None = torch.float64
) -> tuple[float, str]:
    """Return the largest difference of any result of any op between the zeroed and the resized run, and the op's place.

    Differences are relative to the largest number that the op works with. Arguments and errors are those of
    `verification.replay_difference`.
    """
    zeroed, resized = ZeroedReplay(analysis, maps, dtype), ResizedReplay(analysis, maps, dtype)
    worst, place = 0.0, ""
    for call, _ in zip(zeroed.steps(inputs), resized.steps(inputs), strict=True):
        scale = max((_magnitude(resized.value(tensor)) for tensor in [*call.inputs, *call.outputs]), default=0.0)
        for output in call.outputs:
            if output.is_floating_point():
                expected = zeroed.answer(output)
                found = largest_difference([resized.value(output)], [expected])
                if found < float("inf"):
                    found *= _magnitude(expected) / max(scale, 1e-12)
                if found > worst:
                    worst, place = found, f"{call.func} at node {call.node} (op {call.index} of the tape)"
    return worst, place


def prescribed_difference(
    module: fx.GraphModule,
    analysis: Analysis,
    maps: IndexMaps,
    inputs: Sequence[Any],
    dtype: torch.dtype | None = torch.float64,
    kind: type[ResizedReplay] = ResizedReplay,
) -> tuple[float, int]:
    """Return the largest difference between what a resized module computes and what it must, and how many ops that are.

    They are compared up to the first op that depends on values: from there on other things may have been found.

    Args:
        module: the module after the resize.
        analysis: the tape from before it.
        maps: which channels were kept; only removals can be replayed.
        inputs: one real value per placeholder, of the recorded shapes.
        dtype: the precision of the module and the inputs; None for whatever that is.
        kind: how the tape is run again.
    """
    comparison = _Comparison(kind(analysis, maps, dtype), inputs)
    with evaluating(module), plain_kernels(), TapeRecorder(keeps, comparison.see):
        fx.Interpreter(module).run(*inputs, enable_io_processing=False)
    comparison.end()
    return comparison.worst, comparison.compared


class _Comparison:
    """Takes in the ops of a real run, and has the replay go along with it."""

    def __init__(self, replay: ResizedReplay, inputs: Sequence[Any]) -> None:
        self.worst, self.compared = 0.0, 0
        self._replay = replay
        self._steps = self._replay.steps(inputs)
        self._has_ended = False

    def see(self, call: OpCall) -> None:
        """Compare one op that has just run."""
        self._has_ended = self._has_ended or depends_on_values(call.func, call.arguments)
        if self._has_ended or not is_replayed(call) or is_copy(call.func):
            return
        own = self._next()
        if own is None or _kind(own) != _kind(call):
            # What follows is no more what it is compared with.
            self.worst, self._has_ended = float("inf"), True
        elif call.func.overloadpacket not in _CHANCE:
            pairs = zip(call.outputs, map(self._replay.value, own.outputs), strict=True)
            floats = [(one, other) for one, other in pairs if one.is_floating_point()]
            self.worst = max([self.worst, *(largest_difference([one], [other]) for one, other in floats)])
            self.compared += len(floats)

    def end(self) -> None:
        """See that nothing is left that was to be done."""
        if not self._has_ended and self._next() is not None:
            self.worst = float("inf")

    def _next(self) -> OpCall | None:
        """Run the replay up to the next op that is compared."""
        return next((call for call in self._steps if not is_copy(call.func)), None)


def _kind(call: OpCall) -> str:
    # A reshape copies where the layout asks for it, which goes by the kernel that wrote the tensor.
    return "view" if is_view(call.func) else call.name


def _magnitude(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()].abs() if tensor.is_floating_point() else tensor.new_zeros(0)
    return float(finite.max()) if finite.numel() else 0.0
