"""The one run of a graph on real numbers that tells what depends on values."""

from __future__ import annotations

import dis
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from fxwidth.analysis.axis_propagation import run_graph
from fxwidth.errors import FxwidthError
from fxwidth.recording.data_dependent import Check, OtherWay, OtherWayError, Values, ValueWriter
from fxwidth.recording.readonly_runs import copies, looking_on
from fxwidth.recording.tape import TapeRecorder, plain_kernels
from fxwidth.rules.registry import keeps

# Each of them is a run of its own.
_MOST_FLAGS = 32


def record_values(module: fx.GraphModule, inputs: Sequence[Any]) -> dict[str, list[tuple[str, Any]]]:
    """Run a graph on real inputs, one value per placeholder, and return what its ops that depend on values found.

    Something is found wherever nothing is, where the code allows it, so that all ways are taken. The module is left as
    it was: its buffers and what it keeps in attributes too.

    Raises:
        FxwidthError: the graph does not run on these inputs.
    """
    never_empty = True
    try:
        record = _record(module, inputs, ValueWriter(never_empty))
    except FxwidthError:
        never_empty = False
        record = _record(module, inputs, ValueWriter(never_empty))
    flags = [
        (node, place) for node, found in record.items() for place, (_, one) in enumerate(found) if isinstance(one, bool)
    ]
    for node, place in flags if len(flags) <= _MOST_FLAGS else ():
        if _ends_otherwise(module, inputs, OtherWay(never_empty, node, place)):
            name, flag = record[node][place]
            record[node][place] = name, Check(flag)
    return record


def _ends_otherwise(module: fx.GraphModule, inputs: Sequence[Any], other: OtherWay) -> bool:
    """Tell whether a graph raises an error right where a flag is another.

    An op in between might be a look at something else, and the flag that is not true would be the reason of the error.
    """
    try:
        _record(module, inputs, other)
    except FxwidthError as error:
        cause = error.__cause__
        return cause is not None and not isinstance(cause, OtherWayError) and _is_raised_by_code(cause)
    return False


def _is_raised_by_code(error: BaseException) -> bool:
    """Tell whether a statement has raised an error: what fails in an op may do so for the flag that is not true."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"


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
