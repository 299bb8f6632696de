"""Ctrl-C at any call on the way of a piece of work, and what must be as it was before."""

from __future__ import annotations

import builtins
import contextlib
import gc
import inspect
import logging
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch._export.non_strict_utils
from torch import Tensor, _ops, fx, nn
from torch.fx import _symbolic_trace
from torch.fx.experimental import proxy_tensor
from torch.nn import functional
from torch.optim import Optimizer
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import fxwidth
from fxwidth.runtime import gc_pause

_PACKAGE = str(Path(fxwidth.__file__).parent)
# The tracers of torch put functions in the place of others too.
TRACERS = tuple(str(Path(str(part.__file__))) for part in (torch.fx._symbolic_trace, torch._export.non_strict_utils))
_OWNERS = (nn.Module, Tensor, torch, functional, torch.autograd.Function, builtins, math, random, np.random, fx.Proxy)


class Counter:
    """Counts the calls of the package's functions, and interrupts one of them.

    Attributes:
        count: of all calls.
        functions: the numbers of the calls of each function.
        leaving: of these the calls by which contexts put back what they have changed.

    Args:
        at: which one is interrupted; none by default.
        since: the name of a function from whose first call on calls are counted.
        places: files of which calls are counted besides.
    """

    def __init__(self, at: int | None = None, since: str = "", places: tuple[str, ...] = ()) -> None:
        self.count = 0
        self.functions: dict[str, list[int]] = {}
        self.leaving: dict[str, list[int]] = {}
        self._at = at
        self._since = since
        self._places = (_PACKAGE, *places)
        self._counts: dict[str, bool] = {}  # whether the calls of a file's functions do

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        """See one call; resumed generators, such as contexts that are left, are calls too."""
        code = frame.f_code
        counts = self._counts.get(code.co_filename)
        if counts is None:
            counts = self._counts[code.co_filename] = code.co_filename.startswith(self._places)
        if not counts or event != "call":
            return
        # Python ignores what is raised in a generator that it drops: of generators only contexts count.
        if code.co_flags & inspect.CO_GENERATOR and not _is_of_contextlib(frame.f_back):
            return
        if self.count == 0 and self._since not in ("", code.co_name):
            return
        self.count += 1
        if self._at is None and not _is_under_dispatch(frame):
            name = f"{code.co_filename}:{code.co_firstlineno}"
            self.functions.setdefault(name, []).append(self.count)
            if _is_left(frame):
                self.leaving.setdefault(name, []).append(self.count)
        elif self.count == self._at:
            raise KeyboardInterrupt


def _is_under_dispatch(frame: FrameType | None) -> bool:
    """Tell whether torch's exporter is called back by code in C++, which an exception may not pass everywhere."""
    while frame is not None:
        if frame.f_code is proxy_tensor.proxy_call.__code__:
            return True
        frame = frame.f_back
    return False


def _is_left(frame: FrameType | None) -> bool:
    """Tell whether a context of the package is being left, which puts things back."""
    while frame is not None:
        if frame.f_code is contextlib._GeneratorContextManager.__exit__.__code__:
            return True
        frame = frame.f_back
    return False


def _is_of_contextlib(frame: FrameType | None) -> bool:
    return frame is not None and frame.f_code.co_filename == contextlib.__file__


def counted(
    work: Callable[[], object], at: int | None = None, since: str = "", places: tuple[str, ...] = ()
) -> Counter:
    """Run a piece of work, interrupted at its n-th call or not at all, and return what was counted."""
    counter = Counter(at, since, places)
    before = sys.gettrace()
    with _without_rests():
        sys.settrace(counter)
        try:
            work()
        except KeyboardInterrupt:
            assert at is not None
        else:
            assert at is None, f"call {at} was not interrupted, of {counter.count}"
        finally:
            sys.settrace(before)
    return counter


@contextlib.contextmanager
def _without_rests() -> Iterator[None]:
    """Ask for the memory in use at each pause of the collector, and not by the clock: calls keep their numbers."""
    rest, gc_pause._REST = gc_pause._REST, 0
    gc_pause._last_look.rests_until = 0.0
    try:
        yield
    finally:
        gc_pause._REST = rest


