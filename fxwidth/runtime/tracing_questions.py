"""The functions by which code asks torch whether it is being traced, and how they are given other answers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType

import torch
import torch.fx._symbolic_trace

# What code is told, by the name of the Python module that asks, the name of the question, and the true answer.
Answer = Callable[[str, str, bool], bool]

_QUESTIONS = (
    torch.compiler.is_compiling,
    torch.compiler.is_exporting,
    torch._utils.is_compiling,
    torch.fx._symbolic_trace.is_fx_tracing,
    torch.fx._symbolic_trace.is_fx_symbolic_tracing,
)


def questions() -> list[FunctionType]:
    """Return all that there are at present."""
    # Heavy to import, and never true without: who exports has imported it.
    dynamo = sys.modules.get("torch._dynamo.external_utils")
    found = [*_QUESTIONS, *([] if dynamo is None else [dynamo.is_compiling])]
    return [question for question in found if isinstance(question, FunctionType)]


def _asked(*, answer: Callable[[], bool]) -> bool:
    return answer()


@contextmanager
def answering(answer: Answer) -> Iterator[None]:
    """Answer questions of code outside of torch in another way; torch itself needs to know.

    The functions stay the same objects with other code, since models may have imported them by name.
    """
    before = [(question, question.__code__, question.__kwdefaults__) for question in questions()]
    try:
        for question, code, defaults in before:
            real = FunctionType(
                code, question.__globals__, question.__name__, question.__defaults__, question.__closure__
            )
            real.__kwdefaults__ = defaults
            question.__kwdefaults__ = {"answer": _answer_of(real, answer)}
            question.__code__ = _asked.__code__
        yield
    finally:
        for question, code, defaults in before:
            question.__code__, question.__kwdefaults__ = code, defaults


def _answer_of(real: FunctionType, told: Answer) -> Callable[[], bool]:
    def answer() -> bool:
        asker, truth = str(sys._getframe(2).f_globals.get("__name__")), bool(real())
        return truth if asker.startswith("torch.") else told(asker, real.__name__, truth)

    return answer
