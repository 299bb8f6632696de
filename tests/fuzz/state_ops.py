"""Ops of random networks that keep something or follow a mode: counters, own statistics, dropout, drop path."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.fuzz.odd_ops import applied
from tests.fuzz.ops import Choices, Op, Proposed, kept


def _with_kind(choose: Choices, width: int, other: int) -> Proposed:
    return (choose.between(0, 1),), (width,)


class Counter(nn.Module):
    """Counts its calls in a buffer, and scales by what it has counted."""

    def __init__(self, in_training_alone: bool) -> None:
        super().__init__()
        self.in_training_alone = in_training_alone
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training or not self.in_training_alone:
            self.calls.add_(1)
        return x * (1 + 1 / (1 + self.calls))


class Averages(nn.Module):
    """Subtracts a moving average per channel, which training moves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 2)).unsqueeze(1))
        return x - self.mean


class Scaled(nn.Module):
    """Scales by what is computed from buffers alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("variance", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(self.variance + 1e-5).clamp(max=2.0)[:, None]


class Dropped(nn.Module):
    """Drops numbers by a probability that the call is given."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, self.training)


class Attention(nn.Module):
    """Attention over positions; its dropout is a number that depends on the mode."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(1, 2)
        dropout = 0.3 if self.training else 0.0
        return F.scaled_dot_product_attention(y, torch.tanh(y), y, dropout_p=dropout, scale=0.5).transpose(1, 2)


class DropPath(nn.Module):
    """Leaves a branch out for some samples, in training."""

    def forward(self, x: Tensor) -> Tensor:
        branch = torch.tanh(x)
        if self.training:
            branch = branch * branch.new_empty((x.shape[0], 1, 1)).bernoulli_(0.7) / 0.7
        return x + branch


STATE_OPS: dict[str, Op] = {
    "counter": Op(_with_kind, applied, lambda w, n: Counter(bool(n[0]))),
    "moving average": Op(kept, applied, lambda w, n: Averages(w)),
    "scaled by a buffer": Op(kept, applied, lambda w, n: Scaled(w)),
    "dropout": Op(kept, applied, lambda w, n: Dropped()),
    "attention dropout": Op(kept, applied, lambda w, n: Attention()),
    "drop path": Op(kept, applied, lambda w, n: DropPath()),
}
