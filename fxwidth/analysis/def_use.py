"""Which op of a tape makes each tensor, and which ops take it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fxwidth.analysis.result import Analysis
from fxwidth.memo import per_graph
from fxwidth.recording.tape import OpCall


@dataclass(frozen=True, eq=False)
class DefUse:
    """The producers and consumers of the tensors of a tape.

    Attributes:
        producers: the op that returned a tensor; of one that is written to, the last that did so.
        consumers: the ops that take a tensor, each once, in order.
    """

    producers: Mapping[Tensor, OpCall]
    consumers: Mapping[Tensor, Sequence[OpCall]]

    def consumers_of(self, tensor: Tensor) -> Sequence[OpCall]:
        """Return the ops that take a tensor."""
        return self.consumers.get(tensor, ())


@per_graph
def def_use(analysis: Analysis) -> DefUse:
    """Return what makes and takes the tensors of a graph in evaluation."""
    producers: dict[Tensor, OpCall] = {}
    consumers: dict[Tensor, list[OpCall]] = {}
    for call in analysis.calls:
        producers.update(dict.fromkeys(call.outputs, call))
        for tensor in dict.fromkeys(call.inputs):
            consumers.setdefault(tensor, []).append(call)
    return DefUse(producers, consumers)
