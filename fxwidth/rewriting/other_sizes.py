"""Whether a graph that takes inputs of other sizes still takes them after a resize: it is run on one that is larger."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, fx

from fxwidth.analysis.result import Analysis
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.errors import FxwidthError, warn
from fxwidth.frontends.call_signature import INPUTS_MODULE, Inputs
from fxwidth.recording.tape import plain_kernels
from fxwidth.runtime.contexts import evaluating, quiet
from fxwidth.runtime.fake_tensors import fake_like
from fxwidth.runtime.module_state import restored
from fxwidth.runtime.pytrees import deep_tensors, map_leaves
from fxwidth.runtime.tensor_slots import substituted, tensor_slots

Shapes = list[tuple[int, ...]]

# By which others sizes are replaced, in turn: conditions of a graph are bounds, or ask for multiples.
_OTHERS: tuple[Callable[[int], int], ...] = (lambda size: 2 * size, lambda size: size + 1, lambda size: size // 2)


@dataclass(frozen=True)
class OtherSize:
    """Inputs of another length or image size than those of an analysis, and what a graph made of them.

    Attributes:
        inputs: fake tensors, one value per placeholder.
        shapes: those of the results.
    """

    inputs: Sequence[Any]
    shapes: Shapes

    def check(self, analysis: Analysis, maps: IndexMaps) -> None:
        """Check that the graph, as it is now, takes the inputs as before, or fails on them; in that case warn.

        Args:
            analysis: that of the graph as it was.
            maps: the index maps of the resize.

        Raises:
            FxwidthError: it returns results of other sizes.
        """
        given = [tuple(tensor.shape) for tensor in deep_tensors(list(self.inputs))]
        try:
            found = _shapes(analysis, self.inputs)
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            # Fake tensors do not tell whether it did: positions out of a table are seen on values alone.
            warn(
                f"resized, the graph fails on inputs of shapes {given}: {lines[0].rstrip('.')}. It takes the sizes "
                "that it was traced with. Keep the groups that are in the shapes there with keep=, or trace the model "
                "for each size."
            )
            return
        for output, name, old, new in zip(analysis.outputs, analysis.output_names, self.shapes, found, strict=True):
            kept = [dim for dim, axis in enumerate(analysis.axes_of(output)) if not maps.changes(axis)]
            if len(old) != len(new) or any(old[dim] != new[dim] for dim in kept):
                raise FxwidthError(
                    f"resized, the graph would return output {name!r} of shape {new} for inputs of shapes {given}, "
                    f"where it returned {old}. Keep the groups that are in the shapes there with keep=, or trace the "
                    "model for each size. Nothing has changed."
                )


def other_size(analysis: Analysis) -> OtherSize | None:
    """Return inputs of another size that a graph takes, with what it makes of them.

    None where it takes no other, or does not say so: in the front of it are the sizes that may differ.
    """
    checks = getattr(analysis.module, INPUTS_MODULE, None)
    if analysis.record is not None or not isinstance(checks, Inputs):
        return None
    sizes = set(_free_sizes(analysis, checks))
    for other in _OTHERS if sizes else ():
        if all(other(size) > 1 for size in sizes):
            inputs = [map_leaves(partial(_resized, sizes, other), one) for one in analysis.inputs]
            try:
                return OtherSize(inputs, _shapes(analysis, inputs))
            except Exception:
                # The model takes no such size.
                continue
    return None


def _free_sizes(analysis: Analysis, checks: Inputs) -> Iterator[int]:
    """Yield the sizes of dims of inputs that may be others and are no batches."""
    leaves = deep_tensors(list(analysis.inputs))
    for leaf, shape in zip(leaves, checks.shapes, strict=False):
        for size, known, axis in zip(leaf.shape, shape or (), analysis.axes_of(leaf), strict=False):
            if known is None and not any(factor.is_batch for factor in analysis.space.factors(axis)):
                yield size


def _resized(sizes: Collection[int], other: Callable[[int], int], leaf: Tensor) -> Tensor:
    """Return a tensor with other sizes, all that are alike changed alike, but for the batch."""
    shape = [size if dim == 0 or size not in sizes else other(size) for dim, size in enumerate(leaf.shape)]
    return leaf.new_empty(shape)


def _shapes(analysis: Analysis, inputs: Sequence[Any]) -> Shapes:
    module = analysis.module
    fakes = {name: fake_like(analysis.mode, tensor) for name, (tensor, _) in tensor_slots(module).items()}
    with evaluating(module), substituted(module, fakes, restoring=restored), plain_kernels(), quiet(), analysis.mode:
        result = fx.Interpreter(module).run(*inputs, enable_io_processing=False)
    return [tuple(tensor.shape) for tensor in deep_tensors(result)]
