"""Weights that a shrunken copy was made from: whether they are still what they were then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from fxwidth.errors import FxwidthError

# Of each tensor so many entries are compared at each call: torch does not count what is written by way of `.data`.
_ENTRIES = 32


@dataclass(frozen=True, eq=False)
class _Watched:
    name: str
    tensor: ref[Tensor]
    version: int
    place: int
    entries: Tensor

    def is_unchanged(self) -> bool:
        """Tell whether it is still there, and as it was."""
        tensor = self.tensor()
        if tensor is None or (tensor._version, tensor.data_ptr()) != (self.version, self.place):
            return False
        return torch.equal(_spread(tensor), self.entries)


class WatchedWeights:
    """Tells whether a graph is called with the very weights that it was called with before, and these as they were.

    Told are writes that torch counts, and by way of `.data` other memory and writes to any of 32 entries spread over
    each tensor.

    Args:
        names: of the weights, by their positions among the inputs.
        inputs: those of the graph.

    Raises:
        FxwidthError: writes to one of them cannot be told.
    """

    def __init__(self, names: Mapping[int, str], inputs: Sequence[Any]) -> None:
        self._watched: dict[int, _Watched] = {}
        for position, name in names.items():
            tensor = inputs[position]
            if tensor.is_inference() or tensor.is_meta:
                why = "was made in inference mode, where torch counts no writes" if tensor.is_inference() else "is meta"
                raise FxwidthError(
                    f"{name} {why}, so that its values cannot be watched; load the model outside of "
                    "torch.inference_mode(), onto a device."
                )
            self._watched[position] = _Watched(
                name, ref(tensor), tensor._version, tensor.data_ptr(), _spread(tensor).clone()
            )
        self._entries = self._entries_of(inputs)

    def are_unchanged(self) -> bool:
        """Tell whether all are still there, and as they were."""
        return all(one.is_unchanged() for one in self._watched.values())

    def are_those(self, others: WatchedWeights) -> bool:
        """Tell whether these are the same tensors as others, which are unchanged, under the same names."""
        own, other = ({one.name: one.tensor() for one in each._watched.values()} for each in (self, others))
        return own.keys() == other.keys() and all(tensor is other[name] for name, tensor in own.items())

    def are_among(self, inputs: Sequence[Any]) -> bool:
        """Tell whether the weights among some inputs of the graph are these tensors."""
        return all(known.tensor() is inputs[position] for position, known in self._watched.items())

    def refuse_changed(self, inputs: Sequence[Any]) -> None:
        """Check that these weights are as they were.

        Args:
            inputs: those of the graph, with these weights among them.

        Raises:
            FxwidthError: one has been written to.
        """
        for position, known in self._watched.items():
            own = inputs[position]
            if (own._version, own.data_ptr()) != (known.version, known.place):
                raise _changed(known.name)
        found = self._entries_of(inputs)
        if not all(map(torch.equal, found, self._entries)):
            raise _changed("a parameter or buffer")

    def _entries_of(self, inputs: Sequence[Any]) -> list[Tensor]:
        """Return some entries of all weights, those of one dtype and device as one tensor."""
        by_kind: dict[Any, list[Tensor]] = {}
        with torch.no_grad():
            for position in self._watched:
                tensor = inputs[position]
                by_kind.setdefault((tensor.dtype, tensor.device), []).append(_spread(tensor))
            return [torch.cat(entries) for entries in by_kind.values()]


def _spread(tensor: Tensor) -> Tensor:
    """Return some entries of a tensor, [n], at equal distances in its memory."""
    if tensor.numel() == 0:
        return tensor.detach().flatten()
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    count = min(_ENTRIES, span)
    return tensor.detach().as_strided((count,), (span // count,))


def _changed(name: str) -> FxwidthError:
    return FxwidthError(
        f"{name} has been written to since the model was shrunk by compile_backend, and what is compiled has the "
        "weights of then. Call torch.compiler.reset(), after which the next call shrinks the model anew."
    )
