"""What a node does in training and not in evaluation: dropout, and batch norms that use their own batch.

The tape is recorded in eval mode. Before a node is replaced by its ops it is run in both modes, at the old sizes: the
two runs must be the same ops on the same tensors but for dropouts, which are found where they stand, and submodules
that know their mode themselves, which are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from fxwidth.recording.tape import OpCall
from fxwidth.rewriting.training_runs import (
    DATA_DEPENDENT,
    Arguments,
    Dropout,
    Span,
    TrainingRun,
    UnexplainedError,
    training_run,
)


@dataclass(frozen=True, eq=False)
class Kept:
    """A run of a submodule that goes on as a module: what it took and what it gave."""

    path: str
    given: Tensor
    result: Tensor


@dataclass(frozen=True, eq=False)
class Step:
    """One thing that a module does in training.

    Attributes:
        call: the op in training, or a submodule that is kept.
        twin: the same op in eval mode, as the analysis saw it; None for a submodule or a dropout.
        dropout: what the op does besides in training; with no twin the op is that dropout and nothing else.
    """

    call: OpCall | Kept
    twin: OpCall | None
    dropout: Dropout | None


def training_steps(
    root: nn.Module,
    callee: Callable[..., Any],
    in_evaluation: Arguments,
    in_training: Arguments,
    twins: Sequence[OpCall],
    mode: Any,
) -> tuple[list[Step], Any] | None:
    """Return what a module or function does in training, step by step, and its result; None where it does not run.

    Args:
        root: the graph that calls it, which gives submodules their names.
        callee: the module, with the fake tensors of the analysis as parameters, or the function.
        in_evaluation: the positional and keyword arguments of the recorded call.
        in_training: those of a call in training: the same tensors, perhaps other flags and numbers.
        twins: the ops it ran in eval mode.
        mode: the fake mode of the analysis.

    Raises:
        UnexplainedError: the two modes differ by more than dropout and batch norms.
    """
    names = {id(part): name for name, part in root.named_modules()}
    try:
        evaluation = training_run(callee, in_evaluation, names, mode, in_training=False)
    except Exception as error:
        raise UnexplainedError(f"it cannot be run again: {error}") from error
    if [call.func for call in evaluation.calls] != [call.func for call in twins]:
        raise UnexplainedError("it does other things when it is run again")
    try:
        trained = training_run(callee, in_training, names, mode, in_training=True)
    except UnexplainedError:
        raise
    except (torch._subclasses.fake_tensor.DynamicOutputShapeException, DATA_DEPENDENT) as error:
        raise UnexplainedError("what it does in training depends on values") from error
    except Exception:
        # It cannot be trained on these inputs, as a detector without targets: there is nothing to keep.
        return None
    return list(_aligned(evaluation, trained, twins, _kept_paths(evaluation))), trained.value


# -- recording -----------------------------------------------------------------------------------------------------


# -- comparing -----------------------------------------------------------------------------------------------------


def _kept_paths(run: TrainingRun) -> set[str]:
    """Return the submodules that go on as such: those that do nothing in eval mode, and running batch norms."""
    kept = {span.path for span in run.spans if span.given is not None and _knows_its_mode(span)}
    return kept - {span.path for span in run.spans if span.given is None or not _knows_its_mode(span)}


def _knows_its_mode(span: Span) -> bool:
    if isinstance(span.module, nn.modules.batchnorm._NormBase):
        return bool(span.module.track_running_stats) and span.module.running_mean is not None
    return span.first == span.last and span.given is span.result and not isinstance(span.module, nn.Identity)


def _steps(run: TrainingRun, kept: set[str]) -> Iterator[tuple[int, OpCall | Kept]]:
    """Yield the ops of a run with their places, those inside kept submodules replaced by one step."""
    spans = [span for span in run.spans if span.path in kept]
    position = 0
    for span in spans:
        if span.first < position:
            continue  # inside of one that is kept as a whole
        yield from ((i, run.calls[i]) for i in range(position, span.first))
        if span.given is None or span.result is None:
            raise UnexplainedError(f"{span.path} has other arguments or results in training")
        yield span.first, Kept(span.path, span.given, span.result)
        position = span.last
    yield from ((i, run.calls[i]) for i in range(position, len(run.calls)))


def _aligned(evaluation: TrainingRun, trained: TrainingRun, twins: Sequence[OpCall], kept: set[str]) -> Iterator[Step]:
    plain = iter(list(_steps(evaluation, kept)))
    same: dict[int, int] = {}

    def source(tensor: Tensor) -> int:
        return same.get(id(tensor), id(tensor))

    for place, step in _steps(trained, kept):
        if place in trained.alone and isinstance(step, OpCall):
            same[id(step.result)] = source(step.arguments["self"])
            yield Step(step, None, trained.dropouts[place])
            continue
        own, other = next(plain, (0, None))
        if isinstance(step, Kept) and isinstance(other, Kept) and step.path == other.path:
            if source(step.given) != id(other.given):
                raise UnexplainedError(f"{step.path} reads something else in training")
            same[id(step.result)] = id(other.result)
            yield Step(step, None, None)
            continue
        if not isinstance(step, OpCall) or not isinstance(other, OpCall) or not _same_op(step, other, source):
            raise UnexplainedError(f"in training it runs {_name(step)} where in evaluation it runs {_name(other)}")
        same.update({id(one): id(two) for one, two in zip(step.outputs, other.outputs, strict=True)})
        yield Step(step, twins[own], trained.dropouts.get(place))
    if (left := next(plain, None)) is not None:
        raise UnexplainedError(f"in training it does not run {_name(left[1])}")


def _same_op(one: OpCall, other: OpCall, source: Callable[[Tensor], int]) -> bool:
    if one.func != other.func or len(one.outputs) != len(other.outputs):
        return False
    leaves, others = pytree.tree_leaves(one.arguments), pytree.tree_leaves(other.arguments)

    def same(own: Any, twin: Any) -> bool:
        if not isinstance(own, Tensor) or not isinstance(twin, Tensor):
            return bool(own == twin)
        return source(own) == id(twin) or _same_constant(own, twin)

    return len(leaves) == len(others) and all(same(*pair) for pair in zip(leaves, others, strict=True))


def _same_constant(own: Tensor, twin: Tensor) -> bool:
    """Tell whether two tensors are one number that the code writes down, which each run makes anew."""
    if isinstance(own, FakeTensor) or isinstance(twin, FakeTensor) or own.shape != twin.shape:
        return False
    return own.dtype == twin.dtype and torch.equal(own, twin)


def _name(step: OpCall | Kept | None) -> str:
    if isinstance(step, OpCall):
        return f"{step.func}"
    return "nothing" if step is None else f"the module {step.path}"
