"""Networks around one op each, whose hidden channels pass it: what is between two layers, and inputs of any batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import DeformConv2d

HIDDEN = 8

Inputs = Callable[[int], tuple[Any, ...]]


@dataclass(frozen=True)
class OpCase:
    """A network, inputs of a batch size, and how many of its groups are free, and can grow.

    Attributes:
        build: makes the network.
        inputs: makes inputs of a batch size.
        free: how many groups are free.
        grown: how many of them can grow without changing the function.
        copies: whether copies of channels can be dropped without a trace.
    """

    build: Callable[[], nn.Module]
    inputs: Inputs
    free: int = 1
    grown: int = 1
    copies: bool = True


class Between(nn.Module):
    """What a function makes of hidden channels, and of all other inputs, between two layers."""

    def __init__(self, function: Callable[..., Tensor], into: nn.Module, out: nn.Module, **parts: Any) -> None:
        super().__init__()
        self.into, self.out, self.function = into, out, function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) and part.is_floating_point() else part)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        own = (self,) if next(iter(signature(self.function).parameters)) == "s" else ()
        return self.out(self.function(*own, self.into(x), *others))


def between(function: Callable[..., Tensor], **parts: Any) -> Callable[[], nn.Module]:
    return lambda: Between(function, nn.Linear(5, HIDDEN), nn.Linear(HIDDEN, 3), **{k: v() for k, v in parts.items()})


# -- message passing: nodes are the batch, and edges tell from which to which ----------------------------------------


def graph_of(nodes: int) -> tuple[Tensor, Tensor]:
    """Return features of nodes, [nodes, 5], and edges, [edges, 2]: more of them end in some nodes than in others."""
    own = torch.arange(nodes)
    edges = torch.stack([torch.cat([own, own[1:]]), torch.cat([(own + 1) % nodes, own[1:] // 2])], 1)
    return torch.randn(nodes, 5, dtype=torch.float64), edges


def _zeros(h: Tensor) -> Tensor:
    return h.new_zeros(h.shape[0], h.shape[1])


def _wide(index: Tensor, m: Tensor) -> Tensor:
    return index.view(-1, 1).expand(-1, m.shape[1])


_MESSAGES: dict[str, Callable[..., Tensor]] = {
    "index_add": lambda h, e: _zeros(h).index_add_(0, e[:, 1], torch.tanh(h[e[:, 0]])),
    "index_add, scaled": lambda h, e: torch.tanh(h).index_add(0, e[:, 1], h.index_select(0, e[:, 0]), alpha=0.5),
    "scatter_add": lambda h, e: _zeros(h).scatter_add_(0, _wide(e[:, 1], h[e[:, 0]]), h[e[:, 0]]),
    "scatter, added": lambda h, e: _zeros(h).scatter(0, _wide(e[:, 1], h[e[:, 0]]), h[e[:, 0]], reduce="add"),
    "index_put": lambda h, e: _zeros(h).index_put((e[:, 1],), torch.sin(h[e[:, 0]]), accumulate=True),
    "largest": lambda h, e: _zeros(h).scatter_reduce(
        0, _wide(e[:, 1], h[e[:, 0]]), h[e[:, 0]], "amax", include_self=False
    ),
    "mean": lambda h, e: _zeros(h).scatter_reduce(
        0, _wide(e[:, 1], h[e[:, 0]]), h[e[:, 0]], "mean", include_self=False
    ),
    "index_reduce": lambda h, e: torch.tanh(h).index_reduce(0, e[:, 1], h[e[:, 0]], "amin"),
    "by columns": lambda h, e: torch.zeros_like(h.T).index_add(1, e[:, 1], h.T[:, e[:, 0]]).T,
}


def _attended(s: Any, h: Tensor, e: Tensor) -> Tensor:
    """Attention along edges, with a softmax over those that end in one node."""
    scores = torch.exp(torch.tanh(s.asked(h[e[:, 0]]) + s.told(h[e[:, 1]]))).squeeze(-1)
    total = scores.new_zeros(h.shape[0]).index_add(0, e[:, 1], scores)
    return torch.zeros_like(h).index_add(0, e[:, 1], h[e[:, 0]] * (scores / total[e[:, 1]]).unsqueeze(-1))


class GraphNetwork(nn.Module):
    """Two rounds of messages with a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.one, self.two = nn.Linear(5, HIDDEN), nn.Linear(HIDDEN, 12), nn.Linear(12, HIDDEN)
        self.norm, self.out = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = self.into(x)
        for _ in range(2):
            sent = torch.relu(self.one(h))
            messages = sent.index_select(0, edges[:, 0])
            index = edges[:, 1].view(-1, 1).expand_as(messages)
            h = h + self.two(torch.zeros_like(sent).scatter_add_(0, index, messages))
        return self.out(self.norm(h))


