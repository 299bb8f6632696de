"""The batches that an Evolver looks at: those it was given, or some of those that the network is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from fxwidth.analysis.result import Analysis
from fxwidth.errors import FxwidthError, warn
from fxwidth.option_keywords import Loss
from fxwidth.runtime.process_groups import of_all_ranks
from fxwidth.runtime.pytrees import deep_tensors, map_leaves
from fxwidth.statistics.calibration_data import UnfitBatchError, refusal_of
from fxwidth.statistics.gathered_batches import Gathered


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
        values: Any = tuple(batch)
        if self.loss is None:
            count = len(module.graph.find_nodes(op="placeholder"))
            values = tuple(value for value in batch if deep_tensors(value))[:count]
        elif len(values) == 1 and isinstance(values[0], (Mapping, tuple)):
            values = values[0]  # a batch as data= has it
        if values:
            self.gathered.add(map_leaves(Tensor.detach, values))

    def to_look_at(self, analysis: Analysis) -> Any:
        """Return the batches to look at, or None where there are none yet.

        Batches of training whose sizes are not those of the example are left out, with a warning.

        Args:
            analysis: that of the graph.

        Raises:
            FxwidthError: there are none, and a loss is taken on them; or one is of another kind than the graph takes.
        """
        if self.given is not None:
            return self.given
        refusals = [refusal_of(analysis, batch, number) for number, batch in enumerate(self.gathered.batches)]
        reason = next((one for one in refusals if one is not None), None)
        if reason is not None:
            self.gathered.batches = [
                batch for batch, one in zip(self.gathered.batches, refusals, strict=True) if one is None
            ]
        # Some ranks may have none.
        has_some = any(of_all_ranks("whether there are batches", [bool(self.gathered.batches)]))
        if reason is not None:
            self._tell(reason, len(refusals), has_some)
        if not has_some and self.loss is not None:
            raise FxwidthError(
                "loss= is taken on batches of training, and none has been given to step() yet; call it with the "
                "inputs and the targets, step(x, y), or pass data=."
            )
        return self.gathered if has_some else None

    def _tell(self, reason: UnfitBatchError, count: int, has_some: bool) -> None:
        left_out = count - len(self.gathered.batches)
        told = f"{left_out} of the {count} batches given to step() that were kept are not looked at: {reason}"
        if not has_some and self.loss is not None:
            raise FxwidthError(f"loss= is taken on batches of training, and there are none: {told}")
        noise = "" if has_some else " Random inputs are looked at now."
        warn(f"{told}{noise} Where sizes vary, pass data= of the sizes of the example.")
