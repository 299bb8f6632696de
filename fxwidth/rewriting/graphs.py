"""The repair ladder: making every node of a graph do, at the new sizes, what the axes prescribe."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from fxwidth.analysis.data_dependent_pins import nodes_behind_values
from fxwidth.analysis.free_outputs import is_freed
from fxwidth.analysis.op_signatures import Signature, differ, observing, prescribed_signatures
from fxwidth.analysis.result import Analysis
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.errors import FxwidthError
from fxwidth.recording.graph_meta import FREE_OUTPUTS, notes_of
from fxwidth.recording.tape import plain_kernels
from fxwidth.rewriting.added_modules import Additions, drop_unread_constants
from fxwidth.rewriting.attributes import AttributeEdits, sizes_by_calls, sizes_by_shape
from fxwidth.rewriting.autocast_nodes import AutocastNodes
from fxwidth.rewriting.batch_checks import patched_differs_in_batch
from fxwidth.rewriting.literals import patch
from fxwidth.rewriting.lowering import Lowering
from fxwidth.rewriting.node_arguments import NodeState
from fxwidth.rewriting.old_sizes import OldSizes
from fxwidth.rewriting.training_runs import any_batch
from fxwidth.runtime.contexts import evaluating, quiet, training
from fxwidth.runtime.module_state import hooked_part, is_plain_layer, unchanged
from fxwidth.runtime.pytrees import deep_tensors
from fxwidth.runtime.tensor_slots import substituted, tensor_slots


@dataclass
class RewrittenGraph:
    """A graph for the new sizes, checked under fake tensors and not yet in use.

    Attributes:
        graph: the graph.
        additions: what the module must have beside it.
        patched: the nodes whose literals have changed.
        lowered: the nodes that became ATen ops, and why.
        values: what each node is on the inputs of the analysis, as fake tensors.
    """

    graph: fx.Graph
    additions: Additions
    patched: list[str] = field(default_factory=list)
    lowered: dict[str, str] = field(default_factory=dict)
    values: dict[fx.Node, Any] = field(default_factory=dict)


def rewrite_graph(
    analysis: Analysis, maps: IndexMaps, fakes: Mapping[str, Tensor], edits: AttributeEdits
) -> RewrittenGraph:
    """Return the graph of an analysed module for new parameter sizes.

    Args:
        analysis: the tape at the old sizes.
        maps: the index maps of the resize.
        fakes: the resized parameters and buffers as fake tensors, by name.
        edits: takes the changes of module attributes, which are made at once; the caller undoes them on failure.

    Raises:
        FxwidthError: a node cannot be made to do what is prescribed.
    """
    return _Rewriter(analysis, maps, fakes, edits).run()


class _Rewriter:
    def __init__(self, analysis: Analysis, maps: IndexMaps, fakes: Mapping[str, Tensor], edits: AttributeEdits) -> None:
        self._analysis = analysis
        self._maps = maps
        self._module = analysis.module
        self._edits = edits
        self._fakes = {name: fakes.get(name, entry.fake) for name, entry in analysis.parameters.items()}
        self._changed = set(fakes)
        self._result = RewrittenGraph(copy.deepcopy(self._module.graph), Additions(self._module))
        self._graph = self._result.graph
        self._values = self._result.values
        additions = self._result.additions
        self._old_values: dict[fx.Node, Any] = {}
        self._old = OldSizes(analysis, edits, self._old_values)
        # What one run has found must not become a number in the graph.
        self._behind_values = frozenset(nodes_behind_values(analysis))
        self._lowering = Lowering(analysis, maps, self._graph, additions.constant, additions.dropout)

    def run(self) -> RewrittenGraph:
        analysis = self._analysis
        holders = self._holders()
        with evaluating(self._module), substituted(self._module, self._fakes), AutocastNodes() as autocast:
            for holder in holders:
                self._edits.apply(holder, sizes_by_shape(holder))
            inputs = iter(analysis.inputs)
            self._interpreter = fx.Interpreter(self._module, graph=self._graph)
            for node in list(self._graph.nodes):
                self._old_values[node] = analysis.node_values.get(node.name)
                if node.op == "placeholder":
                    self._values[node] = next(inputs)
                elif node.op == "output":
                    self._check_outputs(node)
                elif autocast.switch(node):
                    self._values[node] = self._old_values[node]
                else:
                    self._rewrite(node)
        drop_unread_constants(self._graph)
        self._graph.lint()
        return self._result

    def _holders(self) -> list[nn.Module]:
        slots = tensor_slots(self._module)
        found = {holder: holder for name in self._changed for holder, _ in slots[name][1]}
        return list(found.values())

    def _rewrite(self, node: fx.Node) -> None:
        if not self._touched(node):
            self._values[node] = self._old_values[node]
            return
        calls = self._analysis.calls_of(node.name)
        if node.op == "get_attr":
            self._values[node] = self._run(node)[0]
            return
        if node.op == "call_module":
            module = self._module.get_submodule(str(node.target))
            self._edits.apply(module, sizes_by_calls(module, calls, self._maps))
            self._edits.apply(module, sizes_by_shape(module))  # in_channels follows from groups
            for part in module.modules():
                if own := self._analysis.calls_of_part(part):
                    self._edits.apply(part, sizes_by_calls(part, own, self._maps))
                    self._edits.apply(part, sizes_by_shape(part))
        wanted = prescribed_signatures(calls, self._maps)
        problem = self._try(node, wanted)
        if problem is None:
            self._check_training(node)
            return
        if patch(self._state(node)):
            problem = self._try(node, wanted)
        if problem is None:
            self._check_batch(node)
            self._result.patched.append(node.name)
            return
        self._lower(node, problem)

    def _check_batch(self, node: fx.Node) -> None:
        """Check that a node with other literals follows the batch as it did before."""
        with quiet():
            problem = patched_differs_in_batch(self._analysis, self._maps, node)
        if problem is not None and self._old.follows_batch(node.name):
            raise FxwidthError(
                f"node {node.name!r} has a number in it that holds both the batch and a width, and would not follow "
                f"the batch size any more: for a batch larger by one it does {problem}. Keep its groups with keep=, or "
                "take the number from the shape of a tensor."
            )

    def _check_training(self, node: fx.Node) -> None:
        """Check that a module does at the new sizes in training what is prescribed for it, or runs as it did."""
        module = self._module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if module is None or is_plain_layer(module):
            return
        calls = self._analysis.training_calls.get(node.name)
        observed, problem = self._in_training_mode(node, module)
        if problem is None and calls:
            problem = differ(observed, prescribed_signatures(calls, self._maps))
        if problem is not None and (calls or self._trained_before(node, module)):
            raise FxwidthError(
                f"node {node.name!r} has a size written into what it does in training: {problem}. Keep its groups with "
                "keep=, or take the size from a tensor."
            )

    def _in_training_mode(self, node: fx.Node, module: nn.Module) -> tuple[list[Signature], str | None]:
        """Run a module in training; return what it did, and what went wrong if anything did."""
        try:
            with quiet(), training(module), any_batch():
                return self._run(node)[1], None
        except Exception as error:
            return [], str(error).strip().partition("\n")[0] or type(error).__name__

    def _trained_before(self, node: fx.Node, module: nn.Module) -> bool:
        """Tell whether a module could be run in training at the old sizes: some need targets, or look at values."""
        values, self._values = self._values, self._old_values
        try:
            with self._old.restored():
                return self._in_training_mode(node, module)[1] is None
        finally:
            self._values = values

    def _touched(self, node: fx.Node) -> bool:
        """Tell whether anything a node works with has changed."""
        if any(self._values[source] is not self._old_values[source] for source in node.all_input_nodes):
            return True
        fresh = any(
            self._maps.changes(axis)
            for call in self._analysis.calls_of(node.name)
            for axes in (*call.output_axes, *call.axes.values())
            for axis in axes
        )
        if fresh or node.op == "get_attr":
            return True
        if node.op == "call_module":
            module = self._module.get_submodule(str(node.target))
            return any(name in self._changed for name in self._names_of(module))
        return False

    def _names_of(self, module: nn.Module) -> set[str]:
        own = {tensor for tensor, _ in tensor_slots(module).values()}
        return {name for name, fake in self._fakes.items() if fake in own}

    def _try(self, node: fx.Node, wanted: list[Any]) -> str | None:
        """Run a node at the new sizes; return None when it does what is wanted, else what is wrong."""
        try:
            with quiet():
                value, observed = self._run(node)
        except Exception as error:
            lines = str(error).strip().splitlines()
            return lines[0] if lines else type(error).__name__
        problem = differ(observed, wanted) or self._wrong_shape(node.name, value)
        if problem is None:
            self._values[node] = value
            if node.op == "call_module":
                # Again, for weights that a module computes when it is called.
                module = self._module.get_submodule(str(node.target))
                self._edits.apply(module, sizes_by_shape(module))
        return problem

    def _run(self, node: fx.Node) -> tuple[Any, list[Signature]]:
        """Run a node at the new sizes; return its value and what it did."""
        args = fx.node.map_arg(node.args, lambda source: self._values[source])
        kwargs = fx.node.map_arg(node.kwargs, lambda source: self._values[source])
        recorder, observed = observing(self._analysis, node.name)
        called = self._module.get_submodule(str(node.target)) if node.op == "call_module" else nn.Module()
        with unchanged(called), plain_kernels(), self._analysis.mode, recorder:
            return getattr(self._interpreter, node.op)(node.target, args, kwargs), observed

    def _wrong_shape(self, name: str, value: Any) -> str | None:
        wanted = [tuple(map(self._maps.size, axes)) for axes in self._analysis.node_axes[name]]
        shapes = [tuple(tensor.shape) for tensor in deep_tensors(value)]
        return None if shapes == wanted else f"results of shapes {shapes} where {wanted} are needed"

    def _state(self, node: fx.Node) -> NodeState:
        old = self._old_values[node]
        return NodeState(
            node,
            self._analysis.calls_of(node.name),
            old,
            self._analysis.node_axes[node.name][0] if isinstance(old, Tensor) else None,
            self._old_values,
            self._values,
            self._maps,
            self._analysis.axes_of,
            node.name in self._behind_values,
        )

    def _lower(self, node: fx.Node, problem: str) -> None:
        name = node.name
        if not deep_tensors(self._old_values[node]) and not self._writes(name):
            # A number computed from a size: whoever uses it is patched.
            self._values[node] = self._run_inserted(node, name, problem)
            return
        whole = "what it does depends on values" if name in self._behind_values else None
        whole = f"it {self._analysis.effects[name]}" if name in self._analysis.effects else whole
        module = self._module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if module is not None and (part := hooked_part(module)) is not None:
            whole = f"{part} has hooks, which nothing would call any more"
        if whole is not None:
            raise FxwidthError(
                f"node {name!r} has a size written into its code ({problem}), and {whole}, so that it cannot be taken "
                "apart into ATen ops. Keep its groups with keep=."
            )
        self._old.refuse_other_in_batch(name, problem)
        in_training, sizes = self._old.in_training(node, problem), self._old.followings(node)
        result, inserted = self._lowering.lower(node, name, self._old_values, in_training, sizes)
        for new in inserted:
            self._values[new] = self._run_inserted(new, name, problem)
        node.replace_all_uses_with(result)
        self._old_values[result] = self._old_values[node]
        if (wrong := self._wrong_shape(name, self._values[result])) is not None:
            raise FxwidthError(f"node {name!r} cannot be rewritten: {wrong}. Keep its groups with keep=.")
        self._graph.erase_node(node)
        self._result.lowered[name] = problem

    def _writes(self, name: str) -> bool:
        """Tell whether a node writes to a tensor: what it is there for may not be what it returns."""
        return any(call.func._schema.is_mutable for call in self._analysis.calls_of(name))

    def _run_inserted(self, node: fx.Node, lowered: str, problem: str) -> Any:
        additions = self._result.additions
        if node.op == "get_attr" and str(node.target) in additions.constants:
            return self._analysis.mode.from_tensor(additions.constants[str(node.target)])
        if node.op == "call_module" and str(node.target) in additions.modules:
            return self._values[node.all_input_nodes[0]]
        try:
            return self._run(node)[0]
        except Exception as error:
            raise FxwidthError(
                f"node {lowered!r} cannot be rewritten for the new sizes: {problem.rstrip('.')}; taken apart into ATen "
                f"ops, {node.name!r} fails: {str(error).rstrip('.')}. Keep its groups with keep=."
            ) from error

    def _check_outputs(self, node: fx.Node) -> None:
        values = deep_tensors(fx.node.map_arg(node.args, lambda source: self._values[source]))
        analysis = self._analysis
        free = notes_of(analysis.module).get(FREE_OUTPUTS, ())
        named = zip(analysis.outputs, analysis.output_names, strict=True)
        read = [output for output, name in named if output not in analysis.states and not is_freed(name, free)]
        wanted = [tuple(map(self._maps.size, analysis.axes_of(output))) for output in analysis.outputs]
        if wanted != [tuple(value.shape) for value in values] or any(map(self._changes, read)):
            old = [tuple(tensor.shape) for tensor in analysis.outputs]
            new = [tuple(tensor.shape) for tensor in values]
            raise FxwidthError(f"the outputs would change their shapes from {old} to {new}; no resize was made.")

    def _changes(self, tensor: Tensor) -> bool:
        return any(map(self._maps.changes, self._analysis.axes_of(tensor)))
