"""What modules that keep tensors in attributes read of them when they are called again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fxwidth.analysis.result import Analysis
from fxwidth.recording.tape import TapeRecorder
from fxwidth.runtime.pytrees import deep_tensors

# A tensor may be handed from attribute to attribute before it is read.
_CALLS = 3


def kept_and_read(analysis: Analysis, recorder: TapeRecorder, node: str, call: Callable[[], Any]) -> list[Tensor]:
    """Return the tensors that a node has computed and that its next calls read, or may read.

    Args:
        analysis: knows what the node has computed.
        recorder: that which is at work.
        node: the name of a node whose module has tensors of this run in attributes.
        call: calls that module again.
    """
    # What is written to in place may be a buffer, which is resized as such.
    own = {*(entry.fake for entry in analysis.parameters.values()), *deep_tensors(analysis.inputs)}
    computed = [tensor for one in analysis.calls_of(node) for tensor in one.outputs if tensor not in own]
    read = set[Tensor]()
    for _ in range(_CALLS):
        recorder.begin(node)
        with recorder.aside(judged=False) as calls:
            try:
                call()
            except Exception:  # its state is for calls of another kind, or depends on values
                return computed
        read |= {tensor for one in calls for tensor in one.inputs}
    return [tensor for tensor in computed if tensor in read]
