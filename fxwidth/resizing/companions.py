"""Companions of a network: averaged copies and teachers, which take the same channels as it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from fxwidth.axes.index_maps import NEW
from fxwidth.errors import FxwidthError
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.option_values import HOW_TO_COPY
from fxwidth.options import ResizeOptions
from fxwidth.resizing.optimizer_state import Replacement
from fxwidth.rewriting.transaction import Transaction
from fxwidth.runtime.tensor_slots import tensor_slots
from fxwidth.tracing.analyze import analyze_module


def companions_of(width_graph: WidthGraph, options: ResizeOptions) -> list[WidthGraph]:
    """Return the companions of a resize, analysed, before anything has changed.

    Raises:
        FxwidthError: one is no copy of the graph, or shares tensors with it.
    """
    own = {id(tensor) for tensor, _ in tensor_slots(width_graph.analysis.module).values()}
    wanted = {group.name: group.width for group in width_graph.groups}
    result = []
    for place, module in enumerate(options.graphs_beside):
        if any(id(tensor) in own for tensor, _ in tensor_slots(module).values()):
            raise FxwidthError(
                f"also[{place}] shares tensors with the graph, and would be resized with it as it is. {HOW_TO_COPY}"
            )
        found = WidthGraph(analyze_module(module))
        groups = {group.name: group.width for group in found.groups}
        if groups != wanted:
            name = next((name for name in wanted if groups.get(name) != wanted[name]), "more groups")
            raise FxwidthError(
                f"also[{place}] is no copy of the graph: {name!r} has width {groups.get(name)}, and not "
                f"{wanted.get(name)}. Resize them together from the beginning. {HOW_TO_COPY}"
            )
        result.append(found)
    return result


def plan_for_companions(record: Mapping[str, Any]) -> dict[str, int | list[int]]:
    """Return the plan by which companions keep the channels that the network has kept, by its entry in the history."""
    return {name: record["kept"][name] if new < old else new for name, (old, new) in record["widths"].items()}


def options_for_companions(options: ResizeOptions) -> ResizeOptions:
    """Return the options of a companion's resize: it has no optimizer, and takes new channels from the network."""
    return replace(
        options, optimizer=None, also=(), rotate=False, directions="orthogonal", reader_step=False, loss=None
    )


def take_new_entries(
    companion: fx.GraphModule, replacements: Mapping[str, Replacement], transaction: Transaction
) -> None:
    """Give a companion the new entries that the network has: only then is there something to average.

    Args:
        companion: has been resized.
        replacements: the parameters and buffers of the network that were replaced, by name.
        transaction: that of the resize.
    """
    slots = tensor_slots(companion)
    for name, change in replacements.items():
        new = _new_entries(change)
        if not bool(new.any()):
            continue
        own = slots[name][0]
        values = torch.where(new.to(own.device), change.new.detach().to(own), own.detach())
        transaction.overwrite(own, values)


def _new_entries(change: Replacement) -> Tensor:
    """Return which entries of a parameter are new, of its shape."""
    result = torch.zeros(change.new.shape, dtype=torch.bool)
    for dim, indices in enumerate(change.indices):
        if indices is not None:
            own = torch.from_numpy(indices == NEW)
            result |= own.reshape([-1 if place == dim else 1 for place in range(result.dim())])
    return result
