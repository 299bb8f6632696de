"""What of torch itself is set while a graph is run to be looked at, and has to be what it was afterwards."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack
from torch.overrides import _pop_mode as pop_function_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._python_dispatch import _pop_mode as pop_dispatch_mode

from fxwidth.runtime import unseen_effects

# Where other functions are put for a while.
_PATCHED: tuple[tuple[Any, str], ...] = (
    (torch, "batch_norm"),
    (functional, "scaled_dot_product_attention"),
    (functional, "_verify_batch_size"),
    (torch.autocast, "__enter__"),
    (torch.autocast, "__exit__"),
    *unseen_effects.PLACES,
)
_MISSING = object()


class GlobalState:
    """The state of torch as it is now; contexts that are left half way may change it."""

    def __init__(self) -> None:
        self._gradients = torch.is_grad_enabled()
        self._fastpath = torch.backends.mha.get_fastpath_enabled()
        self._functions = [vars(owner).get(name, _MISSING) for owner, name in _PATCHED]
        self._collects = gc.isenabled()
        self._depths = len(_get_current_function_mode_stack()), len(_get_current_dispatch_mode_stack())

    def put_back(self) -> None:
        """Make it what it was."""
        while len(_get_current_function_mode_stack()) > self._depths[0]:
            pop_function_mode()
        while len(_get_current_dispatch_mode_stack()) > self._depths[1]:
            pop_dispatch_mode()
        for (owner, name), function in zip(_PATCHED, self._functions, strict=True):
            if vars(owner).get(name, _MISSING) is function:
                continue
            if function is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, function)
        torch.backends.mha.set_fastpath_enabled(self._fastpath)
        torch.set_grad_enabled(self._gradients)
        if self._collects:
            gc.enable()
