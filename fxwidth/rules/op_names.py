"""Under which name the tables know an op: one for all its overloads and for its in-place form."""

from __future__ import annotations

from functools import cache

import torch
from torch._ops import OpOverload, OpOverloadPacket

from fxwidth.recording import composite_ops  # noqa: F401 - it defines the ops of fxwidth's own
from fxwidth.recording.tape import functional_name

Op = OpOverload | OpOverloadPacket | str
"""An op itself, which stands for all its overloads, or the qualified name of one from another library."""

_OWN = ("aten", "fxwidth")


def op_name(op: Op) -> str:
    """Return the name under which an op is registered; one outside ATen carries its namespace, "mylib::op".

    Raises:
        ValueError: a name that is not qualified, or no such op where it must exist.
    """
    if isinstance(op, OpOverload):
        return rule_name(op)
    if isinstance(op, OpOverloadPacket):
        return rule_name(getattr(op, op.overloads()[0]))
    namespace, _, name = op.partition("::")
    if not name:
        raise ValueError(f'{op!r} names no op: give the op itself, such as torch.ops.aten.mm, or "mylib::op"')
    if namespace in _OWN and not hasattr(getattr(torch.ops, namespace), name):
        raise ValueError(f"{op!r} names no op of {namespace}")
    return name if namespace == "aten" else op


@cache
def rule_name(func: OpOverload) -> str:
    """Return the name under which an op is registered; ops outside ATen carry their namespace."""
    name = functional_name(func)
    return name if func.namespace == "aten" else f"{func.namespace}::{name}"
