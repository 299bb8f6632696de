"""A step of what reads new channels down the loss: the one part of growth that changes the function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxwidth.analysis.roles import Role
from fxwidth.axes.index_maps import NEW, IndexMaps
from fxwidth.errors import FxwidthError
from fxwidth.gradients.gradient_run import Batch, loss_of
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.growth.recipes import Fill
from fxwidth.growth.tape_index import Slot
from fxwidth.option_keywords import Loss
from fxwidth.recording.readonly_runs import copies, left_as_it_is
from fxwidth.runtime.pytrees import sample_count
from fxwidth.runtime.tensor_slots import substituted, tensor_slots

# How long the longest new column may become, in units of the mean length of the present ones.
_LENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
# One batch of so many is held out of the gathering for the line search.
_EVERY = 4


def held_out(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Divide batches into those from which directions are gathered, and those by which the length of a step is chosen.

    Raises:
        FxwidthError: there is one batch alone, and it cannot be divided into samples.
    """
    if len(batches) > 1:
        places = set(range(_EVERY - 1, len(batches), _EVERY)) or {len(batches) - 1}
        return (
            [batch for place, batch in enumerate(batches) if place not in places],
            [batches[place] for place in sorted(places)],
        )
    size = sample_count(batches[0][0])
    tensors = [leaf for leaf in pytree.tree_leaves(batches[0]) if isinstance(leaf, Tensor) and leaf.dim()]
    if size < 2 or any(len(leaf) != size for leaf in tensors):
        raise FxwidthError(
            "reader_step=True holds some of data= out to choose the length of the step by, and was given one batch "
            "that cannot be divided into samples; pass two batches or more."
        )
    border = size - -(-size // _EVERY)
    parts = (slice(0, border), slice(border, size))
    first, second = (pytree.tree_map(lambda leaf, own=own: _part(leaf, own), batches[0]) for own in parts)
    return [first], [second]


def _part(leaf: Any, rows: slice) -> Any:
    return leaf[rows] if isinstance(leaf, Tensor) and leaf.dim() else leaf


def silent_columns(width_graph: WidthGraph, maps: IndexMaps, groups: Sequence[ChannelGroup]) -> dict[Slot, Tensor]:
    """Return the new positions of the dims that read new channels and are zero there, by parameter and dim."""
    result: dict[Slot, Tensor] = {}
    for group in groups:
        for site in group.sites:
            slot = site.parameter, site.dim
            entry = width_graph.analysis.parameters[site.parameter]
            is_silent = site.role is Role.READER and group.growth.fills.get(slot) is Fill.ZERO
            if is_silent and isinstance(entry.tensor, torch.nn.Parameter) and entry.tensor.is_floating_point():
                result[slot] = torch.from_numpy(np.flatnonzero(maps.indices(entry.axes[site.dim]) == NEW))
    return result


def stepped_readers(
    module: fx.GraphModule, columns: Mapping[Slot, Tensor], seen: Sequence[Batch], kept: Sequence[Batch], loss: Loss
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the readers of new channels after a step against the gradient, and what is told of it.

    Args:
        module: the network after growth; it is run in the mode that it is in, since batch norms treat new channels
            differently in each, every time with the same random numbers, and left as it was.
        columns: the new positions of the dims that read new channels.
        seen: the batches that the gradient is taken from.
        kept: others, by whose loss the length of the step is chosen: where none lowers it, nothing is returned.
        loss: a function of the module's output and the targets; returns the mean over a batch.

    Raises:
        FxwidthError: the module does not run on a batch, or the loss does not return one finite number.
    """
    slots = tensor_slots(module)
    present = {name: slots[name][0].detach() for name, _ in columns}
    steps = _steps(_gradients(module, present, seen, loss), columns)
    before = mean_loss(module, {}, kept, loss)
    told = {"loss_before": before, "loss_after": before, "length": 0.0}
    best: dict[str, Tensor] = {}
    unit = _unit(present, steps, columns)
    for length in _LENGTHS if unit > 0 else ():
        moved = {name: tensor + length * unit * steps[name] for name, tensor in present.items()}
        after = mean_loss(module, moved, kept, loss)
        if after < told["loss_after"]:
            best, told = moved, {"loss_before": before, "loss_after": after, "length": length}
    return best, told


def _gradients(
    module: fx.GraphModule, tensors: Mapping[str, Tensor], batches: Sequence[Batch], loss: Loss
) -> dict[str, Tensor]:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    totals = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    with left_as_it_is(module, evaluates=False), torch.enable_grad(), substituted(module, leaves):
        for values, targets in batches:
            found = torch.autograd.grad(
                loss_of(loss, _output(module, values), targets), list(leaves.values()), allow_unused=True
            )
            for name, gradient in zip(leaves, found, strict=True):
                if gradient is not None:
                    totals[name] += gradient * max(1, sample_count(values))
    return totals


def _steps(gradients: Mapping[str, Tensor], columns: Mapping[Slot, Tensor]) -> dict[str, Tensor]:
    """Return minus the gradients at the new columns, and zero elsewhere."""
    result = {name: torch.zeros_like(gradient) for name, gradient in gradients.items()}
    for (name, dim), places in columns.items():
        places = places.to(gradients[name].device)
        result[name].index_copy_(dim, places, -gradients[name].index_select(dim, places))
    return result


def _unit(present: Mapping[str, Tensor], steps: Mapping[str, Tensor], columns: Mapping[Slot, Tensor]) -> float:
    """Return by what a step is multiplied to be as long as the present columns; zero where there is no step."""
    lengths = []
    for (name, dim), places in columns.items():
        old = torch.ones(present[name].shape[dim], dtype=torch.bool)
        old[places] = False
        norms = present[name].movedim(dim, 0)[old.to(present[name].device)].flatten(1).norm(dim=1)
        longest = steps[name].movedim(dim, 0).flatten(1).norm(dim=1).max()
        if norms.numel() and bool(norms.mean() > 0) and bool(longest > 0) and bool(longest.isfinite()):
            lengths.append(float(norms.mean() / longest))
    return min(lengths, default=0.0)


def mean_loss(module: fx.GraphModule, tensors: Mapping[str, Tensor], batches: Sequence[Batch], loss: Loss) -> float:
    """Return the mean loss over batches, in the mode of the module, with some tensors in the place of its own.

    Args:
        module: is left as it was.
        tensors: by the names of those that they stand for.
        batches: values for its inputs, and targets.
        loss: a function of its output and the targets; returns the mean over a batch.

    Raises:
        FxwidthError: the module does not run on a batch, or the loss does not return one finite number.
    """
    total, samples = 0.0, 0
    with left_as_it_is(module, evaluates=False), torch.no_grad(), substituted(module, tensors):
        for values, targets in batches:
            size = max(1, sample_count(values))
            total += size * float(loss_of(loss, _output(module, values), targets))
            samples += size
    return total / samples


def _output(module: fx.GraphModule, values: Sequence[Any]) -> Any:
    try:
        output = fx.Interpreter(module).run(*copies(values), enable_io_processing=False)
    except Exception as error:
        raise FxwidthError(f"the network does not run on a batch of data after growth: {error}.") from error
    return module.graph.process_outputs(output)
