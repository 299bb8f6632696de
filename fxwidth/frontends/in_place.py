"""Writes to tensors as nodes of a graph.

An assignment with an operator, as in `y += 1`, writes to a tensor, and all see it that share its memory. The functions
of the `operator` module do not serve for that: torch.fx writes them as the statement `y += 1`, after which a number is
another one for all that use it, and takes them for dead code where nobody uses their results.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.node import has_side_effect
from torch.overrides import handle_torch_function, has_torch_function


def _written(name: str) -> Callable[[Any, Any], Any]:
    own = getattr(operator, name)

    def write(left: Any, right: Any) -> Any:
        # While a graph is traced that calls this, it is one node of that as well.
        if has_torch_function((left, right)):
            return handle_torch_function(write, (left, right), left, right)
        return own(left, right)

    write.__name__ = write.__qualname__ = name
    write.__doc__ = own.__doc__
    write.__module__ = __name__
    has_side_effect(write)
    return write


iadd, isub, imul = _written("iadd"), _written("isub"), _written("imul")
itruediv, ifloordiv, imod, ipow = _written("itruediv"), _written("ifloordiv"), _written("imod"), _written("ipow")
iand, ior, ixor = _written("iand"), _written("ior"), _written("ixor")
ilshift, irshift = _written("ilshift"), _written("irshift")

IN_PLACE: Mapping[str, Callable[[Any, Any], Any]] = {
    function.__name__: function
    for function in (iadd, isub, imul, itruediv, ifloordiv, imod, ipow, iand, ior, ixor, ilshift, irshift)
}

_SETTERS = frozenset({"setitem", "__setitem__"}) | IN_PLACE.keys() | {f"__{name}__" for name in IN_PLACE}
_VIEWS = frozenset(
    {
        "view", "reshape", "expand", "permute", "transpose", "t", "squeeze", "unsqueeze", "flatten", "unflatten",
        "narrow", "select", "unbind", "split", "chunk", "tensor_split", "movedim", "swapaxes", "swapdims", "diagonal",
        "detach", "as_strided", "view_as", "expand_as", "contiguous", "to", "ravel", "unfold", "getitem", "__getitem__",
        "getattr",
    }
)  # fmt: skip


def is_write(node: fx.Node) -> bool:
    """Tell whether a node writes to one of its operands."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = _name(node)
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _SETTERS or bool(node.kwargs.get("inplace")) or node.kwargs.get("out") is not None


def written_attribute(node: fx.Node) -> str | None:
    """Return the attribute of the module to which, or to a view of which, a node writes; None if there is no such."""
    if node.op not in ("call_function", "call_method") or not is_write(node):
        return None
    target = node.kwargs.get("out", node.args[0] if node.args else node.kwargs.get("input"))
    while isinstance(target, fx.Node) and target.op in ("call_function", "call_method"):
        if not target.args or not (_name(target) in _VIEWS or is_write(target)):
            return None
        target = target.args[0]
    return str(target.target) if isinstance(target, fx.Node) and target.op == "get_attr" else None


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))
