"""Faults of the model itself, which no front end can be blamed for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxwidth.errors import FxwidthError
from fxwidth.frontends.call_signature import Call
from fxwidth.frontends.input_misfits import misfit_of
from fxwidth.frontends.labels import labels_in_list
from fxwidth.recording.readonly_runs import copies, looking_on
from fxwidth.runtime.code_places import fault_place
from fxwidth.runtime.pytrees import deep_tensors, map_leaves
from fxwidth.runtime.trace_guards import UntraceableError


@dataclass(frozen=True)
class OwnFault:
    """An exception that a model raises when it is called.

    Attributes:
        error: the exception.
        place: the file, line and function of the user's code that raised it, if any did.
    """

    error: Exception
    place: str | None


def own_fault(model: nn.Module, call: Call | None) -> OwnFault | None:
    """Return how a model fails by itself when it is called; None where it does not, or may not.

    The model is run once, as it is, on the example; buffers, attributes and random numbers stay as they were.

    Args:
        model: the model.
        call: an example of its call.
    """
    if call is None:
        return None
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    if any(tensor.is_meta != (device.type == "meta") for tensor in deep_tensors(call.value)):
        return None  # it could not run as it is
    args, kwargs = copies([map_leaves(lambda leaf: leaf.detach().to(device), value) for value in call.value])
    with looking_on(model), torch.enable_grad():
        try:
            model(*args, **kwargs)
        except UntraceableError:
            return None  # what is watched here may not be done: the model would do it
        except Exception as error:
            return OwnFault(error, fault_place(error))
    return None


def told(fault: OwnFault, model: nn.Module, call: Call | None) -> FxwidthError:
    """Return the error that tells of a fault of the model."""
    lines = str(fault.error).strip().splitlines()
    place = f" ({fault.place})" if fault.place else ""
    failure = FxwidthError(
        f"{type(model).__name__} itself fails on example_inputs{_shapes(call)}, before any tracing: "
        f"{type(fault.error).__name__}: {lines[0].rstrip('.') if lines else ''}{place}. Mend it there, or pass inputs "
        f"that it takes: a call of the model with them must run.{advice(model, call)}"
    )
    failure.__cause__ = fault.error
    return failure


def advice(model: nn.Module, call: Call | None) -> str:
    """Return a sentence on what a model takes in the place of an example, as far as its first layer tells, or nothing.

    It has a space before it.
    """
    if call is None:
        return ""
    labels, misfit = labels_in_list(call.args), misfit_of(model, [*call.args, *call.kwargs.values()])
    text = labels or (f"{misfit.told}: pass inputs such as {misfit.example}." if misfit else "")
    return f" {text[:1].upper()}{text[1:]}" if text else ""


def _shapes(call: Call | None) -> str:
    shapes: list[Any] = [] if call is None else [tuple(tensor.shape) for tensor in deep_tensors(call.value)]
    return f" of shapes {shapes}" if shapes else ""
