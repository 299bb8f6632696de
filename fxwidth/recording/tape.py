"""The ATen tape: every op a model calls, in order, as seen under fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxwidth.axes.factors import Axis
from fxwidth.recording.composite_ops import WholeOps, batch_norm
from fxwidth.recording.data_dependent import Values
from fxwidth.runtime.fake_tensors import run_op
from fxwidth.runtime.unseen_effects import hooks_on_gradients_alone

Axes = tuple[Axis, ...]


@dataclass(frozen=True)
class Contraction:
    """A sum of products of two operands over some of their dims (matrix product, convolution)."""

    left: Tensor
    left_dims: tuple[int, ...]
    right: Tensor
    right_dims: tuple[int, ...]


@dataclass(frozen=True)
class Reduction:
    """A reduction of a tensor over one dim: each result depends on all channels along it."""

    tensor: Tensor
    dim: int
    kind: str


@dataclass(eq=False)
class OpCall:
    """One ATen op with its bound arguments, its results, and the axes its tensors had when it ran.

    `inputs` and `outputs` are the tensors among the arguments and the results; `recorded` is what a run on real tensors
    has found, for ops that depend on values; `part` is the path of the module inside of the node's that ran the op;
    `layouts` are the strides and offsets that the inputs had before it, by `id`, for ops that go by them.
    """

    index: int
    func: OpOverload
    arguments: dict[str, Any]
    result: Any
    node: str
    axes: dict[Tensor, Axes] = field(default_factory=dict)
    output_axes: tuple[Axes, ...] = ()
    contractions: list[Contraction] = field(default_factory=list)
    reductions: list[Reduction] = field(default_factory=list)
    pins_if_used: list[tuple[Tensor, Axis, str]] = field(default_factory=list)
    recorded: Any = None
    part: str = ""
    computed: frozenset[int] = frozenset()
    inputs: list[Tensor] = field(init=False)
    outputs: list[Tensor] = field(default_factory=list)
    layouts: dict[Tensor, tuple[tuple[int, ...], int]] = field(init=False)

    def __post_init__(self) -> None:
        self.inputs = tensors_in(self.arguments)
        layouts = self.inputs if _goes_by_layout(self.func) else ()
        self.layouts = {tensor: (tensor.stride(), int(tensor.storage_offset())) for tensor in layouts}

    @property
    def name(self) -> str:
        """The op's name without namespace, overload and in-place underscore, e.g. "add"."""
        return functional_name(self.func)

    @property
    def place(self) -> str:
        """The op, its node, and the part of that node that ran it."""
        name = self.name if self.func.namespace == "aten" else f"{self.func.namespace}::{self.name}"
        place = f" at node {self.node}" if self.node else ""
        return f"{name}{place}, in {self.part}" if self.part else f"{name}{place}"


@cache
def _goes_by_layout(func: OpOverload) -> bool:
    return torch.Tag.inplace_view in func.tags or functional_name(func) == "as_strided"


@cache
def functional_name(func: OpOverload) -> str:
    """Return the name of an op's functional form."""
    name: str = func.overloadpacket.__name__
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of a nested value, in order."""
    found: list[Tensor] = []
    _collect_tensors(value, found)
    return found


def storage_of(tensor: Tensor) -> int:
    """Return what tells the memory of a tensor from that of others."""
    if tensor.layout is not torch.strided:
        return id(tensor)  # it has several, and stands for them
    return int(tensor.untyped_storage()._cdata)


_NO_TENSORS = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout})


def _collect_tensors(value: Any, found: list[Tensor]) -> None:
    # The usual containers by hand: pytree takes several times as long, and this is asked for every op.
    kind = type(value)
    if kind in _NO_TENSORS:
        return
    if isinstance(value, Tensor):
        found.append(value)
    elif kind is list or kind is tuple or kind is dict:
        for inner in value.values() if kind is dict else value:
            if type(inner) not in _NO_TENSORS:
                _collect_tensors(inner, found)
    else:
        found += [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def bind(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of an ATen call by name, defaults filled in."""
    names, bound = _defaults(func)
    bound = dict(bound)
    bound.update(zip(names, args, strict=False))
    bound.update(kwargs)
    return bound


@cache
def _defaults(func: OpOverload) -> tuple[list[str], dict[str, Any]]:
    arguments = func._schema.arguments
    values = {a.name: a.default_value if a.has_default_value() else None for a in arguments}
    return list(values), values


def unbind(func: OpOverload, arguments: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments for a call of an op; keyword defaults are left out."""
    args, kwargs = [], {}
    for parameter in func._schema.arguments:
        value = arguments[parameter.name]
        if not parameter.kwarg_only:
            args.append(value)
        elif not parameter.has_default_value() or value is not parameter.default_value:
            kwargs[parameter.name] = value
    return tuple(args), kwargs


class TapeRecorder(TorchDispatchMode):
    """Records every ATen op; composite ops are recorded as their parts unless `keeps` names them."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would wrap each dispatch in a guard against being compiled; a tape is never made while compiling.
        return False

    def __init__(
        self,
        keeps: Callable[[OpOverload], bool],
        on_call: Callable[[OpCall], None] | None = None,
        start: int = 0,
        values: Values | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[OpCall] = []
        self.node = ""
        self._keeps = keeps
        self._on_call = on_call
        self.part = ""
        self._start = start
        self._values = values

    def begin(self, node: str) -> None:
        """Say which node is at work from now on."""
        self.node, self.part = node, ""
        if self._values is not None:
            self._values.begin(node)

    @contextmanager
    def aside(self, judged: bool = True) -> Iterator[list[OpCall]]:
        """Record what is run on a list of its own for a while, and not on the tape; tell of it only if it is judged."""
        tape, on_call = self.calls, self._on_call
        self.calls = []
        if not judged:
            self._on_call = None
        try:
            yield self.calls
        finally:
            self.calls, self._on_call = tape, on_call

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one op and put it on the tape."""
        kwargs = kwargs or {}
        if func.namespace == "prim":
            # Questions of C++ code to a fake tensor, as many as there are ops.
            return args[0].device if func is torch.ops.prim.device.default else func(*args, **kwargs)
        if not self._keeps(func) and _is_composite(func):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        # Rules see the shapes and axes from before the op: an in-place op may change them.
        call = OpCall(self._start + len(self.calls), func, bind(func, args, kwargs), None, self.node, part=self.part)
        if self._values is None:
            call.result = run_op(func, args, kwargs)
        else:
            run = partial(run_op, func, args, kwargs)
            call.result, call.recorded = self._values.run(func, call.arguments, run)
        call.outputs = tensors_in(call.result)
        self.calls.append(call)
        if self._on_call is not None:
            self._on_call(call)
        return call.result


@cache
def _is_composite(func: OpOverload) -> bool:
    return func._can_decompose() and torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    )


@contextmanager
def plain_kernels(whole_ops: WholeOps | None = None) -> Iterator[None]:
    """Run attention and RMS norms whole and the rest as plain ops, so that models are seen as the same few ops."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    caches = torch.is_autocast_cache_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    # A weight is cast at each use, and not by the first alone: nodes are also run one by one, and more than once.
    torch.set_autocast_cache_enabled(False)
    try:
        # no_grad and not inference_mode: the latter keeps composite ops and forbids in-place updates later.
        with (
            torch.no_grad(),
            patch.object(torch, "batch_norm", batch_norm),
            hooks_on_gradients_alone(),
            whole_ops or WholeOps(),
        ):
            yield
    finally:
        torch.set_autocast_cache_enabled(caches)
        torch.backends.mha.set_fastpath_enabled(fastpath)
