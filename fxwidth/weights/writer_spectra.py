"""The singular spectrum of a group: how much of what its writers can say each direction holds."""

from __future__ import annotations

import torch
from torch import Tensor

from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.runtime.finiteness import accumulation_dtype
from fxwidth.weights.writers import writer_matrices

# Up to here the stacked matrix itself is decomposed; above, its Gram matrix, at half the digits.
_STACKED_ENTRIES = 2**17


def singular_values(width_graph: WidthGraph, group: ChannelGroup) -> Tensor:
    """Return the singular values of a group's writers side by side, one per channel, largest first, [width].

    Each writer is unfolded to [width, everything else], scaled by the batch norm that directly follows it, and stands
    beside the others: the identity path of a residual block is among the writers of its stream. A group that nothing
    but per-channel tensors writes, and one of a model without values (meta device), has a flat spectrum.

    Source: J. Dejaegher, SVD evolutive CNN (2021), which decomposes each layer's own kernel.
    """
    writers = list(writer_matrices(width_graph, group))
    if not writers or writers[0].device.type == "meta":
        return torch.ones(group.width, dtype=torch.float64, device="cpu")
    columns = sum(writer.shape[1] for writer in writers)
    if group.width * columns <= _STACKED_ENTRIES:
        values = torch.linalg.svdvals(torch.cat([writer.to(accumulation_dtype(writer)) for writer in writers], 1))
        return torch.cat([values, values.new_zeros(group.width - len(values))])
    gram = writer_gram(width_graph, group)
    assert gram is not None
    squares: Tensor = torch.linalg.eigvalsh(gram).flip(0)
    return squares.clamp_min(0).sqrt()


def writer_columns(width_graph: WidthGraph, group: ChannelGroup) -> int:
    """Return how many columns the stacked writers of a group have; 0 where nothing but per-channel tensors writes."""
    return sum(writer.shape[1] for writer in writer_matrices(width_graph, group))


def writer_gram(width_graph: WidthGraph, group: ChannelGroup) -> Tensor | None:
    """Return the stacked writers times their transpose, [width, width]; None where there are no values."""
    gram: Tensor | None = None
    for writer in writer_matrices(width_graph, group):
        if writer.device.type == "meta":
            return None
        wide = writer.to(accumulation_dtype(writer))
        gram = wide @ wide.T if gram is None else torch.addmm(gram, wide, wide.T)
    return gram


def tail_share(values: Tensor) -> Tensor:
    """Return for every k from 0 to n the share of the sum of n values, largest first, that those after the k-th hold.

    Returns:
        [n + 1], from 1 down to 0.
    """
    from_end = torch.cat([values.new_zeros(1), values.flip(0).cumsum(0)]).flip(0)
    return from_end / from_end[0] if float(from_end[0]) > 0 else torch.zeros_like(from_end)


def writer_norms(width_graph: WidthGraph, group: ChannelGroup) -> Tensor | None:
    """Return the Euclidean norm of each channel's row over all writers, [width]; None where there are no values."""
    squares: Tensor | None = None
    for writer in writer_matrices(width_graph, group):
        if writer.device.type == "meta":
            return None
        # Without a copy of the whole in a wider dtype.
        real = writer.abs() if writer.is_complex() else writer
        own = torch.linalg.vector_norm(real, dim=1, dtype=accumulation_dtype(real)).square()
        squares = own if squares is None else squares + own
    return None if squares is None else squares.sqrt()
