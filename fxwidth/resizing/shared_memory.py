"""Parameters and buffers that are several objects on one memory: a resize would part them, and training with them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from fxwidth.analysis.result import Analysis
from fxwidth.errors import FxwidthError

# Where a pointer to data is an address in a memory that all tensors of the device are in.
_ADDRESSED = ("cpu", "cuda")


@dataclass(frozen=True)
class _Extent:
    """The bytes from the first to the last entry of a tensor.

    Attributes:
        name: that of the parameter or buffer.
        memory: what its addresses are counted in.
        start: the first byte.
        end: the byte behind the last one.
        itemsize: bytes of an entry.
        dims: size and stride, in bytes, of each dim along which entries differ in their address.
    """

    name: str
    memory: tuple[str, int]
    start: int
    end: int
    itemsize: int
    dims: tuple[tuple[int, int], ...]

    @property
    def is_full(self) -> bool:
        """Whether no byte in between belongs to no entry."""
        reached = self.itemsize
        for size, stride in sorted(self.dims, key=lambda dim: dim[1]):
            if stride > reached:
                return False
            reached += (size - 1) * stride
        return True


def refuse_shared_memory(analysis: Analysis, changed: Collection[str]) -> None:
    """Check that no tensor that a resize replaces or writes has its entries in common with another one.

    Raises:
        FxwidthError: one has; parts of one memory with no entry in common may be resized.
    """
    extents = [
        _extent(name, entry.tensor)
        for name, entry in analysis.parameters.items()
        if entry.tensor.layout is torch.strided and not entry.tensor.is_meta and entry.tensor.numel()
    ]
    for meeting in _meeting(extents):
        pair = _sharing(meeting, changed)
        if pair is not None:
            name, other = pair
            raise FxwidthError(
                f"{name} and {other} are two tensors in one memory, and a resize would give {name} a memory of "
                f"its own. Make them one object before the model is traced, as in a.weight = b.weight, or keep "
                "their groups with keep=."
            )


def _extent(name: str, tensor: Tensor) -> _Extent:
    size = tensor.element_size()
    memory, address = _address(tensor)
    start = address + int(tensor.storage_offset()) * size
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    dims = tuple((int(count), int(stride) * size) for count, stride in strides if count > 1 and stride)
    end = start + size + sum((count - 1) * stride for count, stride in dims)
    return _Extent(name, (str(tensor.device), memory), start, end, size, dims)


def _address(tensor: Tensor) -> tuple[int, int]:
    """Return in which memory of its device the storage of a tensor is, and from which byte on."""
    storage = tensor.untyped_storage()
    if tensor.device.type in _ADDRESSED:
        # Several storages may be on one memory, as those of torch.from_numpy.
        with suppress(RuntimeError):  # a tensor that wraps others has none
            return 0, storage.data_ptr()
    return storage._cdata, 0


def _meeting(extents: Iterable[_Extent]) -> Iterator[list[_Extent]]:
    """Yield those that lie across each other, directly or by way of others."""
    group: list[_Extent] = []
    end = 0
    for extent in sorted(extents, key=lambda one: (one.memory, one.start)):
        if group and (extent.memory != group[0].memory or extent.start >= end):
            if len(group) > 1:
                yield group
            group = []
        end = max(end, extent.end) if group else extent.end
        group.append(extent)
    if len(group) > 1:
        yield group


def _sharing(extents: Sequence[_Extent], changed: Collection[str]) -> tuple[str, str] | None:
    """Return a tensor that is to change and another one with entries in common, if there are such."""
    changing = [one for one in extents if one.name in changed]
    if changing and all(one.is_full for one in extents):
        one = changing[0]
        return next((one.name, other.name) for other in extents if other is not one and _cross(one, other))
    if not changing:
        return None
    # Parts that are interleaved, as the columns of a matrix, may have nothing in common: only a map of the memory
    # with the owner of each place tells. Who does not change comes first, since they may share with each other.
    ordered = [one for one in extents if one.name not in changed] + changing
    first, unit = min(one.start for one in extents), gcd(*(n for one in extents for n in (one.start, one.itemsize)))
    owners = torch.zeros((max(one.end for one in extents) - first) // unit, dtype=torch.int32, device="cpu")
    for number, one in enumerate(ordered, start=1):
        dims = [*one.dims, (one.itemsize // unit, unit)]
        sizes, strides = [size for size, _ in dims], [stride // unit for _, stride in dims]
        places = owners.as_strided(sizes, strides, (one.start - first) // unit)
        if one.name in changed and bool(places.any()):
            return one.name, ordered[int(places.max()) - 1].name
        places.fill_(number)
    return None


def _cross(one: _Extent, other: _Extent) -> bool:
    return one.start < other.end and other.start < one.end
