"""The one run of a graph on real numbers that tells what depends on values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from fxwidth.analysis.axis_propagation import run_graph
from fxwidth.errors import FxwidthError
from fxwidth.recording.data_dependent import Values, ValueWriter
from fxwidth.recording.readonly_runs import copies, looking_on
from fxwidth.recording.tape import TapeRecorder, plain_kernels
from fxwidth.rules.registry import keeps


def record_values(module: fx.GraphModule, inputs: Sequence[Any]) -> dict[str, list[tuple[str, Any]]]:
    """Run a graph on real inputs, one value per placeholder, and return what its ops that depend on values found.

    Something is found wherever nothing is, where the code allows it, so that all ways are taken. The module is left as
    it was: its buffers and what it keeps in attributes too.

    Raises:
        FxwidthError: the graph does not run on these inputs.
    """
    try:
        return _record(module, inputs, ValueWriter(never_empty=True))
    except FxwidthError:
        return _record(module, inputs, ValueWriter(never_empty=False))


def _record(module: fx.GraphModule, inputs: Sequence[Any], writer: ValueWriter) -> dict[str, list[tuple[str, Any]]]:
    # A tape that is not emptied would keep every activation alive.
    recorder = TapeRecorder(keeps, lambda _: recorder.calls.clear(), values=writer)
    own = copies(inputs)
    with looking_on(module), recorder:
        run_graph(ValueInterpreter(module, recorder), recorder, own)
    return writer.record


class ValueInterpreter(fx.Interpreter):
    """Runs a graph, telling a recorder which node is at work."""

    def __init__(self, module: fx.GraphModule, recorder: TapeRecorder, graph: fx.Graph | None = None) -> None:
        super().__init__(module, graph=graph)
        self._recorder = recorder

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        self._recorder.begin(n.name)
        return super().run_node(n)


def run_with(module: fx.GraphModule, graph: fx.Graph, inputs: Sequence[Tensor], values: Values) -> Any:
    """Run a graph of a module with values for what depends on values, and return what it returns.

    Raises:
        FxwidthError: it does not run on these inputs.
    """
    recorder = TapeRecorder(keeps, lambda _: recorder.calls.clear(), values=values)
    with plain_kernels(), recorder:
        return run_graph(ValueInterpreter(module, recorder, graph), recorder, inputs)
