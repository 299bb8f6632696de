"""Export of what a model does when it is exported, where it goes another way then and its own cannot be exported.

No rule tells that both ways are the same function, so both are run on the example inputs, in the mode that is traced.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxwidth.errors import warn
from fxwidth.frontends.call_signature import Argument, invoke
from fxwidth.frontends.export import exported_graph
from fxwidth.recording.readonly_runs import copies, left_as_it_is
from fxwidth.runtime.pytrees import deep_tensors
from fxwidth.runtime.trace_guards import UntraceableError

# Of the largest number of each result: other ways of computing the same round otherwise.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_COARSE = 3e-2


def exported_otherwise(
    model: nn.Module, arguments: Sequence[Argument], device: torch.device, askers: Collection[str]
) -> fx.GraphModule:
    """Return the graph of what a model does when it is exported, if that gives what the model gives.

    Args:
        model: the module, in the mode that is traced.
        arguments: those of its forward, with examples or defaults.
        device: where its parameters are.
        askers: the Python modules that have asked whether the model is exported.

    Raises:
        UntraceableError: the graph gives something else.
    """
    graph = exported_graph(model, arguments, device, nullcontext)
    values = [argument.value for argument in arguments]
    graph.train(model.training)
    (own, own_state), (other, other_state) = (_results(module, arguments, values) for module in (model, graph))
    # What the graph does not hold it does not write to.
    pairs = [*zip(own, other, strict=False)]
    pairs += [(value, other_state.get(name, model.get_buffer(name))) for name, value in own_state.items()]
    if len(own) != len(other) or not all(_are_close(*pair) for pair in pairs):
        raise UntraceableError(f"the model gives other results when it is exported ({_told(askers)} asks for that)")
    return graph


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


def warn_of_other_way(model: nn.Module, askers: Collection[str]) -> None:
    """Warn that a graph does what the model does when it is exported."""
    warn(
        f"The graph of {type(model).__name__} does what the model does when it is exported: {_told(askers)} asks for "
        "that, and what it does else cannot be traced. On the example inputs both gave the same, up to rounding.",
    )


def _told(askers: Collection[str]) -> str:
    return ", ".join(sorted(askers))
