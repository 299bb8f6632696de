"""What a model that asks whether it is being exported is told, where its graph is what it does when it is."""

from __future__ import annotations

from contextlib import AbstractContextManager

from fxwidth.runtime.tracing_questions import answering


def answering_as_exported() -> AbstractContextManager[None]:
    """Answer questions of code outside of torch as if a model was being exported, and not traced by `torch.fx`."""
    return answering(lambda _, question, truth: truth if "fx_" in question else True)
