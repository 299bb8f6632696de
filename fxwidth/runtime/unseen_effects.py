"""What code does beside computing tensors, of which no op tells: a graph of ops would not do it.

Gradients are changed by hooks or have functions of their own, or are computed on the way; activations are computed
anew for the backward pass; generators of random numbers are seeded. Who looks on is told, and decides.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property
from torch.utils.hooks import RemovableHandle

from fxwidth.runtime.trace_guards import UntraceableError

OWN_GRADIENT = "has a gradient of its own"
_HOOKS = "puts hooks on gradients"
COMPUTES_GRADIENTS = "computes gradients"
_ASKS = "asks whether gradients are computed"
_KEPT = "chooses what is kept for the backward pass, as activation checkpointing does"
_SEEDS = "sets a generator of random numbers"
_OWN_GENERATOR = "draws from a generator of its own"
_WITHOUT = "runs a part without gradients"

See = Callable[[str, str], None]

# What a tensor that is traced would have to do.
_OF_TENSORS = {
    "register_hook": _HOOKS,
    "register_post_accumulate_grad_hook": _HOOKS,
    "retain_grad": _HOOKS,
    "grad_fn": _HOOKS,
    "backward": COMPUTES_GRADIENTS,
}
_FUNCTIONS: dict[Any, str] = {torch.autograd.grad: COMPUTES_GRADIENTS, torch.autograd.backward: COMPUTES_GRADIENTS}

_WATCHED: tuple[tuple[Any, str, str], ...] = (
    *((Tensor, name, does) for name, does in _OF_TENSORS.items() if name != "grad_fn"),
    (torch.autograd.graph, "register_multi_grad_hook", _HOOKS),
    # Made where a module is called that has hooks on its gradients.
    (torch.utils.hooks.BackwardHook, "__init__", _HOOKS),
    # All functions that compute gradients come to this one, by whatever name they were imported.
    (torch.autograd, "_engine_run_backward", COMPUTES_GRADIENTS),
    # Checkpointing that is not reentrant is made of such hooks; the other kind is a function with its own gradient.
    (torch.autograd.graph.saved_tensors_hooks, "__enter__", _KEPT),
    (torch, "is_grad_enabled", _ASKS),
    # Its tensors never have a gradient.
    (torch.inference_mode, "__enter__", _WITHOUT),
    (torch, "manual_seed", _SEEDS),
    (torch, "seed", _SEEDS),
    (torch, "set_rng_state", _SEEDS),
    (torch.random, "manual_seed", _SEEDS),
    (torch.random, "seed", _SEEDS),
    (torch.random, "set_rng_state", _SEEDS),
    (torch.random, "fork_rng", _SEEDS),
    (torch.cuda, "manual_seed", _SEEDS),
    (torch.cuda, "manual_seed_all", _SEEDS),
    (torch.cuda, "set_rng_state", _SEEDS),
    (torch.cuda, "set_rng_state_all", _SEEDS),
    (random, "seed", _SEEDS),
    (random, "setstate", _SEEDS),
    (np.random, "seed", _SEEDS),
    (np.random, "set_state", _SEEDS),
)
# What tracers follow in their own ways, but not who takes parts of a model apart.
_REGIONS: tuple[tuple[Any, str, str], ...] = (
    (torch.no_grad, "__enter__", _WITHOUT),
    (torch.set_grad_enabled, "__init__", _WITHOUT),
)
# Where others stand while somebody looks on.
PLACES: tuple[tuple[Any, str], ...] = (
    (Function, "apply"),
    *((owner, name) for owner, name, _ in (*_WATCHED, *_REGIONS)),
)
_MISSING = object()
_CHECKPOINTS = "torch.utils.checkpoint"
_HOOKING = ("register_hook", "register_post_accumulate_grad_hook", "retain_grad")
_REQUIRES_GRAD, _GRAD_FN = Tensor.requires_grad.__get__, Tensor.grad_fn.__get__  # type: ignore[attr-defined,union-attr]


@contextmanager
def watching_effects(see: See, *, regions: bool = False, calls: bool = True) -> Iterator[None]:
    """Tell of all that code does of which no op tells.

    Args:
        see: takes what is done, as a predicate, and the name of what does it.
        regions: whether parts that run without gradients are told of too.
        calls: whether calls of torch's functions are looked at; else a mode of the caller's does it by `look_at_call`,
            since each mode makes every call a few microseconds longer.
    """
    # torch makes a list of all methods when it first needs it: not while some are others.
    is_tensor_method_or_property(Tensor.add)
    watched = (*_WATCHED, *_REGIONS) if regions else _WATCHED
    stead = [(owner, name, _seen(see, getattr(owner, name), name, does)) for owner, name, does in watched]
    mode = _Calls(see) if calls else nullcontext()
    with _in_place_of([(Function, "apply", _seen_gradients(see)), *stead]), mode:
        yield


@contextmanager
def hooks_on_gradients_alone() -> Iterator[None]:
    """Let code that is run without gradients put hooks on tensors some of which have none, which torch refuses."""
    is_tensor_method_or_property(Tensor.add)
    hooking = [(Tensor, name) for name in _HOOKING] + [(torch.autograd.graph, "register_multi_grad_hook")]
    with _in_place_of([(owner, name, _if_it_can(getattr(owner, name))) for owner, name in hooking]):
        yield


@contextmanager
def _in_place_of(functions: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    before = [(owner, name, vars(owner).get(name, _MISSING)) for owner, name, _ in functions]
    try:
        for place in functions:
            setattr(*place)
        yield
    finally:
        for owner, name, function in before:
            if function is not _MISSING:
                setattr(owner, name, function)
            elif name in vars(owner):  # an interruption may come before it is put there
                delattr(owner, name)


def _if_it_can(hook: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(hook)
    def put(tensors: Tensor | Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        each = [tensors] if isinstance(tensors, Tensor) else tensors
        return hook(tensors, *args, **kwargs) if all(t.requires_grad for t in each) else RemovableHandle(OrderedDict())

    return put


def _seen(see: See, function: Callable[..., Any], name: str, does: str) -> Callable[..., Any]:
    by_anyone = does not in (_SEEDS, _ASKS, _WITHOUT)

    @wraps(function)
    def seen(*args: Any, **kwargs: Any) -> Any:
        asker = _asker(2)
        if does == _ASKS and asker == _CHECKPOINTS:
            see(_KEPT, "checkpoint")
        elif by_anyone or not _is_no_model(asker):
            see(does, type(args[0]).__name__.strip("_") if name.startswith("__") else name.strip("_"))
        return function(*args, **kwargs)

    return seen


def _asker(depth: int) -> str:
    """Return the name of the Python module whose code is at work."""
    frame = sys._getframe(depth)
    while frame.f_code.co_name == "__torch_function__" and frame.f_back is not None:
        frame = frame.f_back  # another mode, which has passed it on
    if frame.f_globals.get("__name__") == "torch.utils._contextlib":  # a function that is decorated by a context
        return str(getattr(frame.f_locals.get("func"), "__module__", ""))
    return str(frame.f_globals.get("__name__"))


def _is_no_model(asker: str) -> bool:
    """Tell whether code is none of a model's: parts of torch ask and put back, and so does who looks on."""
    return asker.startswith(("torch.", "fxwidth."))


