"""The replay oracle with the values that a graph has now: its weights may have been refitted since the resize."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxwidth.analysis.replay import ResizedReplay
from fxwidth.analysis.replay_places import Places
from fxwidth.analysis.result import Analysis
from fxwidth.axes.index_maps import NEW, IndexMaps
from fxwidth.errors import FxwidthError
from fxwidth.recording.readonly_runs import copies, looking_on
from fxwidth.recording.tape import Axes
from fxwidth.runtime.pytrees import deep_tensors
from fxwidth.runtime.tensor_slots import tensor_slots
from fxwidth.verification.replay_oracle import largest_difference, reference_outputs
from fxwidth.verification.stepwise import prescribed_difference


@dataclass(frozen=True)
class Found:
    """What a comparison of a resized graph with the tape of before has found.

    Attributes:
        by_ops: the largest difference of a result of an op from the op that is prescribed, relative to its size.
        compared: how many results were compared.
        by_zeros: the largest difference of an output from that of the graph of before, with the present values at the
            places that have stayed and zeros at the others; None where channels were added, where what the graph does
            depends on values, or where norms count their channels otherwise.
    """

    by_ops: float
    compared: int
    by_zeros: float | None


def compare_with_tape(module: fx.GraphModule, before: Analysis, maps: IndexMaps, inputs: Sequence[Any]) -> Found:
    """Compare a resized graph with the tape of before the resize, on the values that it has now.

    Args:
        module: the graph; it is left as it was.
        before: its analysis of before the resize; values of parameters are not looked at.
        maps: what has become of each dim.
        inputs: one real value per placeholder, of the recorded shapes.

    Raises:
        FxwidthError: an op does not run, or its result has not the prescribed shape; the message names op and node.
    """
    present = _tensors_now(module, before, maps)
    own = _with_tensors(before, present)
    with looking_on(module):
        by_ops, compared = prescribed_difference(module, own, maps, copies(inputs), None, _PresentReplay)
    return Found(by_ops, compared, _by_zeros(module, before, maps, inputs, present))


def _by_zeros(
    module: fx.GraphModule, before: Analysis, maps: IndexMaps, inputs: Sequence[Any], present: dict[str, Tensor]
) -> float | None:
    adds = any((maps.indices(axis) == NEW).any() for entry in before.parameters.values() for axis in entry.axes)
    if before.record is not None or adds or any(maps.variance_ratio(call.index) != 1.0 for call in before.calls):
        return None
    places = Places(before, maps)
    scattered = {name: places.scatter(present[name], entry.axes) for name, entry in before.parameters.items()}
    expected = reference_outputs(_with_tensors(before, scattered), maps, copies(inputs), None)
    with looking_on(module), torch.no_grad():
        answer = fx.Interpreter(module).run(*copies(inputs), enable_io_processing=False)
    outputs = deep_tensors(answer)
    if len(outputs) != len(expected):
        return None
    return largest_difference(outputs, expected)


class _PresentReplay(ResizedReplay):
    """The prescribed ops on parameters that have their new sizes already."""

    def parameter(self, tensor: Tensor, axes: Axes) -> Tensor:  # noqa: ARG002 - that of the base class
        """Return a parameter as it is."""
        return tensor


def _with_tensors(analysis: Analysis, tensors: dict[str, Tensor]) -> Analysis:
    entries = {name: replace(entry, tensor=tensors[name]) for name, entry in analysis.parameters.items()}
    return replace(analysis, parameters=entries, memo={})


def _tensors_now(module: fx.GraphModule, before: Analysis, maps: IndexMaps) -> dict[str, Tensor]:
    """Return the parameters and buffers of a graph by the names that they had before.

    Raises:
        FxwidthError: one is not there, or has not the prescribed shape.
    """
    slots = tensor_slots(module)
    found: dict[str, Tensor] = {}
    for name, entry in before.parameters.items():
        wanted = tuple(maps.size(axis) for axis in entry.axes)
        if name not in slots or tuple(slots[name][0].shape) != wanted:
            own = f"has shape {tuple(slots[name][0].shape)}" if name in slots else "is not in the graph"
            raise FxwidthError(f"{name} {own}, where {wanted} is prescribed.")
        found[name] = slots[name][0].detach()
    return found
