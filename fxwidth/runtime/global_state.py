"""What of torch and Python itself is set while a model is run to be looked at, and has to be what it was afterwards.

Tracers put other functions in the place of torch's and Python's own and take them out again when they end, unless they
are ended on their way out.
"""

from __future__ import annotations

import builtins
import gc
import importlib
import math
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, _guards, _ops, fx, nn
from torch.fx import _symbolic_trace
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack
from torch.overrides import _pop_mode as pop_function_mode
from torch.overrides import _push_mode as push_function_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._python_dispatch import _pop_mode as pop_dispatch_mode
from torch.utils._python_dispatch import _push_mode as push_dispatch_mode

from fxwidth.runtime import unseen_effects
from fxwidth.runtime.contexts import loggers
from fxwidth.runtime.random_states import Generators
from fxwidth.runtime.tracing_questions import questions

# Where tracers, fxwidth's own included, put other functions for a while.
_OWNERS: tuple[Any, ...] = (
    *(builtins, math, random, np.random, torch, functional),
    *(Tensor, nn.Module, torch.autocast, torch.autograd.Function, fx.Tracer, fx.Proxy),
)
# What else they set: in which module, and what it is from the start, for it may be imported meanwhile.
_SET: tuple[tuple[str, str, Any], ...] = (
    ("torch.compiler", "_is_compiling_flag", False),
    ("torch.compiler", "_is_exporting_flag", False),
    ("torch.compiler", "_is_non_strict_tracing_flag", False),
    ("torch.fx._symbolic_trace", "CURRENT_PATCHER", None),
    ("torch.fx._symbolic_trace", "_is_fx_tracing_flag", False),  # of torch 2.11; later ones have one for each thread
    ("torch.fx.experimental.proxy_tensor", "_CURRENT_MAKE_FX_TRACER", None),
    ("torch._export.utils", "_DISABLE_ATEN_TO_ASSERTION_PASS", False),
    ("torch.export._trace", "_EXPORT_FLAGS", None),
    ("torch.export._trace", "_EXPORT_MODULE_HIERARCHY", None),
    ("sys", "stdout", None),
    ("sys", "stderr", None),
    ("warnings", "filters", None),
    ("warnings", "showwarning", None),
    ("warnings", "_showwarnmsg_impl", None),
)
_THREADS = tuple(
    getattr(module, name)
    for module, name in ((_symbolic_trace, "_is_fx_tracing_tls"), (_guards, "_TLS"))
    if hasattr(module, name)
)
_FLAGS: tuple[tuple[Callable[[], bool], Callable[[bool], object]], ...] = (
    (torch.is_grad_enabled, torch._C._set_grad_enabled),
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
    (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
    (torch._C._get_nnpack_enabled, torch._C._set_nnpack_enabled),
    (torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled),
    (torch._C._jit_texpr_fuser_enabled, torch._C._jit_set_texpr_fuser_enabled),
)
_HOOKS = [name for name in vars(nn.modules.module) if name.startswith("_global_") and name.endswith("_hooks")]
_MISSING = object()


class GlobalState:
    """The state of torch and Python as it is now; contexts that are left half way may change it."""

    def __init__(self) -> None:
        self._functions = [(owner, vars(owner).copy()) for owner in _OWNERS]
        # Functions by `fx.wrap` are replaced where they are defined.
        self._wrapped = [
            (space, name, space.get(name, _MISSING))
            for (_, name), space in _symbolic_trace._wrapped_fns_to_patch.items()
        ]
        self._methods = [
            (kind, name, vars(kind).get(name, _MISSING))
            for kind, name in (*_symbolic_trace._wrapped_methods_to_patch, *unseen_effects.PLACES)
        ]
        self._set = [
            (module, name, getattr(sys.modules[module], name, value) if module in sys.modules else value)
            for module, name, value in _SET
        ]
        self._threads = [(thread, vars(thread).copy()) for thread in _THREADS]
        self._flags = [is_set() for is_set, _ in _FLAGS]
        self._hooks = [(hooks, hooks.copy()) for hooks in (getattr(nn.modules.module, name) for name in _HOOKS)]
        self._questions = [(question, question.__code__, question.__kwdefaults__) for question in questions()]
        self._loggers = [(logger, logger.disabled) for logger in loggers()]
        self._collects = gc.isenabled()
        self._function_modes = _get_current_function_mode_stack()
        self._dispatch_modes = _get_current_dispatch_mode_stack()
        self._pre_dispatch = _ops._len_torch_dispatch_stack_pre_dispatch()
        self._generators = Generators()

    def put_back(self) -> None:
        """Make it what it was."""
        # Functions first: what follows may need them.
        self._put_back_functions()
        self._put_back_settings()
        self._generators.restore()

    def _put_back_functions(self) -> None:
        for owner, functions in self._functions:
            _put_back(owner, functions)
        for space, name, function in self._wrapped:
            _set_item(space, name, function)
        for kind, name, function in self._methods:
            _set_attribute(kind, name, function)
        for question, code, defaults in self._questions:
            if question.__code__ is not code:
                question.__code__, question.__kwdefaults__ = code, defaults

    def _put_back_settings(self) -> None:
        _put_back_modes(self._function_modes, _get_current_function_mode_stack, pop_function_mode, push_function_mode)
        _put_back_modes(self._dispatch_modes, _get_current_dispatch_mode_stack, pop_dispatch_mode, push_dispatch_mode)
        while _ops._len_torch_dispatch_stack_pre_dispatch() > self._pre_dispatch:
            _ops._pop_mode_from_pre_dispatch()
        for module, name, value in self._set:
            if module in sys.modules and getattr(sys.modules[module], name, value) is not value:
                setattr(importlib.import_module(module), name, value)
        for thread, values in self._threads:
            vars(thread).clear()
            vars(thread).update(values)
        for (_, switch), value in zip(_FLAGS, self._flags, strict=True):
            switch(value)
        for hooks, before in self._hooks:
            hooks.clear()
            hooks.update(before)
        for logger, disabled in self._loggers:
            logger.disabled = disabled
        if self._collects:
            gc.enable()


def _put_back(owner: Any, before: Any) -> None:
    """Give a class or module back its functions; what is new stands for another only where it was inherited."""
    now = vars(owner).copy()
    for name, value in before.items():
        if now.get(name, _MISSING) is not value and (callable(value) or hasattr(value, "__get__")):
            setattr(owner, name, value)
    for name in now.keys() - before.keys():
        if isinstance(owner, type) and any(name in vars(base) for base in owner.__mro__[1:]):
            delattr(owner, name)


def _put_back_modes(
    before: list[Any], stack: Callable[[], list[Any]], pop: Callable[[], object], push: Callable[[Any], object]
) -> None:
    """Make a stack of modes what it was: torch takes modes off for a while, too, the caller's among them."""
    while (now := stack())[: len(before)] != before[: len(now)] or len(now) > len(before):
        pop()
    for mode in before[len(now) :]:
        push(mode)


def _set_item(space: dict[str, Any], name: str, value: Any) -> None:
    if value is _MISSING:
        space.pop(name, None)
    elif space.get(name, _MISSING) is not value:
        space[name] = value


def _set_attribute(kind: Any, name: str, value: Any) -> None:
    if vars(kind).get(name, _MISSING) is value:
        return
    if value is _MISSING:
        delattr(kind, name)
    else:
        setattr(kind, name, value)
