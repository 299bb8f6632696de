"""The pass that takes running statistics of batch norms anew."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from fxwidth.errors import FxwidthError
from fxwidth.passes.conditions import ALONE, SHAPES
from fxwidth.passes.width_pass import WidthPass
from fxwidth.reconstruction.bn_averages import averaged_statistics
from fxwidth.rewriting.originals import resize_transaction
from fxwidth.runtime.tensor_slots import tensor_slots
from fxwidth.statistics.calibration_data import refuse_other_than_batches, replayed
from fxwidth.tracing.analyze import analyze_module


class RecalibrateBatchNorm(WidthPass):
    """Takes the running statistics of batch norms anew from data, as `torch.optim.swa_utils.update_bn` does.

    They become the averages over all batches, of means and of unbiased variances, in training mode; what was there
    before is forgotten. Batch norms that stay in evaluation, and those without running statistics, stay as they are.

    Args:
        data: batches as for `fxwidth.resize`, all of which are used.

    Raises:
        FxwidthError: data cannot be gone through batch by batch.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 4)).eval()
        >>> x = torch.randn(64, 8)
        >>> gm = fxwidth.passes.RecalibrateBatchNorm([x])(fxwidth.trace(net, x)).graph_module
        >>> torch.allclose(net[1].running_mean, net[0](x).mean(0), atol=1e-6)
        True
    """

    needs = (SHAPES, ALONE)

    def __init__(self, data: Iterable[Any]) -> None:
        super().__init__()
        refuse_other_than_batches(data)
        self._data = replayed(data)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Take the statistics anew, in place.

        Args:
            graph_module: the graph; its parameters and its mode stay as they are.

        Raises:
            FxwidthError: the data do not fit, or are none, or what batch norms see of them is not finite; nothing has
                changed.
        """
        if self._data is None:
            raise FxwidthError("RecalibrateBatchNorm needs data; pass an iterable of batches, such as a DataLoader.")
        found = averaged_statistics(analyze_module(graph_module), self._data)
        transaction, slots = resize_transaction(graph_module), tensor_slots(graph_module)

        def work() -> None:
            for name, values in found.items():
                transaction.overwrite(slots[name][0], values)

        transaction.run(work)
        return PassResult(graph_module, bool(found))
