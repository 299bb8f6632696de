"""What a model that asks whether it is being exported is told, where its graph is what it does when it is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType

from fxwidth.runtime.tracing_questions import questions


def _asked(*, answer: Callable[[], bool]) -> bool:
    return answer()


@contextmanager
def answering_as_exported() -> Iterator[None]:
    """Answer questions of code outside of torch as if a model was being exported; torch itself needs to know.

    The functions stay the same objects with other code, since models may have imported them by name.
    """
    before = [(question, question.__code__, question.__kwdefaults__) for question in questions()]
    try:
        for question, code, defaults in before:
            real = FunctionType(
                code, question.__globals__, question.__name__, question.__defaults__, question.__closure__
            )
            real.__kwdefaults__ = defaults
            question.__kwdefaults__ = {"answer": _answer_of(real, "fx_" not in question.__name__)}
            question.__code__ = _asked.__code__
        yield
    finally:
        for question, code, defaults in before:
            question.__code__, question.__kwdefaults__ = code, defaults


def _answer_of(real: Callable[[], bool], is_exporting: bool) -> Callable[[], bool]:
    def answer() -> bool:
        asker = str(sys._getframe(2).f_globals.get("__name__"))
        return real() if asker.startswith("torch.") or not is_exporting else True

    return answer
