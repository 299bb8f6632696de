"""Values for integers and masks among the inputs: such as the network takes, as various as these may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fxwidth.analysis.result import Analysis
from fxwidth.recording.graph_meta import EXAMPLES, notes_of
from fxwidth.runtime.pytrees import flatten
from fxwidth.statistics.integer_uses import IntegerUses, uses_of

# From so many samples on, a position at which all are alike is taken to be so always.
_SAMPLES = 8
# Neither of two truth values is rarer.
_LEAST_SHARE = 0.1
_BYTES = (0, 255)
_NOT_NEGATIVE = torch.tensor(0, device="cpu"), torch.tensor(torch.iinfo(torch.long).max, device="cpu")
# From this size on the last two dims of an input with four or more are taken for those of an image.
_SMALLEST_IMAGE = 4


class Source(Protocol):
    """Where the values of an integer input are taken from."""

    def drawn(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return values of a shape, on the device of the generator."""


@dataclass(frozen=True)
class Between:
    """All whole numbers from the least to the largest, each of them as likely as the others.

    Attributes:
        low: the least, for all places or for each.
        high: the largest, likewise.
        is_image: whether they are the brightness of the places of an image.
    """

    low: Tensor
    high: Tensor
    is_image: bool = False

    def drawn(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return values of a shape."""
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
        return self.at(uniform)

    def at(self, quantiles: Tensor) -> Tensor:
        """Return the values at some quantiles."""
        low, high = self.low.to(quantiles), self.high.to(quantiles)
        return torch.minimum(low + (quantiles * (high - low + 1)).floor(), high).long()


@dataclass(frozen=True)
class Mask:
    """Truth values, of which a share is true, and in each row of several at least one and not all."""

    share: float = 0.5

    def drawn(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return values of a shape."""
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
        mask = uniform < self.share
        dim = _row_dim(shape)
        if dim is not None:
            mask.scatter_(dim, uniform.argmin(dim, keepdim=True), True)
            mask.scatter_(dim, uniform.argmax(dim, keepdim=True), False)
        return mask


@dataclass(frozen=True)
class Padding:
    """Truth values that change once in each row at most, as those that tell sequences of all lengths from padding.

    Attributes:
        kept: the value of the sequence, which is never empty.
        from_start: whether the sequence begins the row, or ends it.
    """

    kept: bool
    from_start: bool

    def drawn(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return values of a shape."""
        dim = _row_dim(shape)
        if dim is None:
            return torch.full(shape, self.kept, device=generator.device)
        size = shape[dim]
        rows = (*shape[:dim], 1, *shape[dim + 1 :])
        lengths = torch.randint(1, size + 1, rows, generator=generator, device=generator.device)
        places = torch.arange(size, device=generator.device)
        places = (places if self.from_start else places.flip(0)).view(size, *[1] * (len(shape) - dim - 1))
        return (places < lengths) == self.kept


@dataclass(frozen=True)
class Offsets:
    """Where each of some bags begins among entries, none empty where there are enough; and where they end if asked."""

    entries: int
    tells_end: bool

    def drawn(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return values of a shape, [bags] or, with the end, [bags + 1]."""
        bags = shape[0] - self.tells_end
        starts = torch.zeros(shape[0], dtype=torch.long, device=generator.device)
        if self.entries >= bags:
            found = torch.randperm(self.entries - 1, generator=generator, device=generator.device)[: bags - 1] + 1
        else:
            found = torch.randint(self.entries + 1, (bags - 1,), generator=generator, device=generator.device)
        starts[1:bags] = found.sort().values
        if self.tells_end:
            starts[-1] = self.entries
        return starts


@dataclass(frozen=True)
class Mixed:
    """Values of an example, of which each position takes one that it has had there."""

    values: Tensor

    def drawn(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return values of a shape."""
        places = torch.randint(len(self.values), shape, generator=generator, device=generator.device)
        return self.values.to(places.device).gather(0, places)


@dataclass(frozen=True)
class Rows:
    """The samples of an example, one after the other, and those of other inputs along with them."""

    values: Tensor

    def drawn(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return values of a shape."""
        values = self.values.to(generator.device)
        if values.shape == shape or not shape:
            return values
        return values[torch.arange(shape[0], device=values.device) % len(values)]


@dataclass(frozen=True)
class Ones:
    """Ones, of which nobody can say more than that they are within the range of most uses."""

    def drawn(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return values of a shape."""
        return torch.ones(shape, dtype=torch.long, device=generator.device)


def integer_sources(analysis: Analysis, *, cautious: bool = False) -> list[Source | None]:
    """Return where the values of each tensor among the inputs come from, None for those that are no integers.

    Values are those that what is looked up by them, or compared with them, allows; else they are like those of the
    example that the graph was analysed with.

    Args:
        analysis: the graph.
        cautious: whether values are those of the example wherever they are known.
    """
    leaves = flatten(tuple(analysis.inputs), (Tensor,))[0]
    examples = notes_of(analysis.module).get(EXAMPLES, ())
    known = examples if len(examples) == len(leaves) else [None] * len(leaves)
    return [
        _source(analysis, leaf, _fitting(analysis, leaf, one), cautious)
        for leaf, one in zip(leaves, known, strict=True)
    ]


def has_batch(analysis: Analysis, example: Tensor) -> bool:
    """Tell whether the first dim of an input is the batch."""
    return example.dim() > 0 and any(factor.is_batch for factor in analysis.space.factors(analysis.axes_of(example)[0]))


def is_image(example: Tensor) -> bool:
    """Tell whether the last two dims of an input are taken for those of an image."""
    return example.dim() >= 4 and min(example.shape[-2:]) >= _SMALLEST_IMAGE


def _fitting(analysis: Analysis, leaf: Tensor, known: Tensor | None) -> Tensor | None:
    """Return the values of an example if they are of the kind of an input."""
    if known is None or known.dtype != leaf.dtype or known.dim() != leaf.dim() or not known.numel():
        return None
    fits = known.shape[1:] == leaf.shape[1:] if has_batch(analysis, leaf) else known.shape == leaf.shape
    return known if fits else None


def _source(analysis: Analysis, leaf: Tensor, known: Tensor | None, cautious: bool) -> Source | None:
    if leaf.is_floating_point() or leaf.is_complex():
        return None
    uses = uses_of(analysis, leaf)
    is_sure = not (uses.of_changed or uses.unknown)
    inside = _range(uses, known) if is_sure else None
    if uses.bags is not None:
        return Offsets(*uses.bags)
    if cautious:
        return Rows(known) if known is not None else inside or _harmless(leaf)
    if inside is not None:
        return inside
    if known is None:
        return _unseen(leaf, uses) if is_sure else Ones()
    if not has_batch(analysis, leaf):
        return Rows(known)
    return _like(leaf, known, uses) if is_sure else Mixed(known)


def _range(uses: IntegerUses, known: Tensor | None) -> Between | None:
    """Return the values that every look-up and comparison allows, where there are any.

    What sums allow is more than what there is: a column whose rows are behind those of another has none of these.
    """
    bounds = [(torch.tensor(low, device="cpu"), torch.tensor(high, device="cpu")) for low, high in uses.bounds]
    if uses.shifted:
        bounds += [*uses.shifted, _guessed(known) if known is not None else _NOT_NEGATIVE]
    if not bounds:
        return None
    low, high = bounds[0]
    for other_low, other_high in bounds[1:]:
        low, high = torch.maximum(low, other_low), torch.minimum(high, other_high)
    return Between(low, high) if bool((low <= high).all()) else None


def _guessed(known: Tensor) -> tuple[Tensor, Tensor]:
    """Return the range of each position from that of a few samples, by how far the largest of them is from the end.

    Source: L. A. Goodman, Serial Number Analysis (1952), with both ends unknown.
    """
    low, high = known.amin(0).long(), known.amax(0).long()
    beyond = -((low - high) // max(1, len(known) - 1))
    return torch.where(low >= 0, (low - beyond).clamp_min(0), low - beyond), high + beyond


def _between(low: int, high: int, *, is_image: bool = False) -> Between:
    return Between(torch.tensor(low, device="cpu"), torch.tensor(high, device="cpu"), is_image)


def _unseen(leaf: Tensor, uses: IntegerUses) -> Source:
    """Return values by the type of an input alone."""
    if leaf.dtype == torch.bool or (uses.compared and not uses.numeric):
        return Mask()
    return _between(*_BYTES, is_image=is_image(leaf)) if leaf.dtype == torch.uint8 else Ones()


def _harmless(leaf: Tensor) -> Source:
    """Return values that work in most networks: as torch has it, padding is where a mask is true."""
    return Padding(kept=False, from_start=True) if leaf.dtype == torch.bool else Ones()


def _like(leaf: Tensor, known: Tensor, uses: IntegerUses) -> Source:
    """Return values like those of an example, of several kinds if it has but one."""
    low, high = int(known.min()), int(known.max())
    if leaf.dtype == torch.bool or (low >= 0 and high <= 1 and (low < high or not uses.numeric)):
        return _mask(known.bool())
    if leaf.dtype == torch.uint8 and is_image(leaf):
        return _between(*(_BYTES if low == high else (low, high)), is_image=True)
    if low == high:
        return Rows(known)
    if is_image(leaf):
        return _between(low, high, is_image=True)
    return _columns(known)


def _columns(known: Tensor) -> Between:
    """Return values of which each position has a range of its own: columns of a table are of several kinds."""
    low, high = known.amin(0), known.amax(0)
    if len(known) < _SAMPLES:
        # One value in a few samples is no range: from it to none.
        low, high = torch.where(low == high, low.clamp_max(0), low), torch.where(low == high, high.clamp_min(0), high)
    return Between(low, high)


def _mask(known: Tensor) -> Source:
    """Return truth values of the kind of an example: of padding, where no row of it says otherwise, or any."""
    dim = _row_dim(known.shape)
    if dim is None:
        return Mask() if bool(known.all()) or not bool(known.any()) else _with_share_of(known)
    rows = known.movedim(dim, -1).flatten(0, -2)
    changes = (rows[:, 1:] != rows[:, :-1]).sum(1)
    if int(changes.max()) <= 1:
        for place, from_start in ((0, True), (-1, False)):
            if bool((rows[:, place] == rows[0, place]).all()):
                return Padding(bool(rows[0, place]), from_start)
    return _with_share_of(known)


def _with_share_of(known: Tensor) -> Mask:
    share = float(known.double().mean())
    return Mask(min(max(share, _LEAST_SHARE), 1 - _LEAST_SHARE))


def _row_dim(shape: tuple[int, ...]) -> int | None:
    """Return the last dim behind the first that has several entries, None where there is none."""
    return next((dim for dim in range(len(shape) - 1, 0, -1) if shape[dim] > 1), None)
