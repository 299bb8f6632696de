"""Networks whose inputs are integers or truth values, each with a way of its own to use them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, CLASSES = 8, 20


def body(inputs: int, width: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, 3))


class Bytes(nn.Module):
    """Images as they are stored."""

    def __init__(self) -> None:
        super().__init__()
        self.body = body(48)

    def forward(self, x: Tensor) -> Tensor:
        return self.body((x.double().flatten(1) / 255 - 0.5) / 0.25)


class ConvolvedBytes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.body = nn.Conv2d(3, 6, 3), body(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(torch.relu(self.conv(x.double() / 255)).mean((2, 3)))


class Table(nn.Module):
    """Columns of counts, each on a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = body(5)
        self.register_buffer("scale", torch.tensor([1.0, 10.0, 100.0, 1000.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x / self.scale)


class OneHot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = body(CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(F.one_hot(x, CLASSES).double().sum(1))


class Compared(nn.Module):
    """Classes told by a buffer of all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = body(CLASSES)
        self.register_buffer("classes", torch.arange(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.body((x[..., None] == self.classes).double().sum(1))


class Rows(nn.Module):
    """Rows of a parameter, looked up by indexing."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body = nn.Parameter(torch.randn(CLASSES, 6)), body(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.table[x].sum(1))


class Columns(nn.Module):
    """Categories of several columns in one table, each column behind the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(30, 4), body(12)
        self.register_buffer("starts", torch.tensor([0, 10, 20]))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.table(x + self.starts).flatten(1))


class ColumnsFromTheEnd(Columns):
    """Categories of several columns in one table, each counted back from the last of its column."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ends", torch.tensor([9, 19, 29]))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.table(self.ends - x).flatten(1))


class ComparedFromOne(nn.Module):
    """Classes that are counted from one, told by a range."""

    def __init__(self) -> None:
        super().__init__()
        self.body = body(CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.body((x[..., None] == torch.arange(1, CLASSES + 1, device=x.device)).double().sum(1))


class Bag(nn.Module):
    def __init__(self, mode: str = "mean") -> None:
        super().__init__()
        self.bag, self.body = nn.EmbeddingBag(CLASSES, 6, mode=mode), body(6)

    def forward(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        return self.body(self.bag(x, offsets))


class WeightedBag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.body = nn.EmbeddingBag(CLASSES, 6, mode="sum"), body(6)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return self.body(self.bag(x, per_sample_weights=weights))


class ClosedBag(Bag):
    """Bags of which the end of the last is told too."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(CLASSES, 6, include_last_offset=True)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = body(10)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.body(x.masked_fill(mask, 0.0))


class MaskAlone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = body(10)

    def forward(self, mask: Tensor) -> Tensor:
        return self.body(mask.double())


class Mean(nn.Module):
    """The mean of the tokens that are not padding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(CLASSES, 6), body(6)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        h = torch.relu(self.table(x)).masked_fill(padding[..., None], 0.0)
        return self.body(h.sum(1) / (~padding).sum(1, keepdim=True))


class Lengths(nn.Module):
    """The mean of as many steps as a number says."""

    def __init__(self) -> None:
        super().__init__()
        self.body = body(5)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        inside = torch.arange(x.shape[1])[None] < lengths[:, None]
        return self.body((x * inside[..., None]).sum(1) / lengths[:, None])


class LengthsAlone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = body(7)

    def forward(self, lengths: Tensor) -> Tensor:
        return self.body((torch.arange(7)[None] < lengths[:, None]).double())


class Attention(nn.Module):
    """Attention that looks back alone, and leaves padding out: what is drawn must leave something over."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.register_buffer("later", torch.ones(6, 6, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.layer(x, src_mask=self.later, src_key_padding_mask=padding)


class Packed(nn.Module):
    """Tokens of sequences whose lengths must fit each other."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.cell, self.body = nn.Embedding(CLASSES, 6), nn.GRU(6, 6, batch_first=True), body(6)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.table(x), lengths, batch_first=True, enforce_sorted=False)
        return self.body(self.cell(packed)[1][-1])


def tokens(batch: int, length: int = 6) -> Tensor:
    return torch.randint(0, CLASSES, (batch, length))


def padding(batch: int, length: int = 6) -> Tensor:
    return torch.arange(length)[None] >= torch.randint(1, length + 1, (batch, 1))


def bag_starts(batch: int, length: int = 6) -> Tensor:
    return torch.arange(batch) * length


def counts(batch: int) -> Tensor:
    return (torch.rand(batch, 5) * torch.tensor([2.0, 30.0, 300.0, 3000.0, 9.0])).long()


@dataclass(frozen=True)
class IntegerNetwork:
    """A network and what makes inputs of so many samples for it.

    Attributes:
        make: makes the network.
        inputs: makes inputs.
        drawn: which inputs are drawn, by place; the others are noise, or stay as they are.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    drawn: tuple[int, ...] = (0,)


def images(batch: int, size: int = 4) -> Tensor:
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


INTEGER_NETWORKS: dict[str, IntegerNetwork] = {
    "images of bytes": IntegerNetwork(Bytes, lambda n: (images(n),)),
    "images of bytes for a convolution": IntegerNetwork(ConvolvedBytes, lambda n: (images(n, 8),)),
    "columns of counts": IntegerNetwork(Table, lambda n: (counts(n),)),
    "one_hot": IntegerNetwork(OneHot, lambda n: (tokens(n),)),
    "classes compared": IntegerNetwork(Compared, lambda n: (tokens(n),)),
    "rows of a parameter": IntegerNetwork(Rows, lambda n: (tokens(n),)),
    "columns in one table": IntegerNetwork(Columns, lambda n: (torch.randint(0, 10, (n, 3)),)),
    "columns from the end": IntegerNetwork(ColumnsFromTheEnd, lambda n: (torch.randint(0, 10, (n, 3)),)),
    "classes from one": IntegerNetwork(ComparedFromOne, lambda n: (1 + tokens(n),)),
    "bags": IntegerNetwork(Bag, lambda n: (tokens(n),)),
    "bags by offsets": IntegerNetwork(Bag, lambda n: (tokens(n).flatten(), bag_starts(n)), (0, 1)),
    "bags by offsets and end": IntegerNetwork(ClosedBag, lambda n: (tokens(n).flatten(), bag_starts(n + 1)), (0, 1)),
    "weighted bags": IntegerNetwork(WeightedBag, lambda n: (tokens(n), torch.rand(n, 6, dtype=torch.float64))),
    "a mask over numbers": IntegerNetwork(Masked, lambda n: (floats(n, 10), torch.rand(n, 10) < 0.3), (1,)),
    "a mask alone": IntegerNetwork(MaskAlone, lambda n: (torch.rand(n, 10) < 0.3,)),
    "tokens and padding": IntegerNetwork(Mean, lambda n: (tokens(n), padding(n)), (0, 1)),
    "lengths": IntegerNetwork(Lengths, lambda n: (floats(n, 7, 5), torch.randint(1, 8, (n,))), (1,)),
    "lengths alone": IntegerNetwork(LengthsAlone, lambda n: (torch.randint(1, 8, (n,)),)),
    "attention and padding": IntegerNetwork(Attention, lambda n: (floats(n, 6, 8), padding(n)), (1,)),
    "packed tokens": IntegerNetwork(Packed, lambda n: (tokens(n), torch.randint(1, 7, (n,)))),
}


def integer_network(name: str, seed: int, batch: int = 4) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return a network in double precision, in eval mode, and inputs for it."""
    torch.manual_seed(seed)
    network = INTEGER_NETWORKS[name]
    return network.make().double().eval(), network.inputs(batch)
