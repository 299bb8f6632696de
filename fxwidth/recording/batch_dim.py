"""Which dim of a model's inputs is the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxwidth.axes.factors import Factor
from fxwidth.recording.tape import plain_kernels
from fxwidth.runtime.contexts import evaluating, quiet
from fxwidth.runtime.module_state import restored
from fxwidth.runtime.pytrees import deep_tensors, map_leaves
from fxwidth.runtime.tensor_slots import substituted


def batch_factor(
    module: fx.GraphModule, inputs: Sequence[Any], fakes: Mapping[str, Tensor], mode: FakeTensorMode, by_value: bool
) -> Factor | None:
    """Return the factor of the first dim of a graph's inputs, or None where they have no batch.

    The first input with tensors tells; others may have no batch (positions, a mask for all samples).

    Args:
        module: the graph.
        inputs: fake tensors, or nested values of them, one per placeholder.
        fakes: those for its parameters and buffers, by name.
        mode: the mode of the fake tensors.
        by_value: whether what the graph does depends on values.
    """
    first = next((value for value in inputs if deep_tensors(value)), None)
    size = next((tensor.shape[0] for tensor in deep_tensors(first) if tensor.dim() > 0), 1)
    if size < 2:
        return None
    # A list may hold single samples, whose first dims are channels.
    if isinstance(first, (list, tuple)) and (by_value or not takes_larger(module, inputs, fakes, mode)):
        return None
    batch = Factor(size, "batch")
    batch.is_batch = True
    return batch


def takes_larger(
    module: fx.GraphModule, inputs: Sequence[Any], fakes: Mapping[str, Tensor], mode: FakeTensorMode
) -> bool:
    """Tell whether a graph runs on inputs whose first dims are all larger by one."""
    try:
        with evaluating(module), substituted(module, fakes, restoring=restored), plain_kernels(), quiet(), mode:
            larger = [map_leaves(_one_more, value) for value in inputs]
            fx.Interpreter(module).run(*larger, enable_io_processing=False)
    except Exception:
        return False
    return True


def _one_more(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor[:1]]) if tensor.dim() else tensor
