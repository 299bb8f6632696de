"""Runs of the model that a graph was traced from, on the fake tensors of the analysis of the graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from fxwidth.analysis.op_signatures import Signature, differ, is_silent, observed_signature, prescribed_signatures
from fxwidth.analysis.result import Analysis
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.frontends.call_signature import Argument, invoke
from fxwidth.recording.data_dependent import ValueReader
from fxwidth.recording.tape import OpCall, TapeRecorder, plain_kernels
from fxwidth.rules.registry import keeps
from fxwidth.runtime.contexts import evaluating, quiet
from fxwidth.runtime.fake_tensors import fake_like
from fxwidth.runtime.module_state import restored
from fxwidth.runtime.pytrees import flatten_each, rebuild_each
from fxwidth.runtime.tensor_slots import Slots, substituted, tensor_slots
from fxwidth.runtime.trace_guards import UntraceableError, heeding_refusals


def fakes_of(slots: Slots, analysis: Analysis, fakes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what stands for the parameters and buffers of a model: what stands for those of the graph, or new ones."""
    known = {id(entry.tensor): fakes.get(name, entry.fake) for name, entry in analysis.parameters.items()}
    return {
        name: known[id(tensor)] if id(tensor) in known else fake_like(analysis.mode, tensor)
        for name, (tensor, _) in slots.items()
    }


def run_model(
    analysis: Analysis,
    model: nn.Module,
    arguments: Sequence[Argument],
    see: Callable[[OpCall], None],
    inputs: Sequence[Any] | None = None,
) -> None:
    """Run a model on the fake tensors of an analysis.

    Args:
        analysis: that of its graph.
        model: the model, with fake parameters.
        arguments: how it is called.
        see: is called with each op.
        inputs: what it is called with, in the place of the inputs of the analysis.
    """
    leaves, structures = flatten_each(analysis.inputs if inputs is None else inputs, (Tensor,))
    # The model may write to what it is given.
    values = rebuild_each(copy.deepcopy(structures), leaves)
    found = [] if analysis.record is None else [one for node in analysis.record.values() for one in node]
    reader = None if analysis.record is None else ValueReader({"": found}, analysis.mode)
    recorder = TapeRecorder(keeps, see, values=reader)
    recorder.begin("")
    with plain_kernels(), quiet(), analysis.mode, recorder:
        invoke(model, arguments, values)


def observed(
    analysis: Analysis,
    model: nn.Module,
    arguments: Sequence[Argument],
    counts: Callable[[OpCall], bool] = lambda _: True,
) -> list[Signature] | None:
    """Return what a model, with fake parameters, does on the inputs of an analysis; None where it fails.

    Args:
        analysis: that of its graph.
        model: the model.
        arguments: how it is called.
        counts: asked for each op, in order, whether it is to be told.
    """
    with suppress(Exception):
        return _observed(analysis, model, arguments, counts)
    return None


def _observed(
    analysis: Analysis, model: nn.Module, arguments: Sequence[Argument], counts: Callable[[OpCall], bool]
) -> list[Signature]:
    found: list[Signature] = []

    def see(call: OpCall) -> None:
        if counts(call) and not is_silent(call.func):
            found.append(observed_signature(call))

    with heeding_refusals():
        run_model(analysis, model, arguments, see)
    return found


def differs_from_model(analysis: Analysis, model: nn.Module, arguments: Sequence[Argument]) -> str | None:
    """Return what a model does otherwise than its graph, in evaluation; None where it does the same, or cannot be run.

    Args:
        analysis: that of the graph, whose parameters are the model's.
        model: the model.
        arguments: how it is called.
    """
    slots = tensor_slots(model)
    fakes = fakes_of(slots, analysis, {})
    signals = [*flatten_each(analysis.inputs, (Tensor,))[0], *fakes.values()]
    with substituted(model, fakes, slots, restored), evaluating(model):
        try:
            done = _observed(analysis, model, arguments, Signals(signals))
        except UntraceableError as error:
            return str(error)
        except Exception:
            return None
    wanted = filter(Signals(signals), analysis.calls)
    return differ(done, prescribed_signatures(wanted, IndexMaps(analysis.space, {})))


class Signals:
    """Tells, call by call, which ops work on what a model is given, its parameters or its buffers.

    What a model makes of nothing, such as a range of numbers, is a constant of a graph, and its ops are not there.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._known = {id(tensor): tensor for tensor in tensors}

    def __call__(self, call: OpCall) -> bool:
        """Tell whether an op, the next one, does."""
        found = any(id(tensor) in self._known for tensor in call.inputs)
        if found:
            self._known |= {id(tensor): tensor for tensor in call.outputs}
        return found
