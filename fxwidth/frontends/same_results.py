"""Whether a graph gives what its model gives, seen by running both on the same inputs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxwidth.frontends.call_signature import Argument, invoke
from fxwidth.recording.readonly_runs import copies, left_as_it_is
from fxwidth.runtime.pytrees import deep_tensors

# Of the largest number of each result: other ways of computing the same round otherwise.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_COARSE = 3e-2


def give_the_same(
    model: nn.Module, graph: fx.GraphModule, arguments: Sequence[Argument], values: Sequence[Any]
) -> bool:
    """Tell whether a graph gives what a model gives, and leaves its buffers as the model leaves them.

    Both are run in the modes that they are in, and left as they are.

    Args:
        model: the module.
        graph: its graph.
        arguments: those of the model's forward.
        values: what is given for them.
    """
    (own, own_state), (other, other_state) = (_results(module, arguments, values) for module in (model, graph))
    # What the graph does not hold it does not write to.
    pairs = [*zip(own, other, strict=False)]
    pairs += [(value, other_state.get(name, model.get_buffer(name))) for name, value in own_state.items()]
    return len(own) == len(other) and all(_are_close(*pair) for pair in pairs)


def _results(
    module: nn.Module, arguments: Sequence[Argument], values: Sequence[Any]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return what a module gives, and what its buffers hold afterwards."""
    with left_as_it_is(module, evaluates=False), torch.no_grad():
        # Noise is the same for both where both draw it alike; where not, they cannot be compared.
        torch.manual_seed(0)
        given = deep_tensors(invoke(module, arguments, copies(copy.deepcopy(values))))
        return given, {name: buffer.clone() for name, buffer in module.named_buffers()}


def _are_close(own: Tensor, other: Tensor) -> bool:
    if own.shape != other.shape or own.dtype != other.dtype or own.is_meta:
        return False
    if not (own.is_floating_point() or own.is_complex()):
        return torch.equal(own, other)
    precise = torch.complex128 if own.is_complex() else torch.float64
    tolerance = _TOLERANCE.get(own.real.dtype if own.is_complex() else own.dtype, _COARSE)
    own, other = own.to(precise), other.to(precise)
    scale = float(own.abs().nan_to_num().amax()) if own.numel() else 0.0
    return torch.allclose(own, other, rtol=0.0, atol=tolerance * scale, equal_nan=True)
