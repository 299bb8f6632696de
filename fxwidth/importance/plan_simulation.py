"""Plans tried out on noise: how far the outputs of a network go when all its groups shrink together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, fx

from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.importance.estimates import Evidence
from fxwidth.importance.loss_sensitivity import shrunk_in_place
from fxwidth.recording.readonly_runs import copies, left_as_it_is
from fxwidth.runtime.finiteness import accumulation_dtype
from fxwidth.runtime.pytrees import deep_tensors
from fxwidth.runtime.tensor_slots import substituted
from fxwidth.statistics.moments import statistics_of_noise
from fxwidth.work_progress import each


def has_inputs(evidence: Evidence) -> bool:
    """Tell whether there are inputs among the evidence to try a plan on: it is from noise."""
    return evidence.moments is not None and bool(evidence.moments.inputs)


class Rehearsals:
    """Plans tried out on the inputs of some evidence; the network as it is is run once for all of them.

    Args:
        evidence: what widths were chosen by; it has inputs.
    """

    def __init__(self, evidence: Evidence) -> None:
        self._evidence = evidence.unrotated()

    def output_errors(self, plans: Sequence[Mapping[ChannelGroup, int]]) -> list[float]:
        """Return how far outputs go, squared, in units of their variance between samples, summed over outputs, by plan.

        Groups keep their bases, and batch norms normalise by what they see, before and after.

        Args:
            plans: widths of groups, all of which shrink at once; the others stay.
        """
        shrinking = [{group: k for group, k in plan.items() if k < group.width} for plan in plans]
        outputs = [_outputs(self._evidence, one) for one in each(shrinking, "trying plans")]
        # How many boxes a detector finds depends on their values: those of one plan are not those of another.
        same = [len({tensor.shape for tensor in every}) == 1 for every in zip(self._before, *outputs, strict=True)]
        return [
            sum(
                _distance(*pair)
                for pair, is_same in zip(zip(self._before, one, strict=True), same, strict=True)
                if is_same
            )
            for one in outputs
        ]

    @cached_property
    def _before(self) -> list[Tensor]:
        return _outputs(self._evidence, {})


def _distance(before: Tensor, after: Tensor) -> float:
    variance = float(before.var(0, correction=0).mean())
    return float((after - before).square().mean()) / variance if variance > 0 else 0.0


def _outputs(evidence: Evidence, widths: Mapping[ChannelGroup, int]) -> list[Tensor]:
    """Return what a network with some groups shrunk makes of the inputs, in the widest precision."""
    assert evidence.moments is not None
    module = evidence.width_graph.analysis.module
    tensors = shrunk_in_place(evidence, widths) if widths else {}
    noise = statistics_of_noise(evidence.width_graph)
    inputs = copies(evidence.moments.inputs)
    with left_as_it_is(module), torch.no_grad(), substituted(module, tensors), noise:
        result = fx.Interpreter(module).run(*inputs, enable_io_processing=False)
    return [out.to(accumulation_dtype(out)) for out in deep_tensors(result) if out.is_floating_point() and out.dim()]
