"""What a module does in training, noted op by op, dropouts and the spans of its parts included."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import (
    _global_forward_hooks_with_kwargs,
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

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


@dataclass
class Span:
    """One call of a submodule and the ops it ran."""

    path: str
    module: nn.Module
    first: int
    given: Tensor | None = None
    result: Tensor | None = None
    last: int = 0


@dataclass
class TrainingRun:
    """One run of a module."""

    calls: list[OpCall]
    value: Any = None
    spans: list[Span] = field(default_factory=list)
    dropouts: dict[int, Dropout] = field(default_factory=dict)
    alone: set[int] = field(default_factory=set)


Arguments = tuple[tuple[Any, ...], dict[str, Any]]

DATA_DEPENDENT = torch._subclasses.fake_tensor.DataDependentOutputException


def training_run(
    callee: Callable[..., Any], arguments: Arguments, names: dict[int, str], mode: Any, in_training: bool
) -> TrainingRun:
    """Run a module or function in one of the modes, and return what it did, dropouts taken out."""
    recorder = TapeRecorder(keeps)
    run = TrainingRun(recorder.calls)
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
def _spans(run: TrainingRun, names: dict[int, str]) -> Iterator[list[Span]]:
    """Note which ops each submodule runs, and yield the stack of those at work."""
    stack: list[Span] = []

    def enter(module: nn.Module, _: Any) -> None:
        stack.append(Span(names.get(id(module), ""), module, len(run.calls)))
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

    def __init__(self, run: TrainingRun, stack: list[Span]) -> None:
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