def rows_of(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 6, 5, dtype=torch.float64),)


def masked_rows(batch: int) -> tuple[Tensor, Tensor]:
    """Return rows of 6 positions each, [batch, 6, 5], and a mask of some of them, [batch, 6]."""
    return *rows_of(batch), (torch.arange(6 * batch) % 4 == 1).view(batch, 6)


def _set(h: Tensor, mask: Tensor, value: Tensor | float) -> Tensor:
    h = h.clone()
    h[mask] = value
    return h


def _row_set(s: Any, h: Tensor, mask: Tensor) -> Tensor:
    return _set(torch.tanh(h), mask, s.row)


def _set_by_method(h: Tensor, mask: Tensor) -> Tensor:
    h = torch.sin(h)
    h.__setitem__((slice(None), slice(0, 6)), h[:, :6] * 2)
    h.__setitem__(mask, 1.0)
    return h


class MaskedNorm(nn.Module):
    """A residual stream of which some positions are set to zero, as where there are none of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.norm, self.out = nn.Linear(5, HIDDEN), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.into(x)
        h[mask] = 0.0
        return self.out(self.norm(h))


def _turned(h: Tensor) -> Tensor:
    """Turn pairs of positions by angles of their own."""
    pairs = torch.view_as_complex(h.reshape(h.shape[0], 3, 2, -1).transpose(2, 3).contiguous())
    turned = pairs * torch.polar(torch.ones(3, 1).double(), torch.arange(3).double().unsqueeze(1))
    return torch.view_as_real(turned).transpose(2, 3).reshape(h.shape[0], 6, -1)


class FourierOperator(nn.Module):
    """A layer of a Fourier neural operator: complex weights multiply low frequencies of images."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Conv2d(3, HIDDEN, 1), nn.Conv2d(6, 3, 1)
        self.weight = nn.Parameter(torch.randn(HIDDEN, 6, 4, 3, dtype=torch.cdouble) / 4)
        self.beside = nn.Conv2d(HIDDEN, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.into(x))
        low = torch.fft.rfft2(h)[:, :, :4, :3]
        mixed = torch.einsum("bixy,ioxy->boxy", low, self.weight)
        return self.out(torch.tanh(torch.fft.irfft2(mixed, s=x.shape[-2:]) + self.beside(h)))


def images_of(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3, 8, 8, dtype=torch.float64),)


class Bilinear(nn.Module):
    """Products of two vectors of hidden channels with a weight of three dims."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.both, self.out = nn.Linear(5, HIDDEN), nn.Bilinear(HIDDEN, HIDDEN, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.into(x))
        return self.out(torch.tanh(self.both(h, h)))


def sparse_graph_of(nodes: int) -> tuple[Tensor, Tensor]:
    """Return features of nodes, and which of them are neighbours."""
    x, edges = graph_of(nodes)
    values = torch.linspace(0.5, 1, len(edges)).double()
    return x, torch.sparse_coo_tensor(edges.T, values, (nodes, nodes), check_invariants=True).coalesce()


class SparseMixing(nn.Module):
    """Positions mixed by a sparse matrix that the model holds."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(5, HIDDEN), nn.Linear(HIDDEN, 3)
        self.register_buffer("matrix", (torch.eye(6) + torch.eye(6).flip(0)).double().to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.into(x)).permute(1, 0, 2)
        mixed = torch.sparse.mm(self.matrix, h.reshape(6, -1)).view(h.shape)
        return self.out(mixed.permute(1, 0, 2))


class Prototypes(nn.Module):
    """How near hidden channels are to some prototypes."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.prototypes = nn.Linear(5, HIDDEN), nn.Parameter(torch.randn(4, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(torch.tanh(self.into(x)), self.prototypes))


class Bags(nn.Module):
    """Rows of a table summed up, several for each sample."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.table, self.out = nn.EmbeddingBag(9, HIDDEN, mode=mode), nn.Linear(HIDDEN, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.out(torch.relu(self.table(words)))


def words_of(batch: int) -> tuple[Tensor, ...]:
    return (torch.arange(batch * 4).view(batch, 4) * 7 % 9,)