def look_at_call(see: See, func: Any, kwargs: Mapping[str, Any]) -> None:
    """Tell of a call that asks of a tensor whether it will have a gradient, or that draws from a generator of its own.

    Args:
        see: as for `watching_effects`.
        func: what the `__torch_function__` of a mode is called for, which calls this.
        kwargs: its keyword arguments.
    """
    if func in (_REQUIRES_GRAD, _GRAD_FN) and not _is_no_model(_asker(2)):
        see(*((_ASKS, "requires_grad") if func == _REQUIRES_GRAD else (_HOOKS, "grad_fn")))
    # All that draws takes it by name.
    if kwargs and any(isinstance(value, torch.Generator) for value in kwargs.values()):
        see(_OWN_GENERATOR, getattr(func, "__name__", str(func)))


class _Calls(TorchFunctionMode):
    """Looks at each call."""

    def __init__(self, see: See) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one function of torch."""
        kwargs = kwargs or {}
        look_at_call(self._see, func, kwargs)
        return func(*args, **kwargs)


def _seen_gradients(see: See) -> classmethod[Function, Any, Any]:
    """Return what applies functions with gradients of their own; those by which torch itself works are not told of."""
    apply = inspect.getattr_static(Function, "apply")

    def seen(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        if (cls.__module__, cls.__name__) == (_CHECKPOINTS, "_NoopSaveInputs"):  # by which torch 2.11 begins one
            see(_KEPT, "checkpoint")
        elif not cls.__module__.startswith("torch._"):
            see(OWN_GRADIENT, cls.__name__)
        return apply.__get__(None, cls)(*args, **kwargs)

    return classmethod(seen)


def refuse_effect(does: str, name: str) -> None:
    """Say that code cannot be traced: a graph would only compute the same tensors.

    Raises:
        UntraceableError: always.
    """
    raise UntraceableError(f"{name} {does}, which a graph forgets")


def refuse_effects_of(kind: str, target: Any, args: Any) -> None:
    """Check that what a tracer is about to write into its graph computes tensors, and does nothing else.

    Args:
        kind: that of a node of a graph.
        target: what it is to call.
        args: with what.

    Raises:
        UntraceableError: it would do more than that.
    """
    name = args[1] if target is getattr and len(args) > 1 else target
    if (kind == "call_method" or target is getattr) and name in _OF_TENSORS:
        refuse_effect(_OF_TENSORS[name], name)
    if kind == "call_function" and target in _FUNCTIONS:
        refuse_effect(_FUNCTIONS[target], target.__name__)


def refuse_generator(value: Any) -> None:
    """Check that what a node is to be given is no generator of random numbers.

    Raises:
        UntraceableError: it is.
    """
    if isinstance(value, torch.Generator):
        refuse_effect(_OWN_GENERATOR, "the model")
