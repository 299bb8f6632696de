"""A fresh graph made what a file tells of: its resizes again, and then the values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxwidth.checkpoint.file_record import FileRecord, is_finite, present_versions
from fxwidth.checkpoint.resize_replay import ResizeReplay, unfit
from fxwidth.errors import FxwidthError, warn
from fxwidth.rewriting.optimizers import Optimizers
from fxwidth.rewriting.originals import original_of
from fxwidth.rewriting.successors import with_values
from fxwidth.rewriting.transaction import Transaction
from fxwidth.runtime.tensor_slots import named_tensors, set_slot, tensor_slots
from fxwidth.serialization.graph_record import DifferentGraphError, adopt
from fxwidth.serialization.tensor_files import TensorFile


@dataclass(frozen=True)
class Replay:
    """What is loaded into what, and how.

    Attributes:
        file: the open file.
        record: what it tells.
        module: the graph; changed in place, the caller takes that back on failure.
        transaction: that of which all this is a part.
        optimizer: what trains the graph, and goes along.
        trusted: whether whole numbers of the file are believed, and any sizes.
        is_fresh: whether the model is nobody's yet, and takes the dtypes and layouts of the file.
        converts: whether values of other dtypes are converted to those of the model.
    """

    file: TensorFile
    record: FileRecord
    module: fx.GraphModule
    transaction: Transaction
    optimizer: Optimizers | None
    trusted: bool
    is_fresh: bool
    converts: bool

    def run(self) -> None:
        """Make the graph what the file tells of.

        Raises:
            FxwidthError: the file is of another model.
        """
        count = sum(entry.end - entry.begin for entry in self.file.entries.values())
        resizes = ResizeReplay(
            self.file.path, self.record, self.module, self.transaction, self.optimizer, None if self.trusted else count
        )
        resizes.run()
        self._check_tensors()
        self._adopt()
        self._fill()
        resizes.note_history()

    def _check_tensors(self) -> None:
        """Check the header of the file against the graph: names, shapes and dtypes."""
        file, tensors = self.file, named_tensors(self.module)
        names = self._names
        filled = {id(tensor) for name, tensor in tensors.items() if name in names}
        lacking = {name for name, tensor in self._needed().items() if id(tensor) not in filled}
        if odd := sorted(lacking | (names - tensors.keys()))[:3]:
            raise self._unfit(f"{', '.join(odd)} occur in only one of them")
        for name in sorted(names):
            own, dtype = tensors[name], file.dtype(name)
            if file.shape(name) != tuple(own.shape):
                raise self._unfit(f"{name} has shape {file.shape(name)} in the file and {tuple(own.shape)} here")
            if dtype != own.dtype and not self.is_fresh:
                self._check_conversion(name, dtype, own.dtype)

    def _check_conversion(self, name: str, saved: torch.dtype, own: torch.dtype) -> None:
        # Whole numbers are indices and counts, and become no others by a change of precision.
        if not saved.is_floating_point or not own.is_floating_point or saved.is_complex != own.is_complex:
            raise self._unfit(f"{name} is of {saved} in the file and of {own} here")
        if not self.converts:
            raise self._unfit(
                f"{name} is of {saved} in the file and of {own} here; convert the model first, model.to({saved}), pass "
                "a function that makes one, or convert=True for values rounded to the model's dtype"
            )

    @property
    def _names(self) -> set[str]:
        """The names of the graph's tensors in the file."""
        return {name for name in self.file.entries if not name.startswith("fxwidth.")}

    def _needed(self) -> dict[str, Tensor]:
        """Return the tensors that a file must have; those of earlier versions have only what the graph uses."""
        tensors = named_tensors(self.module)
        if self.record.graph is not None:
            return tensors
        graph = self.module.graph
        attributes = {str(node.target) for node in graph.find_nodes(op="get_attr")}
        called = [f"{node.target}." for node in graph.find_nodes(op="call_module")]
        return {
            name: tensor
            for name, tensor in tensors.items()
            if name in attributes or any(name.startswith(prefix) for prefix in called)
        }

    def _adopt(self) -> None:
        if self.record.graph is None:
            return
        try:
            adopt(self.module, self.record.graph, trusted=self.trusted)
        except DifferentGraphError as error:
            if self.record.versions == present_versions():
                raise self._unfit(
                    f"{error}. Make the model as it was when it was traced: the same code, settings and mode, and "
                    "example_inputs of the same form, with more than one sample if it had more"
                ) from error
            written = ", ".join(f"{name} {version}" for name, version in self.record.versions.items())
            warn(
                f"{self.file.path} was written by {written}, whose graph differs: {error}. It has the widths and "
                "values of the file, but may round otherwise; compare an output, or load it with those versions."
            )

    def _fill(self) -> None:
        names, tensors = self._names, named_tensors(self.module)
        slots = {id(tensor): places for tensor, places in tensor_slots(self.module).values()}
        original = original_of(self.module)
        in_original = {id(tensor): places for tensor, places in tensor_slots(original).values()} if original else {}
        for name in (name for name in tensors if name in names):
            saved, own = self.file.tensor(name), tensors[name]
            if not is_finite(saved) and self._is_unsound(name, saved, own):
                raise FxwidthError(
                    f"{self.file.path} holds NaN or infinite values in {name}, of which its record does not tell; use "
                    "another copy of the file."
                )
            if not self._is_replaced(name, saved, own):
                self.transaction.overwrite(own, saved)
                continue
            new = self._made(name, saved, own)
            for holder, attribute in (*slots[id(own)], *in_original.get(id(own), ())):
                set_slot(holder, attribute, new)

    def _is_unsound(self, name: str, saved: Tensor, own: Tensor) -> bool:
        if self.record.graph is not None:
            return name not in self.record.unsound
        # Files of earlier versions do not tell; masks and bounds among buffers may be infinite.
        return isinstance(own, torch.nn.Parameter) or bool(saved.isnan().any())

    def _is_replaced(self, name: str, saved: Tensor, own: Tensor) -> bool:
        """Tell whether another tensor takes the place of one, which else gets its values."""
        # What is expanded has one place for several values.
        is_expanded = any(size > 1 and step == 0 for size, step in zip(own.shape, own.stride(), strict=True))
        return own.is_meta or is_expanded or (self.is_fresh and self._differs(name, saved, own))

    def _differs(self, name: str, saved: Tensor, own: Tensor) -> bool:
        return saved.dtype != own.dtype or (name in self.record.layouts) == own.is_contiguous()

    def _made(self, name: str, saved: Tensor, own: Tensor) -> Tensor:
        """Return what takes the place of a tensor, with the dtype of the file and as it lay in memory."""
        device = torch.device("cpu") if own.is_meta else own.device
        values = saved.to(device)
        new = with_values(name, own, values)
        order = self.record.layouts.get(name, range(values.dim()))
        new.data = torch.empty_permuted(values.shape, list(order), dtype=values.dtype, device=device).copy_(values)
        return new

    def _unfit(self, why: str) -> FxwidthError:
        return unfit(self.file.path, why)


def state_tensor(file: TensorFile, name: Any) -> Tensor:
    """Return a tensor of the state of an optimizer or an Evolver."""
    return file.tensor(str(name))