class Deformed(nn.Module):
    """A convolution that looks at places between the positions, which another layer tells."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.where = nn.Conv2d(3, HIDDEN, 1), nn.Conv2d(HIDDEN, 18, 1)
        self.deformed, self.out = DeformConv2d(HIDDEN, 6, 3, padding=1), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.into(x))
        return self.out(torch.relu(self.deformed(h, torch.tanh(self.where(h)))))


class QuantizedWeights(nn.Module):
    """A layer whose weight is rounded, each row by a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(5, HIDDEN), nn.Linear(HIDDEN, 3)
        self.scales = nn.Parameter(torch.linspace(0.01, 0.02, HIDDEN), requires_grad=False)
        self.register_buffer("zero_points", torch.zeros(HIDDEN, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        scales = self.scales.float().clamp(min=0.005)
        weight = torch.fake_quantize_per_channel_affine(self.into.weight, scales, self.zero_points, 0, -128, 127)
        return self.out(torch.relu(F.linear(x, weight, self.into.bias)))


class Transformer(nn.Module):
    """Features sampled where they themselves tell by an affine map of the positions."""

    def __init__(self, by_sizes: bool) -> None:
        super().__init__()
        self.into, self.theta, self.by_sizes = nn.Conv2d(3, HIDDEN, 3, padding=1), nn.Linear(HIDDEN, 6), by_sizes
        self.next, self.out = nn.Conv2d(HIDDEN, 6, 3), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.into(x))
        size = [h.size(0), h.size(1), 8, 8] if self.by_sizes else h.size()
        grid = F.affine_grid(self.theta(h.mean((2, 3))).view(-1, 2, 3), size, align_corners=False)
        return self.out(torch.relu(self.next(F.grid_sample(h, grid, align_corners=False))))


def _inverses(h: Tensor) -> Tensor:
    columns = torch.tanh(h).transpose(1, 2).unsqueeze(-1)
    matrices = columns @ columns.mT + torch.eye(6).double()
    return torch.linalg.inv(matrices).sum(-1).transpose(1, 2)


def _determinants(h: Tensor) -> Tensor:
    columns = torch.tanh(h).transpose(1, 2).unsqueeze(-1)
    return torch.linalg.det(columns @ columns.mT + torch.eye(6).double()).unsqueeze(1)


class Patches(nn.Module):
    """Images cut into overlapping patches, and put together of these."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Conv2d(3, HIDDEN, 1), nn.Conv2d(HIDDEN, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        patches = torch.tanh(F.unfold(self.into(x), 3, padding=1))
        return self.out(F.fold(patches, (8, 8), 3, padding=1))


_LENGTHS = torch.tensor([2, 1, 3])

OP_CASES: dict[str, OpCase] = {
    **{f"messages: {name}": OpCase(between(function), graph_of) for name, function in _MESSAGES.items()},
    "messages: attention": OpCase(
        between(_attended, asked=lambda: nn.Linear(HIDDEN, 1), told=lambda: nn.Linear(HIDDEN, 1, bias=False)), graph_of
    ),
    "messages: a residual stream": OpCase(GraphNetwork, graph_of, 2, 2),
    "writes: copied rows": OpCase(
        between(lambda h: torch.tanh(h).index_copy(1, torch.tensor([4, 1]), h[:, :2])), rows_of
    ),
    "writes: filled rows": OpCase(between(lambda h: h.index_fill(1, torch.tensor([3, 0]), 0.5)), rows_of),
    "writes: one number": OpCase(
        between(lambda h: h.scatter(1, (torch.arange(2).view(1, 2, 1) * 3).expand(h.shape[0], 2, h.shape[2]), 0.5)),
        rows_of,
    ),
    "writes: segments": OpCase(
        between(lambda h: torch.segment_reduce(h.transpose(0, 1), "sum", lengths=_LENGTHS, axis=0).transpose(0, 1)),
        rows_of,
    ),
    "writes: segments of most": OpCase(
        between(lambda h: torch.segment_reduce(h.transpose(0, 1), "max", lengths=_LENGTHS, axis=0).transpose(0, 1)),
        rows_of,
        grown=0,
    ),
    "masks: zeros under one": OpCase(between(lambda h, m: _set(h, m, 0.0)), masked_rows),
    "masks: a row under one": OpCase(between(_row_set, row=lambda: torch.randn(HIDDEN)), masked_rows),
    "masks: by setitem": OpCase(between(_set_by_method), masked_rows),
    "masks: a column under one": OpCase(
        between(lambda h, m: _set(h.transpose(0, 1), m[0], 0.5).transpose(0, 1)), masked_rows
    ),
    "masks: added": OpCase(
        between(lambda h, m: torch.tanh(h).index_put((m,), torch.ones(1).double(), accumulate=True)), masked_rows
    ),
    "masks: others under one": OpCase(between(lambda h, m: _set(h, m, torch.tanh(h)[m] * 2)), masked_rows),
    "masks: rows scattered": OpCase(
        between(lambda h, m: h.masked_scatter(m.unsqueeze(-1).expand_as(h), torch.sin(h).flatten(0, 1))), masked_rows
    ),
    "masks: rows scattered without expanding": OpCase(
        between(lambda h, m: torch.tanh(h).masked_scatter(m.unsqueeze(-1), h)), masked_rows
    ),
    "masks: entries scattered": OpCase(
        between(lambda h, m: h.masked_scatter((m.unsqueeze(-1) & (h > 0)), torch.sin(h))), masked_rows, 0, 0
    ),
    "masks: a norm behind": OpCase(MaskedNorm, masked_rows, copies=False),
    "fourier: frequencies weighted": OpCase(
        between(
            lambda s, h: torch.fft.irfft(torch.fft.rfft(h, dim=1) * s.gain[:, None], n=6, dim=1),
            gain=lambda: torch.rand(4) + 0.5,
        ),
        rows_of,
    ),
    "fourier: a real part": OpCase(between(lambda h: torch.tanh(torch.fft.fft(h, dim=1).real.contiguous())), rows_of),
    "fourier: parts side by side": OpCase(
        between(lambda h: torch.view_as_real(torch.fft.fft(h, dim=1)).tanh().sum(-1)), rows_of
    ),
    "fourier: lengths of frequencies": OpCase(between(lambda h: torch.fft.rfft(h, dim=1).abs().contiguous()), rows_of),
    "fourier: conjugated": OpCase(
        between(lambda h: torch.fft.ifft(torch.fft.fft(h, dim=1).conj() * torch.fft.fft(h.tanh(), dim=1), dim=1).imag),
        rows_of,
    ),
    "fourier: turned": OpCase(between(_turned), rows_of),
    "fourier: an operator": OpCase(FourierOperator, images_of, 2, 2),
    "fourier: along channels": OpCase(between(lambda h: torch.fft.fft(h, dim=-1).real), rows_of, 0, 0),
    "products: two vectors": OpCase(Bilinear, lambda batch: (torch.randn(batch, 5).double(),), 2, 2),
    # Evidence is of batches of other sizes, and these are as wide as the batch.
    "products: a sparse adjacency": OpCase(
        between(lambda h, a: torch.sparse.mm(a, torch.tanh(h))), sparse_graph_of, copies=False
    ),
    "products: a sparse matrix": OpCase(between(lambda h, a: a @ torch.tanh(h)), sparse_graph_of, copies=False),
    "products: a sparse buffer": OpCase(SparseMixing, lambda batch: (torch.randn(batch, 6, 5).double(),)),
    "distances": OpCase(Prototypes, lambda batch: (torch.randn(batch, 5).double(),), copies=False),
    "bags: of words": OpCase(lambda: Bags("sum"), words_of),
    "bags: their means": OpCase(lambda: Bags("mean"), words_of),
    "bags: their largest": OpCase(lambda: Bags("max"), words_of),
    "a deformed convolution": OpCase(Deformed, images_of, 2, 2),
    "quantized: weights": OpCase(QuantizedWeights, lambda batch: (torch.randn(batch, 5).double(),)),
    "quantized: activations": OpCase(
        between(lambda h: torch.fake_quantize_per_tensor_affine(h, 0.01, 2, -128, 127)), rows_of
    ),
    "grids: of the size of features": OpCase(lambda: Transformer(False), images_of, 2, 2),
    "grids: of sizes": OpCase(lambda: Transformer(True), images_of, 2, 2),
    "matrices: equations with a column for each channel": OpCase(
        between(lambda s, h: torch.linalg.solve(s.mixing, torch.tanh(h)), mixing=lambda: torch.eye(6) * 3 + 1), rows_of
    ),
    "matrices: an inverse for each channel": OpCase(between(_inverses), rows_of, grown=0),
    "matrices: lengths by channel": OpCase(between(_determinants), rows_of),
    "matrices: a diagonal": OpCase(
        between(lambda s, h: torch.tanh(h) @ torch.diag_embed(s.gain), gain=lambda: torch.rand(HIDDEN)), rows_of
    ),
    "matrices: its diagonal": OpCase(
        between(lambda h: torch.diagonal(h.tanh()[:, :, None] * h[:, None], 0, 1, 2).mT), rows_of
    ),
    "orders: sums of exponentials": OpCase(between(lambda h: torch.logcumsumexp(h, 1)), rows_of),
    "orders: sums and products": OpCase(between(lambda h: h.cumsum(1) + torch.tanh(h).cumprod(1)), rows_of),
    "orders: largest so far": OpCase(between(lambda h: h.cummax(1)[0]), rows_of),
    "patches: unfolded and folded": OpCase(Patches, images_of),
}
