"""Contexts of a run: outside of what the caller has switched on, without torch's log, in one mode."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from fxwidth.runtime.module_state import walk

_LOGGERS = (
    "torch._subclasses.fake_tensor",
    "torch.export",
    "torch.fx.experimental.proxy_tensor",
    "torch.fx.experimental.symbolic_shapes",
)
_DEVICES = ("cpu", "cuda", "mps", "xpu", "mtia", "hpu")


@contextmanager
def plain_surroundings() -> Iterator[None]:
    """Switch autocast and inference mode off for a while.

    Under autocast a model is other ops, in other precision; in inference mode ops are not taken apart, and what is made
    can never be trained.
    """
    casting = [device for device in _DEVICES if torch.is_autocast_enabled(device)]
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        for device in casting:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
    if casting:
        # Autocast keeps the weights that it has cast, and some of them may have been written to.
        torch.clear_autocast_cache()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence torch's log of failures under fake tensors: here a failure is an answer, or is told in our words."""
    # Not by their levels: a new level makes logging forget what it knows of all loggers.
    before = [(logger, logger.disabled) for logger in loggers()]
    for logger, _ in before:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, disabled in before:
            logger.disabled = disabled


def loggers() -> list[logging.Logger]:
    """Return those by which torch tells of failures under fake tensors."""
    return list(map(logging.getLogger, _LOGGERS))


@contextmanager
def heeding_interruptions() -> Iterator[None]:
    """Let Ctrl-C end what runs where code on the way out raises an error of its own instead, as torch's tracer does.

    Such an error would be taken for the answer that a model cannot be traced.
    """
    around = sys.exception()
    try:
        yield
    except Exception as error:
        first: BaseException | None = error
        while first is not None and first is not around:
            if isinstance(first, KeyboardInterrupt):
                raise first from None
            first = first.__context__
        raise


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module and its submodules in eval mode for a while."""
    was_training = [submodule for _, submodule in walk(module) if submodule.training]
    for submodule in was_training:
        submodule.training = False
    try:
        yield
    finally:
        for submodule in was_training:
            submodule.training = True


@contextmanager
def training(module: nn.Module) -> Iterator[None]:
    """Put a module and its submodules in training mode for a while."""
    was_evaluating = [submodule for _, submodule in walk(module) if not submodule.training]
    for submodule in was_evaluating:
        submodule.training = True
    try:
        yield
    finally:
        for submodule in was_evaluating:
            submodule.training = False
