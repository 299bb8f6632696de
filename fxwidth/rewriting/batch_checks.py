"""Whether what the tape prescribes for a node holds at another batch size, before the node is replaced by it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from typing import Any

from torch import Tensor, fx

from fxwidth.analysis.op_signatures import Signature, differ, observing, prescribed_signatures
from fxwidth.analysis.result import Analysis
from fxwidth.axes.factors import Axis
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.recording.tape import Axes, OpCall, plain_kernels
from fxwidth.runtime.module_state import unchanged
from fxwidth.runtime.pytrees import deep_tensors, map_leaves


def differs_in_batch(analysis: Analysis, name: str) -> str | None:
    """Return None where a node does at a larger batch what the tape prescribes for that, else what it does instead.

    The module must hold its old parameters, as fake tensors.

    Args:
        analysis: the tape; its module's own graph is looked at.
        name: the node.
    """
    if analysis.batch is None:
        return None
    larger = IndexMaps(analysis.space, {}, batch_growth=1)
    node = next(node for node in analysis.module.graph.nodes if node.name == name)
    observed = _at_larger_batch(analysis, larger, node)
    if isinstance(observed, str):
        return observed
    lost = _lost_batch(analysis, larger, node)
    if lost is not None:
        return lost
    return differ(observed, prescribed_signatures(analysis.calls_of(name), larger))


def patched_differs_in_batch(analysis: Analysis, maps: IndexMaps, node: fx.Node) -> str | None:
    """Return None where a node of the new graph does at a larger batch what is prescribed, else what it does instead.

    The module must hold its new parameters, as fake tensors.

    Args:
        analysis: the tape.
        maps: the index maps of the resize.
        node: the node, whose name is the one on the tape.
    """
    larger = maps.with_larger_batch()
    if analysis.batch is None:
        return None
    observed = _at_larger_batch(analysis, larger, node)
    if isinstance(observed, str):
        return observed
    return differ(observed, prescribed_signatures(analysis.calls_of(node.name), larger))


def _at_larger_batch(analysis: Analysis, larger: IndexMaps, node: fx.Node) -> list[Signature] | str:
    """Return what a node does at a larger batch, results of a wrong shape included, or that it does not run."""
    recorder, observed = observing(analysis, node.name)
    runner = _LargerBatch(analysis, larger, node.graph)
    try:
        with plain_kernels(), analysis.mode:
            arguments = runner.arguments(node)
            with recorder:
                value = runner.run_with(node, arguments)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"not run: {lines[0]}"
    shapes = [list(tensor.shape) for tensor in deep_tensors(value)]
    known = [[larger.size(axis) for axis in axes] for axes in analysis.node_axes[node.name]]
    return observed if shapes == known else f"results of shapes {shapes} where {known} are needed"


def _lost_batch(analysis: Analysis, larger: IndexMaps, node: fx.Node) -> str | None:
    """Return None, or what a node takes at a larger batch where its axes do not say so.

    An op without a rule makes dims of fixed sizes, though they may be those of the batch.
    """
    if analysis.record is not None or not any(_ends_batch(analysis, call) for call in analysis.calls):
        return None
    taken = [source for source in node.all_input_nodes if deep_tensors(analysis.node_values[source.name])]
    inputs = (map_leaves(lambda t: enlarged(t, analysis.axes_of(t), larger), value) for value in analysis.inputs)
    run = fx.Interpreter(analysis.module, garbage_collect_values=False)
    try:
        with unchanged(analysis.module), plain_kernels(), analysis.mode:
            run.args_iter = iter(tuple(inputs))
            for before in takewhile(lambda other: other is not node, analysis.module.graph.nodes):
                run.env[before] = run.run_node(before)
    except Exception as error:
        return f"not run: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
    for source in taken:
        found = [list(tensor.shape) for tensor in deep_tensors(run.env[source])]
        known = [[larger.size(axis) for axis in axes] for axes in analysis.node_axes[source.name]]
        if found != known:
            return f"take tensors of shapes {found} from {source.name!r} where {known} is known"
    return None


def _ends_batch(analysis: Analysis, call: OpCall) -> bool:
    """Tell whether an op takes tensors that have the batch and returns some that have not."""
    dims = [axis for axes in call.axes.values() for axis in axes]
    results = [axis for axes in call.output_axes for axis in axes]
    holds = partial(_holds_batch, analysis)
    return any(map(holds, dims)) and bool(results) and not any(map(holds, results))


def _holds_batch(analysis: Analysis, axis: Axis) -> bool:
    return any(factor.is_batch for factor in analysis.space.factors(axis))


class _LargerBatch:
    """Values of a graph's nodes at a larger batch: tensors by their axes, numbers computed anew."""

    def __init__(self, analysis: Analysis, maps: IndexMaps, graph: fx.Graph | None = None) -> None:
        self._analysis = analysis
        self._maps = maps
        self._interpreter = fx.Interpreter(analysis.module, graph=graph)
        # A module may ask whether two arguments are one.
        self._values: dict[fx.Node, Any] = {}

    def arguments(self, node: fx.Node) -> tuple[Any, Any]:
        """Return the arguments of a node, by position and by name."""
        return fx.node.map_arg(node.args, self._value), fx.node.map_arg(node.kwargs, self._value)

    def run_with(self, node: fx.Node, arguments: tuple[Any, Any]) -> Any:
        """Run a node."""
        return getattr(self._interpreter, node.op)(node.target, *arguments)

    def _value(self, node: fx.Node) -> Any:
        if node not in self._values:
            self._values[node] = self._computed(node)
        return self._values[node]

    def _computed(self, node: fx.Node) -> Any:
        value = self._analysis.node_values.get(node.name)
        if deep_tensors(value):
            axes = iter(self._analysis.node_axes[node.name])
            return map_leaves(lambda tensor: enlarged(tensor, next(axes), self._maps), value)
        if node.op == "placeholder":
            return value
        return self.run_with(node, self.arguments(node))


def enlarged(tensor: Tensor, axes: Axes, maps: IndexMaps) -> Tensor:
    """Return a tensor of the sizes that maps give its axes."""
    return with_shape(tensor, [maps.size(axis) for axis in axes])


def with_shape(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a tensor of another shape whose dims lie in the same order in memory; itself if it has that shape."""
    if list(tensor.shape) == list(shape):
        return tensor
    # Which ops a linear layer runs depends on the order of the dims in memory.
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.new_empty([shape[dim] for dim in order]).permute([order.index(dim) for dim in range(len(order))])
