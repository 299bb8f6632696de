"""What a resize does by the data and the loss: the rows of new channels, and the step of what reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxwidth.axes.index_maps import IndexMaps
from fxwidth.gradients.gradient_run import Batch
from fxwidth.gradients.informed_rows import InformedRows, informed_rows, labelled_batches
from fxwidth.gradients.reader_step import held_out, silent_columns, stepped_readers
from fxwidth.growth.directions import needs_of
from fxwidth.option_keywords import Loss
from fxwidth.options import ResizeOptions
from fxwidth.resizing.channel_selection import ChannelSelection
from fxwidth.resizing.requested import Known
from fxwidth.rewriting.transaction import Transaction
from fxwidth.runtime.tensor_slots import tensor_slots
from fxwidth.statistics.moments import has_values


@dataclass(frozen=True)
class InformedGrowth:
    """The growth of a resize, as far as it goes by the data and the loss.

    Attributes:
        rows: those of new channels.
        selection: the channels of the groups that change.
        loss: that of the resize, where readers are to take a step.
        seen: the batches for its direction.
        kept: the batches for its length.
    """

    rows: InformedRows = field(default_factory=InformedRows)
    selection: ChannelSelection | None = None
    loss: Loss | None = None
    seen: Sequence[Batch] = ()
    kept: Sequence[Batch] = ()

    @classmethod
    def of(
        cls, selection: ChannelSelection, data: Iterable[Any] | None, options: ResizeOptions, known: Known
    ) -> InformedGrowth:
        """Gather from data what growth goes by; nothing changes.

        Raises:
            FxwidthError: the data, the loss or the method cannot be used.
        """
        width_graph, growing = selection.evidence.width_graph, selection.growing
        if not growing or not options.looks_at_task or known.blind or not has_values(width_graph.analysis):
            return cls()
        assert data is not None
        assert options.loss is not None
        seen, kept = labelled_batches(width_graph, data), list[Batch]()
        if options.reader_step:
            seen, kept = held_out(seen)
        rows = InformedRows()
        if needs_of(options.directions):
            maps: IndexMaps = selection.maps()
            rows = informed_rows(width_graph, maps, growing, seen, options.loss, options.directions)
        return cls(rows, selection, options.loss, seen, kept)

    def step(self, module: fx.GraphModule, record: dict[str, Any], transaction: Transaction) -> None:
        """Have the readers of new channels take their step in the module, which has been resized, and record it.

        Raises:
            FxwidthError: the module does not run on a batch, or the loss does not return one finite number.
        """
        if self.selection is None or self.loss is None or not self.kept:
            return
        width_graph = self.selection.evidence.width_graph
        columns = silent_columns(width_graph, self.selection.maps(), self.selection.growing)
        tensors, told = stepped_readers(module, columns, self.seen, self.kept, self.loss)
        slots = tensor_slots(module)
        for name, tensor in tensors.items():
            transaction.overwrite(slots[name][0], tensor)
        record["reader_step"] = told
