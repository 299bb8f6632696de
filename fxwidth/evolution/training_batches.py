"""The batches that an Evolver looks at: those it was given, or some of those that the network is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from fxwidth.errors import FxwidthError
from fxwidth.option_keywords import Loss
from fxwidth.runtime.process_groups import of_all_ranks
from fxwidth.runtime.pytrees import deep_tensors, map_leaves
from fxwidth.statistics.calibration_data import Gathered


@dataclass(frozen=True)
class TrainingBatches:
    """Those that an Evolver looks at.

    Attributes:
        gathered: some batches of training.
        given: `data=`; None where batches of training are looked at.
        loss: what is computed from a batch with its targets, if anything is.
    """

    gathered: Gathered
    given: Any
    loss: Loss | None

    def remember(self, module: fx.GraphModule, batch: Sequence[Any]) -> None:
        """Look at a batch of training: at the inputs, and where there is a loss, at what follows them."""
        if self.given is not None:
            return
        values = tuple(batch)
        if self.loss is None:
            count = len(module.graph.find_nodes(op="placeholder"))
            values = tuple(value for value in batch if deep_tensors(value))[:count]
        if values:
            self.gathered.add(tuple(map_leaves(Tensor.detach, value) for value in values))

    def to_look_at(self) -> Any:
        """Return the batches to look at, or None where there are none yet.

        Raises:
            FxwidthError: there are none, and a loss is taken on them.
        """
        if self.given is not None:
            return self.given
        # Some ranks may have none.
        if any(of_all_ranks("whether there are batches", [bool(self.gathered.batches)])):
            return self.gathered
        if self.loss is not None:
            raise FxwidthError(
                "loss= is taken on batches of training, and none has been given to step() yet; call it with the "
                "inputs and the targets, step(x, y), or pass data=."
            )
        return None
