"""What a graph does between nodes that switch autocast on and off, as a module of its own under a `with`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.utils.fuser_utils import erase_nodes, fuse_as_graphmodule, insert_subgm

from fxwidth.rewriting.autocast_nodes import ENTER_AUTOCAST, EXIT_AUTOCAST


def with_autocast_regions(module: fx.GraphModule) -> fx.GraphModule:
    """Return a graph whose autocast is switched by `with` statements: itself where it has none, or one like it.

    Dynamo writes the two ends of such a statement as two nodes. Not every version of torch can take these a second
    time: some end the graph there, and some fail, as autocast is no longer what it was.

    Args:
        module: the graph; its parameters are shared.
    """
    if not any(node.target is ENTER_AUTOCAST for node in module.graph.nodes):
        return module
    graph = fx.Graph(tracer_cls=module.graph._tracer_cls)
    graph.output(graph.graph_copy(module.graph, {}))
    result = fx.GraphModule(module, graph)
    for number, enter in enumerate([node for node in graph.nodes if node.target is ENTER_AUTOCAST]):
        if not enter._erased:  # those within another region are done with it
            _put_into_region(result, enter, f"autocast_{number}")
    graph.eliminate_dead_code()
    graph.lint()
    result.recompile()
    return result


class _Region(nn.Module):
    """Runs a graph under autocast."""

    def __init__(self, body: fx.GraphModule, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self.body = body
        self.arguments = arguments

    def forward(self, *given: Tensor) -> Any:
        device, dtype, enabled, cache_enabled = self.arguments
        with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled):
            return self.body(*given)


def _put_into_region(module: fx.GraphModule, enter: fx.Node, name: str) -> None:
    nodes = list(module.graph.nodes)
    start = nodes.index(enter)
    end = next(i for i, node in enumerate(nodes) if node.target is EXIT_AUTOCAST and node.args[0] is enter)
    # Where a region is taken out, torch writes what it is given among its nodes.
    inside = [node for node in nodes[start + 1 : end] if node.op != "placeholder"]
    module.graph.erase_node(nodes[end])
    arguments = enter.args
    module.graph.erase_node(enter)
    body, inputs, outputs = fuse_as_graphmodule(module, inside, name)
    if not outputs:
        erase_nodes(module, inside)
        return
    insert_subgm(module, body, inputs, outputs)
    erase_nodes(module, inside)
    setattr(module, name, _Region(with_autocast_regions(body), arguments))
