"""Another graph of a model that is shrunk already, as for other sizes of inputs: shrunk to the same weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any

from torch import fx
from torch.fx.node import map_aggregate

from fxwidth.errors import FxwidthError
from fxwidth.recording.width_history import resizes_of
from fxwidth.resizing.resize import resize
from fxwidth.runtime.tensor_slots import named_tensors, set_slot, tensor_slots


def floats_of(module: fx.GraphModule) -> list[float]:
    """Return the real numbers in a graph, such as the eps of norms, in order."""
    return [number for node in module.graph.nodes for number in _floats((node.args, node.kwargs))]


def with_same_weights(
    module: fx.GraphModule, names: Collection[str], floats: list[float], shrunk: fx.GraphModule, exact: bool
) -> fx.GraphModule | None:
    """Return a graph resized as another of the same parameters is, or None where it is not that graph at other sizes.

    Args:
        module: the graph; it is resized in place.
        names: those of its parameters and buffers, which are the same in the other graph.
        floats: the real numbers in the other graph before it was resized.
        shrunk: the other graph, resized.
        exact: as for `fxwidth.resize`.
    """
    if floats_of(module) != floats or any(record["copies"] for record in resizes_of(shrunk)):
        return None
    with suppress(FxwidthError):
        for record in resizes_of(shrunk):
            resize(module, _plan(record), selection="magnitude", fold=False, rotate=False, exact=exact, progress=False)
        return module if _take_over(module, names, shrunk) else None
    return None


def _plan(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plan that leads to the widths of a resize, with the channels that it kept where it tells them."""
    return {name: new if new >= old else record["kept"].get(name, new) for name, (old, new) in record["widths"].items()}


def _take_over(module: fx.GraphModule, names: Collection[str], shrunk: fx.GraphModule) -> bool:
    """Give a graph the weights and the real numbers of another; tell whether the two have the same ops and shapes.

    Constants, which may go by sizes of inputs, are its own.
    """
    own, other = named_tensors(module), named_tensors(shrunk)
    numbers = floats_of(shrunk)
    alike = (
        own.keys() == other.keys()
        and all(own[name].shape == other[name].shape for name in own)
        and _ops(module) == _ops(shrunk)
        and len(floats_of(module)) == len(numbers)
    )
    if not alike:
        return False
    for name, (_, places) in tensor_slots(module).items():
        for holder, attribute in places if name in names else ():
            set_slot(holder, attribute, other[name])
    left = iter(numbers)
    for node in module.graph.nodes:
        arguments = node.args, node.kwargs
        node.args, node.kwargs = map_aggregate(arguments, lambda one: next(left) if type(one) is float else one)
    module.recompile()
    return True


def _ops(module: fx.GraphModule) -> list[Any]:
    """Return what the nodes of a graph call, but for reads of sizes, which are numbers where sizes are fixed."""
    return [
        node.target for node in module.graph.nodes if node.op not in ("placeholder", "output") and not _is_size(node)
    ]


def _is_size(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "size"


def _floats(arguments: Any) -> Iterator[float]:
    found: list[float] = []
    map_aggregate(arguments, lambda one: found.append(one) if type(one) is float else None)
    yield from found
