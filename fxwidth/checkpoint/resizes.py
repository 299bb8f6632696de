"""The resizes of a graph as text, beside checkpoints that other tools write, such as torch.distributed.checkpoint."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxwidth.checkpoint.file_record import resizes_as_text, resizes_in
from fxwidth.checkpoint.resize_replay import ResizeReplay
from fxwidth.errors import FxwidthError
from fxwidth.rewriting.optimizers import Optimizers
from fxwidth.rewriting.originals import resize_transaction


def resizes_of(gm: fx.GraphModule) -> str:
    """Return the resizes of a graph as JSON text, by which `resize_again` brings a fresh one to the same widths.

    Args:
        gm: the graph, whose parameters may be sharded: values are not looked at.

    Raises:
        FxwidthError: it is no graph, or its history holds what JSON cannot.

    Example:
        >>> from fxwidth.checkpoint.resizes import resize_again, resizes_of
        >>> def make():
        ...     net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        ...     return fxwidth.trace(net, torch.randn(2, 8))
        >>> text = resizes_of(fxwidth.resize(make(), {"0": [0, 3, 5]}))
        >>> resize_again(make(), text).get_parameter("0.weight").shape
        torch.Size([3, 8])
    """
    if not isinstance(gm, fx.GraphModule):
        raise FxwidthError(f"resizes_of takes a torch.fx.GraphModule, but received {type(gm).__name__}.")
    return resizes_as_text(gm)


def resize_again(gm: fx.GraphModule, resizes: Any, *, optimizer: Optimizers | None = None) -> fx.GraphModule:
    """Do on a fresh graph what was done on another of the same model; the values are to be loaded after that.

    The history is that of the other graph then. A ratio that rescales the gain of a norm is applied as it was.

    Args:
        gm: a graph of the original architecture, from `fxwidth.trace`, with whole parameters; changed in place.
        resizes: what `resizes_of` has returned.
        optimizer: what trains it already.

    Raises:
        FxwidthError: it is no such text, or of another model; nothing has changed.
    """
    record = resizes_in(resizes)
    transaction = resize_transaction(gm, optimizer=optimizer)
    replay = ResizeReplay("the record of resizes", record, gm, transaction, optimizer, None)

    def work() -> None:
        replay.run()
        replay.note_history()

    transaction.run(work)
    return gm