@dataclass
class Work:
    """Something to be interrupted, and all that it could change."""

    run: Callable[[], object]
    modules: list[nn.Module]
    optimizer: Optimizer | None = None
    objects: list[object] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        return state_of(*self.modules, optimizer=self.optimizer, objects=self.objects)


def state_of(*modules: nn.Module, optimizer: Optimizer | None = None, objects: Iterable[object] = ()) -> dict[str, Any]:
    """Return all that a resize could change, in a form that can be compared by `differences`."""
    result: dict[str, Any] = {}
    for number, module in enumerate(modules):
        for path, part in module.named_modules():
            place = f"{number}:{path}"
            for name, value in part.__dict__.items():
                result[f"{place}.{name}"] = _seen(value)
                result[f"{place}.{name} numbers"] = [
                    _bits(one) for one in pytree.tree_leaves(value) if isinstance(one, Tensor)
                ]
            for name, tensor in (*part._parameters.items(), *part._buffers.items()):
                if tensor is not None:
                    hooks = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
                    result[f"{place}.{name} values"] = [_bits(tensor), _bits(tensor.grad), tensor.requires_grad]
                    result[f"{place}.{name} hooks"] = [_seen(hook) for hook in hooks]
                    result[f"{place}.{name} attributes"] = _seen(vars(tensor))
            if isinstance(part, fx.GraphModule):
                result[f"{place} code"] = part.code, str(part.graph), id(type(part).forward)
    if optimizer is not None:
        result["groups"] = [
            (id(group["params"]), _seen(group), _seen(group["params"])) for group in optimizer.param_groups
        ]
        result["state"] = (
            _seen(optimizer.state),
            [(_seen(own), [_bits(value) for value in own.values()]) for own in optimizer.state.values()],
        )
    for number, one in enumerate(objects):
        result[f"object {number}"] = {name: _seen(value) for name, value in vars(one).items()}
    result["torch"] = (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.backends.mha.get_fastpath_enabled(),
        torch.batch_norm, functional.scaled_dot_product_attention, torch.autograd.Function.apply,
        len(_get_current_function_mode_stack()), len(_get_current_dispatch_mode_stack()), gc.isenabled(),
    )  # fmt: skip
    for owner in _OWNERS:
        functions = {name: id(value) for name, value in vars(owner).items() if callable(value) or name == "data"}
        result[f"functions of {owner.__name__}"] = functions
    result["settings"] = (
        torch.compiler.is_compiling(), torch.compiler.is_exporting(), _symbolic_trace.is_fx_tracing(),
        _symbolic_trace.CURRENT_PATCHER, torch._C._get_mkldnn_enabled(), _ops._len_torch_dispatch_stack_pre_dispatch(),
        list(warnings.filters), logging.getLogger("torch.export").disabled, sys.stderr,
        random.getstate(), torch.get_rng_state().tolist(), torch.is_autocast_enabled("cpu"),
        [list(getattr(nn.modules.module, name)) for name in vars(nn.modules.module) if name.endswith("_hooks")],
    )  # fmt: skip
    return result


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the names of what is not as it was."""
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def assert_undone(work: Work, points: Iterable[int], since: str = "") -> None:
    before = work.state()
    for point in points:
        counted(work.run, point, since)
        assert not differences(before, work.state()), f"interrupted at call {point}"


def _seen(value: Any) -> Any:
    """Return a value such that it equals another only if that is the same object, with the same contents."""
    if isinstance(value, dict):
        return id(value), [(id(key) if isinstance(key, Tensor) else key, _inner(part)) for key, part in value.items()]
    if isinstance(value, (list, tuple, set)):
        return id(value), [_inner(part) for part in value]
    return _inner(value)


def _inner(value: Any) -> Any:
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    return id(value), (len(value) if isinstance(value, (list, dict)) else None)


def _bits(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.layout != torch.strided:
        return str(value.layout), None, str(value.detach().tolist())
    with torch.no_grad():
        flat = value.detach().cpu().contiguous().reshape(-1)
    return str(value.layout), value.stride(), blake2b(flat.view(torch.uint8).numpy()).hexdigest()
