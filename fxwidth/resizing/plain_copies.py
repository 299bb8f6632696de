"""Copies of graphs with other widths, for what goes by sizes alone, as times do."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import fx

from fxwidth.costs.measured_latency import gives_copies
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.options import ResizeOptions
from fxwidth.resizing.resize import resize_analyzed
from fxwidth.tracing.analyze import analyze_module


@gives_copies
def plain_copy(module: fx.GraphModule, widths: Mapping[str, int]) -> fx.GraphModule:
    """Return a copy of a graph with other widths in evaluation mode; which channels it has is of no account."""
    own = copy.deepcopy(module)
    options = ResizeOptions(selection="magnitude", fold=False, rotate=False, exact=False)
    resize_analyzed(WidthGraph(analyze_module(own)), widths, options)
    return own.eval()
