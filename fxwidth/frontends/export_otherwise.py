"""Export of what a model does when it is exported, where it goes another way then and its own cannot be exported.

No rule tells that both ways are the same function, so both are run on the example inputs, in the mode that is traced.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext

import torch
from torch import fx, nn

from fxwidth.errors import warn
from fxwidth.frontends.call_signature import Argument
from fxwidth.frontends.export import exported_graph
from fxwidth.frontends.same_results import give_the_same
from fxwidth.runtime.trace_guards import UntraceableError


def exported_otherwise(
    model: nn.Module,
    arguments: Sequence[Argument],
    device: torch.device,
    askers: Collection[str],
    *,
    is_of_one_size: bool = False,
) -> fx.GraphModule:
    """Return the graph of what a model does when it is exported, if that gives what the model gives.

    Args:
        model: the module, in the mode that is traced.
        arguments: those of its forward, with examples or defaults.
        device: where its parameters are.
        askers: the Python modules that have asked whether the model is exported.
        is_of_one_size: as for `exported_graph`.

    Raises:
        UntraceableError: the graph gives something else.
    """
    graph = exported_graph(model, arguments, device, nullcontext, is_of_one_size=is_of_one_size)
    values = [argument.value for argument in arguments]
    if not give_the_same(model, graph, arguments, values):
        raise UntraceableError(f"the model gives other results when it is exported ({_told(askers)} asks for that)")
    return graph


def warn_of_other_way(model: nn.Module, askers: Collection[str]) -> None:
    """Warn that a graph does what the model does when it is exported."""
    warn(
        f"The graph of {type(model).__name__} does what the model does when it is exported: {_told(askers)} asks for "
        "that, and what it does else cannot be traced. On the example inputs both gave the same, up to rounding.",
    )


def _told(askers: Collection[str]) -> str:
    return ", ".join(sorted(askers))
