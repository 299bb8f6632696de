"""Running a model on real numbers to learn from it, without changing it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from fxwidth.recording.tape import plain_kernels
from fxwidth.runtime.contexts import evaluating
from fxwidth.runtime.module_state import restored
from fxwidth.runtime.pytrees import map_leaves
from fxwidth.runtime.tensor_slots import substituted, tensor_slots


def copies(values: Iterable[Any]) -> list[Any]:
    """Return inputs to run a graph on that may write to them."""
    return [map_leaves(torch.clone, value) for value in values]


@contextmanager
def looking_on(module: nn.Module) -> Iterator[None]:
    """Have a module run in eval mode on plain ops; its buffers and what it keeps in attributes stay as they are."""
    with left_as_it_is(module), plain_kernels():
        yield


@contextmanager
def left_as_it_is(module: nn.Module, *, evaluates: bool = True) -> Iterator[None]:
    """Have a module run as it runs anywhere, in eval mode or in its own; its buffers and what it keeps stay as is.

    So do the states of the global random number generators.
    """
    tensors = {name: tensor for name, (tensor, _) in tensor_slots(module).items()}
    buffers = {name: tensor.clone() for name, tensor in tensors.items() if not isinstance(tensor, nn.Parameter)}
    mode = evaluating(module) if evaluates else nullcontext()
    # What modules hold is looked at in their own mode: what an interruption leaves to be put back late must have it.
    with restored(module), mode, substituted(module, buffers):
        yield
