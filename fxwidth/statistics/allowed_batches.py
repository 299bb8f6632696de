"""Which batch sizes a graph allows: where the code of a model branches on a size, its graph goes one way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxwidth.analysis.result import Analysis
from fxwidth.frontends.call_signature import Inputs
from fxwidth.runtime.pytrees import flatten_each, map_leaves
from fxwidth.statistics.integer_inputs import has_batch


class AllowedBatches:
    """The batch sizes at which a graph may be run.

    Args:
        analysis: the graph.
    """

    def __init__(self, analysis: Analysis) -> None:
        self._analysis = analysis
        self._checks = [
            (module, [node.args, node.kwargs])
            for node in analysis.module.graph.find_nodes(op="call_module")
            if isinstance(module := analysis.module.get_submodule(str(node.target)), Inputs) and _asks(module)
        ]

    def __contains__(self, size: int) -> bool:
        """Tell whether the graph may be run on so many samples."""
        if not self._checks:
            return True
        values = dict(zip(self._placeholders(), self._inputs_of(size), strict=True))
        return all(_holds(module, fx.map_arg(arguments, values.get)) for module, arguments in self._checks)

    def all_in(self, sizes: range) -> bool:
        """Tell whether it may be run on any of these."""
        return not self._checks or all(size in self for size in sizes)

    def largest(self, most: int) -> int:
        """Return the largest known size that is allowed, at most so many; that of the example where there is none."""
        own = self._analysis.samples_in(self._analysis.inputs)
        return next((size for size in _candidates(most, own) if size in self), own)

    def _placeholders(self) -> list[fx.Node]:
        return list(self._analysis.module.graph.find_nodes(op="placeholder"))

    def _inputs_of(self, size: int) -> list[Any]:
        """Return inputs without memory, one value per placeholder."""

        def resized(example: Tensor) -> Tensor:
            shape = (size, *example.shape[1:]) if has_batch(self._analysis, example) else tuple(example.shape)
            return torch.empty(shape, dtype=example.dtype, device="meta")

        return [map_leaves(resized, value) for value in self._analysis.inputs]


def _candidates(most: int, own: int) -> list[int]:
    """Return batch sizes from the largest on: conditions are bounds, or ask for multiples of something."""
    count = most // own
    powers = {1 << place for place in range(most.bit_length())}
    multiples = {own * (count >> place) for place in range(count.bit_length())}
    return sorted({most} | powers | multiples, reverse=True)


def _asks(checks: Inputs) -> bool:
    """Tell whether an export asks something of a batch: conditions, or one size."""
    return bool(checks.guards) or any(shape and shape[0] is not None for shape in checks.shapes)


def _holds(checks: Inputs, arguments: Any) -> bool:
    try:
        checks.refuse_sizes(flatten_each([*arguments[0], *arguments[1].values()])[0], checks.guards)
    except Exception:
        # What is asked of values cannot be told from sizes: then the example's batch is the one that is known.
        return False
    return True
