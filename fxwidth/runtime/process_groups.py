"""Several processes at the same work: what they exchange, and how the failure of one becomes that of all."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from fxwidth.errors import FxwidthError
from fxwidth.runtime.held_interrupts import uninterrupted
from fxwidth.runtime.pytrees import map_leaves

_Result = TypeVar("_Result")
_Value = TypeVar("_Value")
_RESTART = "Nothing has changed in this process. Start all of them again from the last checkpoint."


class _OtherRankError(FxwidthError):
    """Another rank failed, or was somewhere else; all know of it."""


@dataclass
class Ranks:
    """The processes of a group, in one piece of work that all of them do or none does.

    All come to the same points in the same order. At each they exchange something, and whether one has failed: it
    tells so at the point to which the others come next, and they fail there.

    Args:
        group: the process group.
        is_data_parallel: whether each rank has data of its own; else all have the same, and those of rank 0 count.
    """

    group: distributed.ProcessGroup
    is_data_parallel: bool = True
    _is_over: bool = field(default=False, init=False)

    @property
    def size(self) -> int:
        """How many there are."""
        return distributed.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """The number of this process in the group."""
        return distributed.get_rank(self.group)

    def run(self, work: Callable[[], _Result]) -> _Result:
        """Return what the work returns, which is to end by `end`; if it fails on one rank, it fails on all.

        Raises:
            FxwidthError: it has failed on another rank, or a rank could not be reached.
        """
        token = _AT_WORK.set(self)
        try:
            return work()
        except BaseException as error:
            self._tell(error)
            raise
        finally:
            _AT_WORK.reset(token)

    def gather(self, point: str, value: _Value) -> list[_Value]:
        """Return what all ranks give at a point, in their order.

        Args:
            point: what they have come to, for reports.
            value: anything that can be pickled, without tensors of an accelerator.

        Raises:
            FxwidthError: one has failed, or is somewhere else, or could not be reached.
        """
        told = self._exchanged(point, (point, None, value))
        failures = [(rank, failure) for rank, (_, failure, _) in enumerate(told) if failure is not None]
        points = list(dict.fromkeys(own for own, _, _ in told))
        if failures:
            self._is_over = True
            rank, failure = failures[0]
            raise _OtherRankError(f"rank {rank} has failed: {failure} So no rank goes on; nothing has changed on any.")
        if len(points) > 1:
            self._is_over = True
            raise _OtherRankError(
                f"the ranks are at different points of the work: {', '.join(points)}. Call it on all with the same "
                "model, options and plan, at the same step; nothing has changed on any."
            )
        return [own for _, _, own in told]

    def first(self, point: str, value: _Value) -> _Value:
        """Return what rank 0 gives at a point.

        Raises:
            FxwidthError: as for `gather`.
        """
        return self.gather(point, value if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def sums(self, point: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums of tensors over the ranks, equal to the bit on all of them.

        Args:
            point: as for `gather`.
            tensors: of one dtype and device, and of the same shapes on all ranks; they stay as they are.

        Raises:
            FxwidthError: as for `gather`.
        """
        if not tensors:
            return []
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        sizes = self.gather(point, len(flat))
        if len(set(sizes)) > 1:
            raise FxwidthError(f"the ranks have {sizes} numbers at {point}; they do not do the same.")

        def reduced() -> None:
            distributed.all_reduce(flat, group=self.group)
            # Some ways of reducing leave sums that differ in their last bits.
            distributed.broadcast(flat, distributed.get_global_rank(self.group, 0), group=self.group)

        self._reached(point, reduced)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def broadcast(self, point: str, tensors: Sequence[Tensor]) -> None:
        """Give tensors, in place, the values that they have on rank 0.

        Args:
            point: as for `gather`.
            tensors: of the same shapes and dtypes on all ranks.

        Raises:
            FxwidthError: as for `gather`.
        """
        self.gather(point, None)
        source = distributed.get_global_rank(self.group, 0)

        def sent() -> None:
            for tensor in tensors:
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    # What is not in one piece in memory is sent as a copy.
                    whole = tensor.detach().contiguous()
                    distributed.broadcast(whole, source, group=self.group)
                    if whole.data_ptr() != tensor.data_ptr():
                        tensor.copy_(whole)

        self._reached(point, sent)

    def end(self) -> None:
        """Wait until all have done their work; what comes after this must not fail.

        Raises:
            FxwidthError: as for `gather`.
        """
        self.gather("the end", None)
        self._is_over = True

    def _exchanged(self, point: str, value: Any) -> list[Any]:
        result: list[Any] = [None] * self.size
        self._reached(point, lambda: distributed.all_gather_object(result, value, group=self.group))
        return result

    def _reached(self, point: str, exchange: Callable[[], object]) -> None:
        try:
            # Between two parts of an exchange nothing can be told to the others.
            with uninterrupted():
                exchange()
        except Exception as error:
            self._is_over = True
            raise _OtherRankError(
                f"the {self.size} ranks could not exchange what they have at {point}: {error} {_RESTART}"
            ) from error

    def _tell(self, error: BaseException) -> None:
        if self._is_over:
            return
        self._is_over = True
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        # That a rank cannot be told does not matter more than the error itself.
        with suppress(Exception):
            self._exchanged("a failure", ("", text.rstrip(".") + ".", None))


# Those of the work under way.
_AT_WORK: ContextVar[Ranks | None] = ContextVar("ranks_at_work", default=None)


def ranks_at_work() -> Ranks | None:
    """Return the ranks that do together what is under way; None where this process is by itself."""
    return _AT_WORK.get()


def is_distributed() -> bool:
    """Tell whether this process belongs to a group of several."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def rank_share(limit: int) -> int:
    """Return the share of this rank in a number of samples that all look at together."""
    ranks = ranks_at_work()
    return -(-limit // ranks.size) if ranks is not None and ranks.is_data_parallel else limit


def of_all_ranks(point: str, values: Iterable[_Value]) -> Iterable[_Value]:
    """Return the values of all ranks one after the other, or of this process where it is by itself.

    Args:
        point: what they are, for reports.
        values: anything that can be pickled, with tensors in it.

    Raises:
        FxwidthError: a rank has failed, or could not be reached.
    """
    ranks = ranks_at_work()
    if ranks is None:
        return values
    packed = map_leaves(_packed, list(values))
    found = ranks.gather(point, packed) if ranks.is_data_parallel else [ranks.first(point, packed)]
    return [map_leaves(_Packed.unpacked, value, _Packed) for own in found for value in own]


@dataclass(frozen=True)
class _Packed:
    """A tensor on its way to ranks that have other devices of the same kind."""

    tensor: Tensor
    kind: str

    def unpacked(self) -> Tensor:
        """Return it on this rank's device."""
        return self.tensor.to(self.kind)


def _packed(tensor: Tensor) -> _Packed:
    return _Packed(tensor.detach().cpu(), tensor.device.type)


def sharded_kind() -> type[Tensor] | None:
    """Return the class of tensors that are spread over ranks, if anyone has imported it: else there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    found: type[Tensor] | None = getattr(module, "DTensor", None)
    return found
