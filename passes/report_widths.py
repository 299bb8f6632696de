"""The pass that tells what has been done to a graph."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from fxwidth.passes.conditions import REPORTED
from fxwidth.passes.width_pass import WidthPass
from fxwidth.recording.graph_meta import REBUILT, REPORT, VERIFIED, notes_of
from fxwidth.reporting import report


class ReportWidths(WidthPass):
    """Writes what has been done to a graph, as plain data, to `gm.meta["fxwidth_report"]`, or gives it to a function.

    The keys are `parameters` (how many the graph has now), `resizes` (as in `fxwidth.Report`), `rebuilt` (the passes
    that have changed nodes), and `verified` (what `VerifyWidths` has found since the last change, or None).

    Args:
        to: takes the dict; by default it stays in `gm.meta`.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.resize(fxwidth.trace(net, torch.randn(2, 8)), {"0": 10})
        >>> told = []
        >>> gm = fxwidth.passes.ReportWidths(told.append)(gm).graph_module
        >>> told[0]["parameters"], told[0]["resizes"][0]["widths"]
        (134, {'0': [16, 10]})
    """

    in_place = False

    def __init__(self, to: Callable[[dict[str, Any]], object] | None = None) -> None:
        super().__init__()
        self._to = to
        self.gives = (REPORTED,) if to is None else ()

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Tell of a graph.

        Args:
            graph_module: the graph; it stays as it is but for its `meta`.
        """
        notes = notes_of(graph_module)
        told = {
            "parameters": sum(parameter.numel() for parameter in graph_module.parameters()),
            "resizes": deepcopy(list(report(graph_module).resizes)),
            "rebuilt": list(notes.get(REBUILT, ())),
            "verified": deepcopy(notes.get(VERIFIED)),
        }
        if self._to is None:
            notes[REPORT] = told
        else:
            self._to(told)
        return PassResult(graph_module, False)
