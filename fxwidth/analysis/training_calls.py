"""Parts that do nothing in evaluation: what they do in training is judged by the same rules, beside the tape.

The tape is recorded in eval mode. Stochastic depth, noise and the like are not on it, yet they couple what they work
with: a mask of a fixed width fits one width alone.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
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


@dataclass(frozen=True)
class ModuleRun:
    """A module as it was called, with what it has returned in evaluation."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    value: Any

    def was_passed_through(self) -> bool:
        """Tell whether a module that ran no op gave back what it was given, or nothing: it may write."""
        given, returned = deep_tensors(self.args), deep_tensors(self.value)
        if not returned:
            return self.value is None and bool(given)
        return set(returned) <= set(given)

    def in_training(self) -> list[Tensor] | None:
        """Return the tensors that the module returns in training, or None where it does not run."""
        with training(self.module), restored(self.module), suppress(Exception):
            return deep_tensors(self.module(*self.args, **self.kwargs))
        return None


def follow_training(analysis: Analysis, recorder: TapeRecorder, run: ModuleRun) -> list[OpCall]:
    """Couple what a module works with as its ops in training do, and return these.

    Where that cannot be, or it returns something of another size, all that it works with is pinned.

    Args:
        analysis: takes the couplings.
        recorder: the tape, which is at work on the module's node.
        run: what is run; it returned some of what it was given.
    """
    given, evaluated = deep_tensors((run.args, run.kwargs)), deep_tensors(run.value)
    with recorder.aside() as calls:
        returned = run.in_training()
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


def follow_other_answer(analysis: Analysis, recorder: TapeRecorder, run: ModuleRun) -> list[OpCall]:
    """Pin the sizes of what a model returns in training, where that is something else, and return its ops there.

    Args:
        analysis: takes the pins.
        recorder: the tape, which is at work on the node of the module that returns for the model.
        run: what is run.
    """
    # Its ops in training are judged only where they are for more than the tape is.
    with recorder.aside(judged=False):
        returned = run.in_training()
    shapes = [tensor.shape for tensor in deep_tensors(run.value)]
    if returned is None or [tensor.shape for tensor in returned] == shapes:
        return []
    recorder.begin(recorder.node)
    with recorder.aside() as calls:
        returned = run.in_training()
    analysis.space.context = f"node {recorder.node}, in training"
    for axis in (axis for tensor in returned or () for axis in analysis.axes_of(tensor)):
        for factor in analysis.space.factors(axis):
            if not factor.is_batch:
                analysis.space.pin(((factor,),), OUTPUT)
    return calls


def works_across_channels(call: OpCall) -> bool:
    """Tell whether an op may have a width written into it: all but those that act on each element alone."""
    return rule_for(call.func) is not broadcast_all
