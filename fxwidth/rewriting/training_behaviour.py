"""What a node does in training and not in evaluation: dropout, and batch norms that use their own batch.

The tape is recorded in eval mode. Before a node is replaced by its ops it is run in both modes, at the old sizes: the
two runs must be the same ops on the same tensors but for dropouts, which are found where they stand, and submodules
that know their mode themselves, which are kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from torch.nn.modules.module import (
    _global_forward_hooks_with_kwargs,
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils import _pytree as pytree

from fxwidth.recording.composite_ops import FUSED_ATTENTION, MULTI_HEAD_ATTENTION, WholeOps, attention
from fxwidth.recording.tape import OpCall, TapeRecorder, plain_kernels
from fxwidth.rules.registry import keeps
from fxwidth.runtime.contexts import evaluating, training
from fxwidth.runtime.unseen_effects import watching_effects

_DROPOUTS: dict[Any, type[nn.Module]] = {
    functional.dropout: nn.Dropout,
    functional.alpha_dropout: nn.AlphaDropout,
    functional.feature_alpha_dropout: nn.FeatureAlphaDropout,
    functional.dropout1d: nn.Dropout1d,
    functional.dropout2d: nn.Dropout2d,
    functional.dropout3d: nn.Dropout3d,
}


class UnexplainedError(Exception):
    """A module does something in training that is neither dropout nor a batch norm."""


@dataclass(frozen=True)
class Dropout:
    """A dropout that is no module: its kind, its probability, and the path of the module that called it."""

    kind: type[nn.Module]
    p: float
    owner: str


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


@dataclass
class _Span:
    """One call of a submodule and the ops it ran."""

    path: str
    module: nn.Module
    first: int
    given: Tensor | None = None
    result: Tensor | None = None
    last: int = 0


@dataclass
class _Run:
    """One run of a module."""

    calls: list[OpCall]
    value: Any = None
    spans: list[_Span] = field(default_factory=list)
    dropouts: dict[int, Dropout] = field(default_factory=dict)
    alone: set[int] = field(default_factory=set)


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


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
        evaluation = _record(callee, in_evaluation, names, mode, in_training=False)
    except Exception as error:
        raise UnexplainedError(f"it cannot be run again: {error}") from error
    if [call.func for call in evaluation.calls] != [call.func for call in twins]:
        raise UnexplainedError("it does other things when it is run again")
    try:
        trained = _record(callee, in_training, names, mode, in_training=True)
    except UnexplainedError:
        raise
    except (torch._subclasses.fake_tensor.DynamicOutputShapeException, _DATA_DEPENDENT) as error:
        raise UnexplainedError("what it does in training depends on values") from error
    except Exception:
        # It cannot be trained on these inputs, as a detector without targets: there is nothing to keep.
        return None
    return list(_aligned(evaluation, trained, twins, _kept_paths(evaluation))), trained.value


_DATA_DEPENDENT = torch._subclasses.fake_tensor.DataDependentOutputException


# -- recording -----------------------------------------------------------------------------------------------------


def _record(
    callee: Callable[..., Any], arguments: Arguments, names: dict[int, str], mode: Any, in_training: bool
) -> _Run:
    recorder = TapeRecorder(keeps)
    run = _Run(recorder.calls)
    args, kwargs = arguments
    with _spans(run, names) as open_spans, ExitStack() as stack:
        if isinstance(callee, nn.Module):
            stack.enter_context(training(callee) if in_training else evaluating(callee))
        stack.enter_context(any_batch())
        stack.enter_context(plain_kernels(_Dropouts(run, open_spans)))
        stack.enter_context(watching_effects(_refuse_effect))
        stack.enter_context(mode)
        stack.enter_context(recorder)
        run.value = callee(*args, **kwargs)
    return run


def _refuse_effect(does: str, _: str) -> None:
    raise UnexplainedError(f"it {does}")


def any_batch() -> AbstractContextManager[Any]:
    """Leave out a check that a batch norm makes on the size of its batch in training; ours is only an example."""
    return patch.object(functional, "_verify_batch_size", lambda _: None)


@contextmanager
def _spans(run: _Run, names: dict[int, str]) -> Iterator[list[_Span]]:
    """Note which ops each submodule runs, and yield the stack of those at work."""
    stack: list[_Span] = []

    def enter(module: nn.Module, _: Any) -> None:
        stack.append(_Span(names.get(id(module), ""), module, len(run.calls)))
        run.spans.append(stack[-1])

    def leave(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        span = stack.pop()
        span.last = len(run.calls)
        if span.path and len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            span.given, span.result = args[0], output

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, with_kwargs=True)]
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()
            # torch forgets to take this out, and then warns in torch.compile of hooks that are gone.
            _global_forward_hooks_with_kwargs.pop(handle.id, None)


class _Dropouts(WholeOps):
    """Writes a dropout down as a copy of its operand, or beside the attention whose weights it is for."""

    def __init__(self, run: _Run, stack: list[_Span]) -> None:
        super().__init__()
        self._run = run
        self._stack = stack
        self._functions: dict[Any, Callable[..., Any]] = {
            **{function: partial(self._dropout, function) for function in _DROPOUTS},
            torch.dropout: self._plain_dropout,
            torch.ops.aten.dropout.default: self._plain_dropout,
            FUSED_ATTENTION: self._attention,
            torch.ops.aten.scaled_dot_product_attention.default: self._attention,
            MULTI_HEAD_ATTENTION: self._multi_head_attention,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one Python-level function."""
        if func in self._functions:
            return self._functions[func](*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def _note(self, kind: type[nn.Module], p: float) -> None:
        owner = self._stack[-1].path if self._stack else ""
        self._run.dropouts[len(self._run.calls) - 1] = Dropout(kind, float(p), owner)

    def _dropout(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if not given["training"] or given["p"] == 0:
            return given["input"]
        if given["inplace"]:
            raise UnexplainedError("it has a dropout in place")
        result = given["input"].clone()
        self._note(_DROPOUTS[function], given["p"])
        self._run.alone.add(len(self._run.calls) - 1)
        return result

    def _plain_dropout(self, input: Tensor, p: float, train: bool) -> Any:  # noqa: A002 - torch's name
        return self._dropout(functional.dropout, input, p, train)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        result = attention(query, key, value, attn_mask, 0.0, is_causal, **options)
        if dropout_p > 0:
            self._note(nn.Dropout, dropout_p)
        return result

    def _multi_head_attention(self, *args: Any, **kwargs: Any) -> Any:
        dropout = partial(self._dropout, functional.dropout)
        with patch.multiple(functional, scaled_dot_product_attention=self._attention, dropout=dropout):
            return MULTI_HEAD_ATTENTION(*args, **kwargs)


# -- comparing -----------------------------------------------------------------------------------------------------


def _kept_paths(run: _Run) -> set[str]:
    """Return the submodules that go on as such: those that do nothing in eval mode, and running batch norms."""
    kept = {span.path for span in run.spans if span.given is not None and _knows_its_mode(span)}
    return kept - {span.path for span in run.spans if span.given is None or not _knows_its_mode(span)}


def _knows_its_mode(span: _Span) -> bool:
    if isinstance(span.module, nn.modules.batchnorm._NormBase):
        return bool(span.module.track_running_stats) and span.module.running_mean is not None
    return span.first == span.last and span.given is span.result and not isinstance(span.module, nn.Identity)


def _steps(run: _Run, kept: set[str]) -> Iterator[tuple[int, OpCall | Kept]]:
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


def _aligned(evaluation: _Run, trained: _Run, twins: Sequence[OpCall], kept: set[str]) -> Iterator[Step]:
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
