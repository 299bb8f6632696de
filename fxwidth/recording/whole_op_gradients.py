# ruff: noqa: ARG001  (the arguments are named as torch names them)
"""Gradients of the ops that analysis keeps whole: those of the functions that they stand for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxwidth.recording.composite_ops import PLAIN_FUNCTIONS


def _remember(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.places = [place for place, value in enumerate(inputs) if isinstance(value, Tensor)]
    ctx.rest = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.keywords = keyword_only_inputs
    ctx.save_for_backward(*(inputs[place] for place in ctx.places))


def _remember_positional(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _remember(ctx, inputs, {}, output)


def _gradients(function: Any) -> Any:
    """Return the backward of an op, which runs the function that it stands for again."""

    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        arguments = list(ctx.rest)
        for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            arguments[place] = tensor.detach().requires_grad_(tensor.requires_grad)
        asked = [place for place in ctx.places if ctx.needs_input_grad[place]]
        # The modes by which a run calls the whole op would call it here too.
        with torch._C.DisableTorchFunction(), torch.enable_grad():
            made = function(*arguments, **ctx.keywords)
            outputs = [made] if isinstance(made, Tensor) else list(made)
            pairs = [(out, own) for out, own in zip(outputs, gradients, strict=True) if out.requires_grad]
            found = torch.autograd.grad(
                [out for out, _ in pairs], [arguments[p] for p in asked], [own for _, own in pairs], allow_unused=True
            )
        result: list[Tensor | None] = [None] * len(arguments)
        for place, gradient in zip(asked, found, strict=True):
            result[place] = gradient
        return tuple(result)

    return backward


for _op, _function in PLAIN_FUNCTIONS.items():
    _named = any(argument.kwarg_only for argument in _op._schema.arguments)
    torch.library.register_autograd(
        _op.name().partition(".")[0], _gradients(_function), setup_context=_remember if _named else _remember_positional
    )
