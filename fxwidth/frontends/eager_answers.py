"""What a model that asks whether it is being traced is told: that it is not.

Code that goes another way when it is compiled or exported would have that way in its graph, and not its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType

from fxwidth.runtime.tracing_questions import questions


def _asked(*, answer: Callable[[], bool]) -> bool:
    return answer()


@contextmanager
def answering_as_in_eager_mode(askers: set[str] | None = None) -> Iterator[None]:
    """Answer questions of code outside of torch as if nothing was being traced; torch itself needs to know.

    The functions stay the same objects with other code, since models may have imported them by name.

    Args:
        askers: takes the names of the Python modules that have been told something that is not so.
    """
    before = [(question, question.__code__, question.__kwdefaults__) for question in questions()]
    try:
        for question, code, defaults in before:
            real = FunctionType(
                code, question.__globals__, question.__name__, question.__defaults__, question.__closure__
            )
            real.__kwdefaults__ = defaults
            question.__kwdefaults__ = {"answer": _answer_of(real, set() if askers is None else askers)}
            question.__code__ = _asked.__code__
        yield
    finally:
        for question, code, defaults in before:
            question.__code__, question.__kwdefaults__ = code, defaults


def _answer_of(real: Callable[[], bool], askers: set[str]) -> Callable[[], bool]:
    def answer() -> bool:
        asker, truth = str(sys._getframe(2).f_globals.get("__name__")), real()
        if asker.startswith("torch."):
            return truth
        if truth:
            askers.add(asker)
        return False

    return answer
