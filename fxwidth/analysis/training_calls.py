"""Parts that do nothing in evaluation: what they do in training is judged by the same rules, beside the tape.

The tape is recorded in eval mode. Stochastic depth, noise and the like are not on it, yet they couple what they work
with: a mask of a fixed width fits one width alone.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fxwidth.axes.pins import IN_TRAINING, OUTPUT
from fxwidth.axes.unification import unify
from fxwidth.recording.tape import OpCall, TapeRecorder
from fxwidth.rules.registry import broadcast_all, rule_for
from fxwidth.runtime.contexts import training
from fxwidth.runtime.module_state import restored
from fxwidth.runtime.pytrees import deep_tensors

if TYPE_CHECKING:
    from fxwidth.analysis.result import Analysis


def was_passed_through(args: tuple[Any, ...], value: Any) -> bool:
    """Tell whether a module that ran no op in evaluation gave back what it was given, or nothing: it may write."""
    given, returned = deep_tensors(args), deep_tensors(value)
    if not returned:
        return value is None and bool(given)
    return {id(tensor) for tensor in returned} <= {id(tensor) for tensor in given}


def follow_training(
    analysis: Analysis,
    recorder: TapeRecorder,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    value: Any,
) -> list[OpCall]:
    """Couple what a module works with as its ops in training do, and return these.

    Where that cannot be, or it returns something of another size, all that it works with is pinned.

    Args:
        analysis: takes the couplings.
        recorder: the tape, which is at work on the module's node.
        module: what is run.
        args: its positional arguments.
        kwargs: those by name.
        value: what it returns in evaluation: some of these.
    """
    given, evaluated = deep_tensors((args, kwargs)), deep_tensors(value)
    with recorder.aside() as calls:
        returned = _in_training(module, args, kwargs)
    analysis.space.context = f"node {recorder.node}"
    if returned is None or [tensor.shape for tensor in returned] != [tensor.shape for tensor in evaluated]:
        for tensor in given:
            for axis in analysis.axes_of(tensor):
                analysis.space.pin(axis, IN_TRAINING)
        return []
    for own, other in zip(returned, evaluated, strict=True):
        for one, two in zip(analysis.axes_of(own), analysis.axes_of(other), strict=True):
            unify(analysis.space, one, two)
        analysis.in_training.append((own, other))
    return calls


def follow_other_answer(
    analysis: Analysis,
    recorder: TapeRecorder,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    value: Any,
) -> list[OpCall]:
    """Pin the sizes of what a model returns in training, where that is something else, and return its ops there.

    Args:
        analysis: takes the pins.
        recorder: the tape, which is at work on the node of the module that returns for the model.
        module: what is run.
        args: its positional arguments.
        kwargs: those by name.
        value: what it returns in evaluation.
    """
    # Its ops in training are judged only where they are for more than the tape is.
    with recorder.aside(judged=False):
        returned = _in_training(module, args, kwargs)
    shapes = [tensor.shape for tensor in deep_tensors(value)]
    if returned is None or [tensor.shape for tensor in returned] == shapes:
        return []
    recorder.begin(recorder.node)
    with recorder.aside() as calls:
        returned = _in_training(module, args, kwargs)
    analysis.space.context = f"node {recorder.node}, in training"
    for axis in (axis for tensor in returned or () for axis in analysis.axes_of(tensor)):
        for factor in analysis.space.factors(axis):
            if not factor.is_batch:
                analysis.space.pin(((factor,),), OUTPUT)
    return calls


def _in_training(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
    """Return the tensors that a module returns in training, or None where it does not run."""
    with training(module), restored(module), suppress(Exception):
        return deep_tensors(module(*args, **kwargs))
    return None


def works_across_channels(call: OpCall) -> bool:
    """Tell whether an op may have a width written into it: all but those that act on each element alone."""
    return rule_for(call.func) is not broadcast_all
