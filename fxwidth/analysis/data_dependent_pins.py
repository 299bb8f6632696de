"""What must keep its size in a part that is followed along one way only: other values may lead other ways.

A part that looks at values is called as it is, also after a resize, and nothing that one run has found is written into
the graph. What the run cannot show are the ways that it did not take. So parameters stay as they are where another way
may use them otherwise: behind a number read from a tensor, in parts of which something was never used, and beside ops
on empty tensors, which take short cuts. What a part keeps from one call may lead the next one another way, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fxwidth.axes.factor_space import FactorSpace
from fxwidth.axes.pins import BRANCHED, KEPT, ON_EMPTY, OTHER_WAY
from fxwidth.recording.data_dependent import Check
from fxwidth.recording.tape import OpCall
from fxwidth.runtime.tensor_slots import tensor_slots

if TYPE_CHECKING:
    from fxwidth.analysis.result import Analysis


def pin_other_ways(analysis: Analysis) -> None:
    """Pin the parameters that a node may use otherwise for other values than those on record, or in its next call."""
    if not (analysis.record or analysis.keeping):
        return
    pins = _Pins(analysis)
    for node in analysis.record or ():
        pins.behind_numbers(node)
    for node in dict.fromkeys([*(analysis.record or ()), *analysis.keeping]):
        pins.beside_unused(node)
    for node, tensors in analysis.keeping.items():
        pins.read_by_next_calls(node, tensors)
    if analysis.record:
        pins.beside_empty_tensors()


def nodes_behind_values(analysis: Analysis) -> list[str]:
    """Return the nodes that depend on values, and those that work with what these return, in order."""
    found: dict[str, None] = {}
    for node in analysis.module.graph.nodes:
        if node.name in (analysis.record or ()) or any(source.name in found for source in node.all_input_nodes):
            found[node.name] = None
    return list(found)


class _Pins:
    def __init__(self, analysis: Analysis) -> None:
        self._analysis = analysis
        self._space: FactorSpace = analysis.space
        self._parameters = {entry.fake: entry for entry in analysis.parameters.values()}

    def behind_numbers(self, node: str) -> None:
        """Pin the parameters that a node uses after it has read a number from a tensor."""
        has_read = False
        for call in self._analysis.calls_of(node):
            reads = call.recorded is not None and not call.outputs and not isinstance(call.recorded, Check)
            has_read = has_read or (reads and not self._is_recurrent(node, call.part))
            if has_read:
                self._pin_operands(call, call, BRANCHED)

    def beside_unused(self, node: str) -> None:
        """Pin all parameters of a module of which some were not used."""
        module = self._module(node)
        if module is None:
            return
        own = {tensor for tensor, _ in tensor_slots(module).values() if isinstance(tensor, nn.Parameter)}
        calls = self._analysis.calls_of(node)
        used = {self._parameters[t].tensor for call in calls for t in call.inputs if t in self._parameters}
        unused = [name for name, entry in self._analysis.parameters.items() if entry.tensor in own - used]
        for call in calls if unused else ():
            told = f"{OTHER_WAY}, on which {unused[0]} was not used; on another both may be"
            self._pin_operands(call, call, told)

    def read_by_next_calls(self, node: str, tensors: Sequence[Tensor]) -> None:
        """Pin tensors that a node keeps from one call to the next, in which other ops may use them."""
        for tensor in tensors:
            self._space.context = node
            for axis in self._analysis.axes_of(tensor):
                self._space.pin(axis, KEPT)

    def beside_empty_tensors(self) -> None:
        """Pin the parameters of parts that were run on empty tensors."""
        places = {
            (call.node, call.part): call
            for call in self._analysis.calls
            if any(tensor.numel() == 0 and tensor.is_floating_point() for tensor in call.inputs)
        }
        for call in self._analysis.calls if places else ():
            empty = places.get((call.node, call.part))
            if empty is not None:
                self._pin_operands(call, empty, ON_EMPTY)

    def _module(self, node: str) -> nn.Module | None:
        found = next(one for one in self._analysis.module.graph.nodes if one.name == node)
        return self._analysis.module.get_submodule(str(found.target)) if found.op == "call_module" else None

    def _is_recurrent(self, node: str, part: str) -> bool:
        """Tell whether the code at work is that of a recurrent layer: it reads lengths of sequences, and counts."""
        module = self._module(node)
        layer = None if module is None else module.get_submodule(part)
        if type(layer).__module__ != nn.RNNBase.__module__ or layer is None:
            return False
        return not (layer._forward_hooks or layer._forward_pre_hooks)

    def _pin_operands(self, call: OpCall, cause: OpCall, reason: str) -> None:
        for tensor in filter(self._is_parameter, call.inputs):
            self._space.context = cause.place
            for axis in self._analysis.axes_of(tensor):
                self._space.pin(axis, reason)

    def _is_parameter(self, tensor: Tensor) -> bool:
        return tensor in self._parameters
