"""The moments of noise, found once for a network as it is: those of a plan serve the resize by it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from fxwidth.analysis.result import Analysis
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.recording.graph_meta import EXAMPLES, VALUES, notes_of
from fxwidth.runtime.module_state import stores
from fxwidth.runtime.pytrees import deep_tensors
from fxwidth.statistics.moments import Moments, moments_from_noise

# Of each module those that were found last. They are tensors alone, and so do not keep their module alive.
_KNOWN: WeakKeyDictionary[nn.Module, tuple[bytes, Moments | None]] = WeakKeyDictionary()


def noise_moments(width_graph: WidthGraph, *, keeps: bool = True) -> Moments | None:
    """Return the moments of noise, those found before where neither graph nor values have changed since.

    Args:
        width_graph: the graph.
        keeps: whether they are kept for whoever asks next; beside data they are asked for once, and as large as these.
    """
    module = width_graph.analysis.module
    identity = _identity(width_graph.analysis)
    known = _KNOWN.get(module)
    if known is not None and known[0] == identity:
        return known[1]
    # The old ones are of no use any more, and as large as the new ones.
    forget_noise(module)
    moments = moments_from_noise(width_graph)
    if keeps and identity is not None:
        _KNOWN[module] = identity, moments
    return moments


def forget_noise(module: fx.GraphModule) -> None:
    """Let go of what is known of a module, which has changed."""
    _KNOWN.pop(module, None)


def _identity(analysis: Analysis) -> bytes | None:
    """Return a digest of all that the moments of noise depend on; None where values cannot be read as bytes.

    Neither sums nor version counters would do: rows may change places, and what is written through `.data` does not
    count. A digest reads each value once, at 0.5 to 1.5 GB/s, where the noise takes it dozens of times.
    """
    digest = hashlib.sha256(str(analysis.module.graph).encode())
    # The graph has the wiring, and the calls of ops what modules make of it: strides, slopes, and sizes of inputs.
    for call in analysis.calls:
        digest.update(f"{call.func}{call.arguments}".encode())
    try:
        for name, tensor in _tensors(analysis):
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}{tensor.device}".encode())
            if not tensor.is_meta:
                digest.update(_bytes(tensor))
    except (RuntimeError, TypeError, NotImplementedError):
        return None
    return digest.digest()


def _tensors(analysis: Analysis) -> Iterator[tuple[str, Tensor]]:
    """Yield all values that a run of a graph may read, with names."""
    yield from ((name, entry.tensor) for name, entry in analysis.parameters.items())
    for path, part in stores(analysis.module, Tensor):
        name = path.rpartition(".")[2]
        if name not in part._buffers:
            yield from ((path, tensor) for tensor in deep_tensors(part.__dict__[name]))
    # Integers of the example that a graph was traced with: noise is drawn like them, and some graphs depend on them.
    notes = notes_of(analysis.module)
    examples = (*notes.get(VALUES, (None, None, ()))[2], *notes.get(EXAMPLES, ()))
    yield from (("", tensor) for tensor in examples if tensor is not None)


def _bytes(tensor: Tensor) -> memoryview:
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().data
