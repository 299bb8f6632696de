"""Recurrent networks over sequences of different lengths, packed inside of the model or by its caller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

WIDTH, HIDDEN, OUT = 6, 10, 3


class Packs(nn.Module):
    """Packs padded sequences inside."""

    def __init__(self, kind: Callable[..., nn.RNNBase] = nn.LSTM, **options: Any) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Linear(WIDTH, 8), kind(8, HIDDEN, batch_first=True, **options)
        directions = 2 if self.rnn.bidirectional else 1
        self.head = nn.Linear(directions * (self.rnn.proj_size or HIDDEN), OUT)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embed(x), lengths, batch_first=True, enforce_sorted=False)
        out, _ = self.rnn(packed)
        padded, _ = pad_packed_sequence(out, batch_first=True, padding_value=0.5)
        return self.head(padded).sum(1)


class Encoder(nn.Module):
    """Tells a sequence by its last state, the steps first."""

    def __init__(self, kind: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(8, HIDDEN, num_layers=2, dropout=0.3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        _, last = self.rnn(nn.utils.rnn.pack_padded_sequence(x.transpose(0, 1), lengths.cpu(), enforce_sorted=False))
        return (last[0] if isinstance(last, tuple) else last)[-1]


class WithEncoder(nn.Module):
    """Packs in one of its parts; the others can be traced."""

    def __init__(self, kind: Callable[..., nn.RNNBase] = nn.GRU) -> None:
        super().__init__()
        self.embed, self.encoder = nn.Linear(WIDTH, 8), Encoder(kind)
        self.mid, self.head = nn.Linear(HIDDEN, 12), nn.Linear(12, OUT)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.head(torch.relu(self.mid(self.encoder(torch.relu(self.embed(x)), lengths))))


class TakesPacked(nn.Module):
    """Takes packed sequences."""

    def __init__(self, kind: Callable[..., nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.rnn, self.head = kind(WIDTH, HIDDEN), nn.Linear(HIDDEN, OUT)

    def forward(self, packed: PackedSequence) -> Tensor:
        out, _ = self.rnn(packed)
        return self.head(out.data)


class ReturnsPacked(nn.Module):
    """Takes and returns packed sequences, and the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.GRU(WIDTH, HIDDEN, bidirectional=True), nn.GRU(2 * HIDDEN, OUT)

    def forward(self, packed: PackedSequence) -> tuple[PackedSequence, Tensor]:
        out, last = self.second(self.first(packed)[0])
        return out, last


def sequences(batch: int = 4) -> tuple[Tensor, Tensor]:
    lengths = torch.arange(batch) % 3 + 3
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 5, WIDTH, generator=generator, dtype=torch.float64), lengths


def packed(batch: int = 4) -> tuple[PackedSequence]:
    values, lengths = sequences(batch)
    return (pack_padded_sequence(values, lengths, batch_first=True, enforce_sorted=False),)


# By name: the model, its arguments for a batch size, and how many groups are free.
PACKED: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Any, ...]], int]] = {
    "packs for an lstm": (Packs, sequences, 2),
    "packs for a gru": (lambda: Packs(nn.GRU), sequences, 2),
    "packs for an rnn": (lambda: Packs(nn.RNN, nonlinearity="relu"), sequences, 2),
    "both directions, two layers": (lambda: Packs(bidirectional=True, num_layers=2, dropout=0.2), sequences, 2),
    "projected": (lambda: Packs(nn.LSTM, proj_size=4), sequences, 3),
    "in a part": (WithEncoder, sequences, 3),
    "in a part, an lstm": (lambda: WithEncoder(nn.LSTM), sequences, 3),
    "takes packed for an lstm": (TakesPacked, packed, 1),
    "takes packed for a gru": (lambda: TakesPacked(nn.GRU), packed, 1),
    "returns packed": (ReturnsPacked, packed, 1),
}
