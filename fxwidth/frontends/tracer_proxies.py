"""The proxies of symbolic tracing: as those of torch.fx, but for writes to tensors.

An assignment with an operator, as in `y += 1`, writes to the tensor `y`, which others may share.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

from fxwidth.frontends.in_place import IN_PLACE
from fxwidth.runtime.trace_guards import UntraceableError

# What a buffer is known by, as code that makes its tables by it has to.
_METADATA = frozenset(
    {"shape", "ndim", "dtype", "device", "layout", "size", "dim", "numel", "nelement", "ndimension", "stride"}
    | {"is_floating_point", "is_complex", "is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_meta", "is_contiguous"}
    | {"requires_grad", "element_size", "itemsize", "nbytes", "get_device", "is_leaf"}
)
_SETTABLE = frozenset({"data", "grad", "requires_grad"})


class TracerProxy(fx.Proxy):
    """Stands for a value of a graph that is being traced."""

    def __getattr__(self, k: str) -> Any:
        """Return what stands for an attribute or a method."""
        if _is_property(k) and _is_held(self.node):
            return self.tracer.create_proxy("call_function", getattr, (self, k), {})
        return super().__getattr__(k)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute that is Python's alone.

        Raises:
            UntraceableError: it is one of torch's.
        """
        if name in _SETTABLE:
            raise UntraceableError(f"the model sets .{name} of a tensor, which symbolic tracing does not see")
        super().__setattr__(name, value)


def _in_place(write: Callable[[Any, Any], Any]) -> Callable[[TracerProxy, Any], Any]:
    def method(self: TracerProxy, other: Any) -> Any:
        result = self.tracer.create_proxy("call_function", write, (self, other), {})
        # A model may assign a buffer anew that it has written to; a number is another one.
        return self if isinstance(self, BufferProxy) else result

    return method


def _refused(name: str) -> Callable[[TracerProxy], Any]:
    def method(self: TracerProxy) -> Any:
        raise TraceError(f"symbolic tracing knows no {name} of {self.node}")

    return method


for _name, _write in IN_PLACE.items():
    setattr(TracerProxy, f"__{_name}__", _in_place(_write))

# What Python has other errors for, which code may catch. Not __index__: torch asks for it where it takes proxies too.
for _name in ("len", "int", "float", "complex"):
    setattr(TracerProxy, f"__{_name}__", _refused(f"{_name}()"))


class CodeTracer(fx.Tracer):
    """Traces the code that a graph has generated, as unpickling does: what it does to buffers is a part of it."""

    proxy_buffer_attributes = True


class BufferProxy(TracerProxy):
    """Stands for a buffer, of which shape and kind are known."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, buffer: Tensor) -> None:
        super().__init__(node, tracer)
        self._buffer = buffer

    def __getattr__(self, k: str) -> Any:
        """Return what is known, or what stands for an attribute or a method."""
        return getattr(self._buffer, k) if k in _METADATA else super().__getattr__(k)

    def stands_for(self, tensor: Tensor | None) -> bool:
        """Tell whether this is the proxy of a buffer."""
        return tensor is self._buffer

    def __len__(self) -> int:
        """Return the size of the first dim."""
        return len(self._buffer)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Write to a part of the buffer."""
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _is_property(name: str) -> bool:
    return not name.startswith("_") and hasattr(Tensor, name) and not callable(getattr(Tensor, name))


def _is_held(node: fx.Node) -> bool:
    """Tell whether a node may give a tensor of the model, or a view of one, which is made of a first operand."""
    while node.op in ("call_function", "call_method"):
        if not node.args or not isinstance(node.args[0], fx.Node):
            return False
        node = node.args[0]
    return node.op == "get_attr"


@contextmanager
def assigned_buffers() -> Iterator[None]:
    """Let a model assign a buffer that it has written to, as `self.steps += 1` does."""
    assign = nn.Module.__setattr__

    def assigned(module: nn.Module, name: str, value: Any) -> None:
        if not (isinstance(value, BufferProxy) and value.stands_for(module._buffers.get(name))):
            assign(module, name, value)

    with patch.object(nn.Module, "__setattr__", assigned):
        yield
