"""Networks in which one stream is added to copies of another's channels, and which channels these copies are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NARROW, WIDE = 6, 10
NONE = -1

Copies = Callable[[Tensor], Tensor]

# Each makes 10 channels of 6, and what each of them is.
KINDS: dict[str, tuple[Copies, list[int]]] = {
    "repeat, cut": (lambda x: x.repeat(1, 3, 1, 1)[:, :10], [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]),
    "tile, cut": (lambda x: torch.tile(x, (1, 2, 1, 1))[:, 2:], [2, 3, 4, 5, 0, 1, 2, 3, 4, 5]),
    "expand, reshape, cut": (
        lambda x: x[:, None].expand(-1, 2, -1, -1, -1).reshape(x.shape[0], -1, *x.shape[2:])[:, :10],
        [0, 1, 2, 3, 4, 5, 0, 1, 2, 3],
    ),
    "expand, flatten": (
        lambda x: x[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)[:, 1:11],
        [0, 1, 1, 2, 2, 3, 3, 4, 4, 5],
    ),
    "cat of itself": (lambda x: torch.cat([x, x[:, :4]], 1), [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]),
    "cat of parts": (lambda x: torch.cat([x[:, 3:], x, x[:, 5:]], 1), [3, 4, 5, 0, 1, 2, 3, 4, 5, 5]),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 1)[:, :10], [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]),
    "stack": (lambda x: torch.stack([x, x], 2).flatten(1, 2)[:, :10], [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]),
    "list of numbers": (lambda x: x[:, [5, 1, 2, 3, 4, 0, 1, 0, 3, 3]], [5, 1, 2, 3, 4, 0, 1, 0, 3, 3]),
    "index_select": (
        lambda x: x.index_select(1, torch.tensor([5, 1, 2, 3, 4, 0, 1, 0, 3, 3])),
        [5, 1, 2, 3, 4, 0, 1, 0, 3, 3],
    ),
    "numbers modulo": (lambda x: x[:, torch.arange(10) % 6], [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]),
    "zeros beside": (lambda x: F.pad(x, (0, 0, 0, 0, 1, 3)), [NONE, 0, 1, 2, 3, 4, 5, NONE, NONE, NONE]),
    "other strides, zeros beside": (
        lambda x: F.pad(x[:, :, ::1], (0, 0, 0, 0, 0, 4)),
        [0, 1, 2, 3, 4, 5, NONE, NONE, NONE, NONE],
    ),
    "other order of dims": (
        lambda x: x.permute(0, 2, 3, 1).repeat(1, 1, 1, 2)[..., :10].permute(0, 3, 1, 2),
        [0, 1, 2, 3, 4, 5, 0, 1, 2, 3],
    ),
    "backwards": (lambda x: torch.cat([x.flip(1), x], 1)[:, :10], [5, 4, 3, 2, 1, 0, 0, 1, 2, 3]),
    "several after one another": (
        lambda x: torch.cat([x.repeat(1, 2, 1, 1)[:, 3:9], x], 1)[:, :10],
        [3, 4, 5, 0, 1, 2, 0, 1, 2, 3],
    ),
}


class Joined(nn.Module):
    """A convolution, and another that is added to copies of its channels."""

    def __init__(self, copies: Copies, wide: int = WIDE) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, NARROW, 3, padding=1)
        self.norm = nn.BatchNorm2d(NARROW)
        self.b = nn.Conv2d(NARROW, wide, 3, padding=1)
        self.c = nn.Conv2d(wide, 5, 1)
        self.copies = copies

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.norm(self.a(x)))
        return self.c(torch.relu(self.b(y) + self.copies(y))).mean((2, 3))


def images(batch: int = 3, size: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
