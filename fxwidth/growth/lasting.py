"""What outlasts a call: tensors that were there before it and are written to, and what modules keep in attributes.

The next calls read them. They are results of the network as its outputs are: new channels must leave them as they were.
"""

from __future__ import annotations

from functools import cache

from torch import Tensor
from torch._ops import OpOverload
from torch.nn import Parameter

from fxwidth.analysis.result import Analysis
from fxwidth.recording.tape import OpCall, storage_of, tensors_in
from fxwidth.rules.family_table import as_family
from fxwidth.rules.op_families import Norm, NormKind
from fxwidth.runtime.pytrees import deep_tensors


def written_by(call: OpCall) -> list[Tensor]:
    """Return the operands that an op writes to."""
    names = _targets(call.func)
    norm = as_family(call.func, Norm)
    if norm is not None and norm.kind is NormKind.BATCH and norm.by_own_batch(call.arguments):
        # Its schema does not say so on every device.
        names |= {norm.mean, norm.variance}
    return tensors_in([call.arguments.get(name) for name in names])


@cache
def _targets(func: OpOverload) -> frozenset[str]:
    if not func._schema.is_mutable:
        return frozenset()
    arguments = func._schema.arguments
    return frozenset(one.name for one in arguments if one.alias_info is not None and one.alias_info.is_write)


def lasting(analysis: Analysis) -> dict[int, str]:
    """Return what outlasts a call beside the outputs of the model: by memory, as `storage_of` tells it, its name."""
    known = {storage_of(tensor): "a tensor of its input" for tensor in deep_tensors(analysis.inputs)}
    for name, entry in analysis.parameters.items():
        kind = "parameter" if isinstance(entry.tensor, Parameter) else "buffer"
        known[storage_of(entry.fake)] = f"{kind} {name!r}"
    made: set[int] = set()
    found: dict[int, str] = {}
    for call in analysis.calls:
        for key in map(storage_of, call.inputs):
            if key not in made:
                known.setdefault(key, "a tensor of its code")
        made.update(key for key in map(storage_of, call.outputs) if key not in known)
        found |= {key: known[key] for key in map(storage_of, written_by(call)) if key in known}
    for node, tensors in analysis.keeping.items():
        found |= {storage_of(tensor): f"the module of node {node}" for tensor in tensors}
    return found
