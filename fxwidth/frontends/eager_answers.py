"""What a model that asks whether it is being traced is told: that it is not.

Code that goes another way when it is compiled or exported would have that way in its graph, and not its own.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from fxwidth.runtime.tracing_questions import answering


def answering_as_in_eager_mode(askers: set[str] | None = None) -> AbstractContextManager[None]:
    """Answer questions of code outside of torch as if nothing was being traced.

    Args:
        askers: takes the names of the Python modules that have been told something that is not so.
    """
    told = set() if askers is None else askers

    def answer(asker: str, _: str, truth: bool) -> bool:
        if truth:
            told.add(asker)
        return False

    return answering(answer)
