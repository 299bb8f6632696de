"""The pass that folds batch norms."""

from __future__ import annotations

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from fxwidth.passes.conditions import ALONE, EVALUATES, OF_THE_GRAPH, SHAPES
from fxwidth.passes.width_pass import WidthPass
from fxwidth.rewriting.optimizers import Optimizers, check_optimizer, refuse_other_than_optimizers
from fxwidth.rewriting.originals import resize_transaction
from fxwidth.simplification.batch_norm_folding import fold_batch_norms


class FoldBatchNorm(WidthPass):
    """Makes batch norms a part of the convolutions and linear layers whose results they alone read, for inference.

    Modules of torch.nn, functions and ATen ops are folded alike, transposed and grouped convolutions too. Layers with
    hooks or computed weights stay, and so does what shares tensors with something else, or is called several times. The
    model that was traced stays as it was, with tensors of its own from then on. `fxwidth.save` writes such a graph to
    ".pt2" and pickle, and not to ".safetensors".

    Args:
        optimizer: what trains the graph, or several; weights and biases are new parameters, whose state begins anew.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> gm = fxwidth.trace(net.eval(), torch.randn(2, 3, 6, 6))
        >>> fxwidth.passes.FoldBatchNorm()(gm).graph_module
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (2): ReLU()
        )
    """

    needs = (SHAPES, ALONE, EVALUATES)
    spoils = OF_THE_GRAPH

    def __init__(self, optimizer: Optimizers | None = None) -> None:
        super().__init__()
        refuse_other_than_optimizers(optimizer)
        self._optimizer = optimizer

    @property
    def optimizer(self) -> Optimizers | None:
        """What trains the graph."""
        return self._optimizer

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Fold the batch norms of a graph in place.

        Args:
            graph_module: the graph, in eval mode.

        Raises:
            FxwidthError: the graph cannot be analysed, or a weight would not be finite; nothing has changed.
        """
        check_optimizer(self._optimizer, graph_module)
        transaction = resize_transaction(graph_module, optimizer=self._optimizer)
        count = transaction.run(lambda: fold_batch_norms(graph_module, transaction, self.name, self._optimizer))
        return PassResult(graph_module, count > 0)
