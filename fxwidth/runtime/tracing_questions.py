"""The functions by which code asks torch whether it is being traced."""

from __future__ import annotations

import sys
from types import FunctionType

import torch
import torch.fx._symbolic_trace

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
