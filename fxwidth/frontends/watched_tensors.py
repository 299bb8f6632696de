"""What real tensors do while a model is traced on proxies.

Symbolic tracing sees only what happens to proxies. What happens to real tensors happens then and there: a write would
be made to the model and be missing in the graph, and what is computed from the model's tensors would be a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxwidth.runtime.trace_guards import UntraceableError

# How Python takes the numbers of a tensor without an op.
_READS = ("tolist", "numpy", "__array__", "__dlpack__")


@contextmanager
def refusing_reads(is_of_model: Callable[[Tensor], bool]) -> Iterator[None]:
    """End a trace where numbers are taken out of a tensor of the model by methods of which no op tells.

    Args:
        is_of_model: which tensors these are.
    """

    def refusing(name: str) -> Callable[..., Any]:
        read = getattr(Tensor, name)

        @wraps(read)
        def method(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if is_of_model(tensor):
                raise UntraceableError(f"{name}() reads numbers from a tensor of the model, which may change")
            return read(tensor, *args, **kwargs)

        return method

    # torch makes a list of all methods when it first needs it: not while some are others.
    is_tensor_method_or_property(Tensor.add)
    with ExitStack() as stack:
        for name in _READS:
            stack.enter_context(patch.object(Tensor, name, refusing(name)))
        yield


def memory_of(tensors: Iterable[Tensor]) -> Callable[[Tensor], bool]:
    """Return what tells whether a tensor shares memory with one of some."""
    known = set(map(_storage, tensors))
    return lambda tensor: _storage(tensor) in known


class TensorWatch(TorchDispatchMode):
    """Ends a trace at a write to a tensor from outside of it, or where a number is read from a tensor of the model.

    Args:
        held: the tensors of the model.
    """

    def __init__(self, held: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._held = {id(tensor): tensor for tensor in held}
        # Kept alive, since they are known by their identities.
        self._computed: dict[int, Tensor] = {}
        self._made: dict[int, Tensor] = {}
        self._shares_memory = memory_of(held)

    def is_of_model(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is one of the model's, or computed from these."""
        return id(tensor) in self._computed or self._shares_memory(tensor)

    def refuse_computed(self, value: Any) -> None:
        """Check that a tensor met in tracing was not computed from the model's: the graph would hold a constant.

        Raises:
            UntraceableError: it was.
        """
        if isinstance(value, Tensor) and (id(value) in self._computed or value.grad_fn is not None):
            raise UntraceableError(
                "a tensor is computed from tensors of the model in a way that symbolic tracing does not see"
            )

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one op."""
        kwargs = kwargs or {}
        for value in _written(func, args, kwargs):
            if _storage(value) not in self._made:
                raise UntraceableError(
                    f"{func.name()} writes to a tensor which symbolic tracing does not follow; the graph would not"
                )
        result = func(*args, **kwargs)
        operands = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_of_model = any(id(tensor) in self._held or id(tensor) in self._computed for tensor in operands)
        known = set(map(_storage, operands)) if func is not torch.ops.aten.lift_fresh.default else set()
        for leaf in pytree.tree_leaves(result):
            if is_of_model and isinstance(leaf, (bool, int, float, complex)):
                raise UntraceableError(f"{func.name()} reads a number from a tensor of the model, which may change")
            if not isinstance(leaf, Tensor):
                continue
            if is_of_model and id(leaf) not in self._held:
                self._computed[id(leaf)] = leaf
            if _storage(leaf) not in known:
                self._made[_storage(leaf)] = leaf
        return result


class SetterWatch(TorchFunctionMode):
    """Ends an export where another tensor is put into one by an assignment, and knows tables.

    A table is made of numbers, shapes and buffers alone, and of no input or parameter: a model may keep it.
    """

    def __init__(self) -> None:
        super().__init__()
        # Kept alive, since they are known by their identities.
        self._tables: dict[int, Tensor] = {}

    def take(self, buffers: Iterable[Tensor]) -> None:
        """Take buffers, as they are in the export."""
        self._tables.update({id(buffer): buffer for buffer in buffers})

    def is_table(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is one, or real, and has no batch in its shape."""
        known = id(tensor) in self._tables or not isinstance(tensor, FakeTensor)
        return known and all(isinstance(size, int) for size in tensor.shape)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one function of torch."""
        if func == _SET_DATA:
            raise UntraceableError("the model sets .data of a tensor, which a graph does not")
        result = func(*args, **(kwargs or {}))
        operands = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = str(getattr(func, "__name__", ""))
        if all(id(tensor) in self._tables for tensor in operands) or name.startswith("new_") or name.endswith("_like"):
            self.take(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))
        else:
            written = operands[:1] if _is_in_place(name) else ()
            for tensor in (*written, *pytree.tree_leaves((kwargs or {}).get("out"))):
                self._forget(tensor)
        return result

    def _forget(self, written: Any) -> None:
        """A table that an input is written to is none any more, nor are its views."""
        if isinstance(written, Tensor):
            whole = _whole(written)
            self._tables = {key: table for key, table in self._tables.items() if _whole(table) is not whole}


def _is_in_place(name: str) -> bool:
    return name.startswith(("__setitem", "__i")) if name.endswith("__") else name.endswith("_")


def _whole(tensor: Tensor) -> Tensor:
    """Return the tensor of which another is a view, or that one."""
    return tensor if tensor._base is None else tensor._base


_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


def _written(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the operands that an op writes to."""
    if not func._schema.is_mutable:
        return []
    result = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            result += [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)
