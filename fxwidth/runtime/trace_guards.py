"""What a tracer would forget without a word; noticed here, so that another front end is asked.

A graph says which ops are run. It does not say that some of them run without gradients or in another precision, or
that a layer was given other weights for the time of a call. `unseen_effects.py` has what else code does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.fx.proxy import TraceError
from torch.utils import _pytree as pytree


class UntraceableError(Exception):
    """A front end cannot say in a graph what a model does; another is asked, or the user is told."""


# What says that something cannot be traced, or that a fake tensor has no values.
_REFUSALS = (
    UntraceableError,
    TraceError,
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
)


# What has been said in the runs that are heeded.
_TOLD: list[list[str]] = []


@contextmanager
def heeding_refusals(kinds: Sequence[type[Exception]] = _REFUSALS) -> Iterator[None]:
    """Let what ends a run of a model on stand-ins for tensors end it, though the model's code may catch such errors.

    With real tensors there would be none, and the code would go another way.

    Args:
        kinds: the errors.

    Raises:
        UntraceableError: the code has gone on after such an error.
    """
    told: list[str] = []
    _TOLD.append(told)

    def noting(kind: type[Exception]) -> AbstractContextManager[Any]:
        made = kind.__init__

        def noted(self: Exception, *args: Any, **kwargs: Any) -> None:
            made(self, *args, **kwargs)
            told.append((str(self).strip().splitlines() or [type(self).__name__])[0].rstrip("."))

        return patch.object(kind, "__init__", noted)

    with ExitStack() as stack:
        stack.callback(_TOLD.pop)
        for kind in kinds:
            stack.enter_context(noting(kind))
        yield
    if told:
        raise UntraceableError(f"its code catches an error that there is in a trace alone, and goes on: {told[0]}")


@contextmanager
def unheeded() -> Iterator[None]:
    """Try something out: what is refused in here is no concern of a run that is heeded."""
    before = [len(told) for told in _TOLD]
    try:
        yield
    finally:
        for told, count in zip(_TOLD, before, strict=False):
            del told[count:]


@contextmanager
def counting_autocasts(active: list[Any]) -> Iterator[None]:
    """Keep a list of the autocasts that are entered and not yet left."""
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__

    def entered(self: torch.autocast) -> Any:
        active.append(self)
        return enter(self)  # type: ignore[no-untyped-call]

    def left(self: torch.autocast, *args: Any) -> Any:
        active.remove(self)
        return leave(self, *args)

    with patch.object(torch.autocast, "__enter__", entered), patch.object(torch.autocast, "__exit__", left):
        yield


@contextmanager
def noticing(autocasts: list[Any]) -> Iterator[None]:
    """Trace a model so that nothing in it is overlooked that a graph of ops would forget.

    Gradients are on, so that code which turns them off is noticed; the list takes the autocasts that are entered and
    not yet left.
    """
    with torch.enable_grad(), counting_autocasts(autocasts):
        yield


def refuse_context(autocasts: list[Any], has_gradients: bool) -> None:
    """Check that what is traced runs with gradients, if it can have any, and under no autocast.

    Raises:
        UntraceableError: it does not.
    """
    if autocasts or (has_gradients and not torch.is_grad_enabled()):
        context = "under an autocast of its own" if autocasts else "without gradients"
        raise UntraceableError(f"a part of the model runs {context}, which symbolic tracing forgets")


class Belongings:
    """The tensors that each module of a model holds before it is traced."""

    def __init__(self, model: nn.Module) -> None:
        self._held = {id(part): _held(part) for part in model.modules()}
        self._registered = [(part, {**part._parameters, **part._buffers}) for part in model.modules()]

    def refuse_replaced(self, failed: list[nn.Module]) -> None:
        """Check that no module has put another tensor in the place of a parameter or buffer: the graph does not.

        Raises:
            UntraceableError: one has; it is added to a list.
        """
        for part, before in self._registered:
            now = {**part._parameters, **part._buffers}
            for name, tensor in before.items():
                if tensor is not None and now.get(name) is not tensor:
                    failed.append(part)
                    raise UntraceableError(f"the model replaces {name!r} of a {type(part).__name__} by another tensor")

    def refuse_others(self, part: nn.Module) -> None:
        """Check that a module, which is about to be called as it is, still holds these tensors and no others.

        Raises:
            UntraceableError: it was given others for this call, which are not in the graph.
        """
        for inner in part.modules():
            known, held = self._held.get(id(inner)), _held(inner)
            if known is None or known.keys() != held.keys() or any(known[name] is not held[name] for name in held):
                raise UntraceableError(
                    f"a {type(inner).__name__} is called with tensors in the place of its own, which a graph forgets"
                )


def refuse_iterators(answer: Any) -> None:
    """Check that a model does not answer with an iterator, which computes when it is gone through, and only once.

    Raises:
        UntraceableError: it does.
    """
    for leaf in pytree.tree_leaves(answer):
        if isinstance(leaf, Iterator):
            raise UntraceableError(f"the model returns a {type(leaf).__name__}, which runs when the model has ended")


def _held(part: nn.Module) -> dict[str, Tensor]:
    places = (part._parameters, part._buffers, part.__dict__)
    return {name: value for place in places for name, value in place.items() if isinstance(value, Tensor)}
