"""What nodes do at the sizes that they have before a resize: in another batch, and in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from fxwidth.analysis.result import Analysis
from fxwidth.errors import FxwidthError
from fxwidth.frontends.as_traced import AsTraced
from fxwidth.frontends.train_eval_merge import TrainingFlag
from fxwidth.rewriting.attributes import AttributeEdits
from fxwidth.rewriting.batch_checks import differs_in_batch
from fxwidth.rewriting.free_sizes import Followings, followings
from fxwidth.rewriting.training_behaviour import Step, training_steps
from fxwidth.rewriting.training_runs import UnexplainedError
from fxwidth.runtime.contexts import quiet
from fxwidth.runtime.pytrees import deep_tensors
from fxwidth.runtime.tensor_slots import substituted


class OldSizes:
    """Runs nodes once more as they were.

    Args:
        analysis: the tape at the old sizes.
        edits: the changes of module attributes, which are suspended meanwhile.
        values: what each node was.
    """

    def __init__(self, analysis: Analysis, edits: AttributeEdits, values: Mapping[fx.Node, Any]) -> None:
        self._analysis = analysis
        self._module = analysis.module
        self._edits = edits
        self._values = values

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Give the module its old parameters and attributes for a while."""
        old = {name: entry.fake for name, entry in self._analysis.parameters.items()}
        with self._edits.suspended(), substituted(self._module, old):
            yield

    def follows_batch(self, name: str) -> bool:
        """Tell whether a node does at a larger batch what the tape prescribes for it."""
        with self.restored(), quiet():
            return differs_in_batch(self._analysis, name) is None

    def refuse_other_in_batch(self, name: str, problem: str) -> None:
        """Check that no number that depends on the batch would be written into the graph.

        Raises:
            FxwidthError: one would.
        """
        with self.restored(), quiet():
            other = differs_in_batch(self._analysis, name)
        if other is not None:
            raise FxwidthError(
                f"node {name!r} has to be taken apart into ATen ops ({problem}), which would not follow the batch "
                f"size as it does: for a batch larger by one it does {other}. Keep its groups with keep=, or trace "
                "the model so that this module is taken apart."
            )

    def followings(self, node: fx.Node) -> Followings:
        """Return how the numbers in the ops of a node follow sizes of what it takes."""
        with self.restored(), quiet():
            return followings(self._analysis, node, self._values)

    def in_training(self, node: fx.Node, problem: str) -> tuple[list[Step], Any] | None:
        """Return what a node does in training, where that can differ.

        Raises:
            FxwidthError: it cannot be told.
        """
        callee = self._callee(node)
        flags = {source: self._value_in_training(source) for source in node.all_input_nodes}
        if not isinstance(callee, nn.Module) and all(value is self._values[n] for n, value in flags.items()):
            return None
        in_evaluation, in_training = _arguments(node, self._values), _arguments(node, flags)
        twins = self._analysis.calls_of(node.name)
        try:
            with self.restored(), quiet():
                mode = self._analysis.mode
                return training_steps(self._module, callee, in_evaluation, in_training, twins, mode)
        except UnexplainedError as error:
            raise FxwidthError(
                f"node {node.name!r} has to be taken apart into ATen ops ({problem}), which cannot follow what the "
                f"module does in training: {error}. Keep the groups of this module with keep=, or trace the model so "
                "that it is taken apart."
            ) from error

    def _callee(self, node: fx.Node) -> Callable[..., Any]:
        if node.op == "call_module":
            return self._module.get_submodule(str(node.target))
        if node.op == "call_method":
            name = str(node.target)
            return lambda owner, *args, **kwargs: getattr(owner, name)(*args, **kwargs)
        assert callable(node.target)
        return node.target

    def _value_in_training(self, node: fx.Node) -> Any:
        """Return what a node is in training: numbers may be others, tensors are looked at elsewhere."""
        value = self._values[node]
        if node.op not in ("call_module", "call_function") or deep_tensors(value):
            return value
        if node.op == "call_module":
            callee = self._callee(node)
            # It is asked for what it does when it is put in training.
            return isinstance(callee, TrainingFlag) if isinstance(callee, (TrainingFlag, AsTraced)) else value
        inputs = {source: self._value_in_training(source) for source in node.all_input_nodes}
        if all(own is self._values[source] for source, own in inputs.items()):
            return value
        args, kwargs = _arguments(node, inputs)
        return self._callee(node)(*args, **kwargs)


def _arguments(node: fx.Node, values: Mapping[fx.Node, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a node's positional and keyword arguments with values for nodes."""
    args: Any = fx.node.map_arg(node.args, values.__getitem__)
    kwargs: Any = fx.node.map_arg(node.kwargs, values.__getitem__)
    return args, kwargs
