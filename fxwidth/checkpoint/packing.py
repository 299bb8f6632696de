"""A graph as bytes, for a checkpoint of a training that holds more than the graph."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, fx

from fxwidth.checkpoint.loading import load
from fxwidth.checkpoint.pickled import refuse_untrusted
from fxwidth.checkpoint.saving import save


def packed(gm: fx.GraphModule) -> Tensor:
    """Return what `save` writes as Python's pickle, as bytes."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "graph.pt"
        save(gm, path)
        return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def unpacked(graph: Tensor, place: str | Path, *, trusted: bool) -> fx.GraphModule:
    """Return the graph that `packed` was given.

    Args:
        graph: what `packed` has returned.
        place: the file that it is from, for the error.
        trusted: whether it is from someone whom the user trusts.

    Raises:
        FxwidthError: it is not.
    """
    refuse_untrusted(place, trusted=trusted)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "graph.pt"
        path.write_bytes(graph.cpu().numpy().tobytes())
        return load(path, trusted=trusted)
