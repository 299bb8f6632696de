"""The pass that takes out what is not needed."""

from __future__ import annotations

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from fxwidth.errors import FxwidthError
from fxwidth.passes.conditions import EVALUATES, OF_THE_GRAPH, SHAPES
from fxwidth.passes.width_pass import WidthPass
from fxwidth.rewriting.originals import resize_transaction
from fxwidth.simplification.needless_nodes import remove_needless


class CleanUp(WidthPass):
    """Takes nodes out of a graph without which it does the same: results that nobody uses, and identities.

    Only nodes go of which it is known that they do nothing else. Asserts, contexts such as those of `no_grad` and
    autocast, writes in place, code of others, modules with hooks, and whatever draws random numbers stay. Modules and
    parameters stay where they are, so that state dicts and optimizers go on to fit. `fxwidth.save` writes such a graph
    to ".pt2" and pickle, and not to ".safetensors".

    Args:
        inference: whether the graph is for inference alone, and dropouts and what counts in training go too; it must
            then be in eval mode.

    Raises:
        FxwidthError: `inference` is neither True nor False.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Identity(), torch.nn.Dropout(0.5)).eval()
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> [node.name for node in fxwidth.passes.CleanUp(inference=True)(gm).graph_module.graph.nodes]
        ['input_1', '_0', 'output']
    """

    spoils = OF_THE_GRAPH

    def __init__(self, inference: bool = False) -> None:
        super().__init__()
        if not isinstance(inference, bool):
            raise FxwidthError(f"inference={inference!r} must be True or False.")
        self._inference = inference
        self.needs = (SHAPES, EVALUATES) if inference else (SHAPES,)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Take needless nodes out of a graph, in place.

        Args:
            graph_module: the graph.

        Raises:
            FxwidthError: the graph cannot be analysed, or a group has been given width one; nothing has changed.
        """
        self.requires(graph_module)
        count = resize_transaction(graph_module).run(
            lambda: remove_needless(graph_module, self.name, for_inference=self._inference)
        )
        return PassResult(graph_module, count > 0)
