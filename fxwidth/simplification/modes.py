"""Whether a graph is in evaluation."""

from __future__ import annotations

from torch import fx, nn

from fxwidth.runtime.module_state import walk


def evaluates(module: fx.GraphModule) -> bool:
    """Tell whether a graph does what it does in evaluation: it is in that mode, or calls nothing that has modes.

    Graphs of torch.export say that they are in training, and know one mode alone.
    """
    if not module.training:
        return True
    nodes = [node for node in module.graph.find_nodes(op="call_module") if node.target != "_guards_fn"]
    called = (module.get_submodule(str(node.target)) for node in nodes)
    return all(isinstance(part, fx.GraphModule) or type(part) is nn.Module for one in called for _, part in walk(one))
