"""Networks whose groups grow by what a loss asks for: one of each kind."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.oracles.judges import randomise


def images(count: int, channels: int = 2, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, channels, size, size, generator=generator, dtype=torch.float64)


def labels(count: int) -> Tensor:
    return torch.arange(count) % 4


class Residual(nn.Module):
    """A stream with two writers and two readers, batch norms, a stride and a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.up, self.inner, self.down = nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Conv2d(5, 6, 1)
        self.next, self.head = nn.Conv2d(6, 7, 3, stride=2), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.down(F.relu(self.inner(self.up(x))))
        return self.head(F.relu(self.next(F.max_pool2d(x, 2))).mean((2, 3)))


class Concatenated(nn.Module):
    """Two branches side by side, a grouped convolution and a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 1)
        self.depthwise, self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 6, 3, groups=2)
        self.head = nn.Linear(6 * 9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x).relu(), F.silu(self.right(x))], 1)
        x = F.gelu(self.grouped(F.relu(self.depthwise(x))))
        return self.head(F.avg_pool2d(x, 2).flatten(1))


class Attention(nn.Module):
    """Tokens, heads, an MLP and norms over the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(16, 12), nn.LayerNorm(12)
        self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(12, 10), nn.Linear(10, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).mT.unflatten(1, (4, 16)).flatten(2)[..., :16])
        h = self.norm(x)
        q, k, v = (part(h).unflatten(2, (3, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head((x + self.down(F.gelu(self.up(x)))).mean(1))


class Transposed(nn.Module):
    """A transposed convolution between two others, and one dimension more or less than two."""

    def __init__(self) -> None:
        super().__init__()
        self.write, self.up = nn.Conv2d(2, 5, 3, stride=2), nn.ConvTranspose2d(5, 4, 3, stride=2)
        self.line, self.head = nn.Conv1d(4, 5, 3), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.up(torch.tanh(self.write(x)))).flatten(2)
        return self.head(self.line(x).relu().mean(2))


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(128, 6), nn.ReLU(inplace=True), nn.Linear(6, 5, bias=False), nn.ELU(), nn.Linear(5, 4)
    )


def _flattened() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(45, 4)
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": _mlp,
    "flattened": _flattened,
    "residual": Residual,
    "concatenated": Concatenated,
    "attention": Attention,
    "transposed": Transposed,
}


def network(name: str) -> nn.Module:
    """Return one of them in double precision, its gains and statistics set apart."""
    torch.manual_seed(0)
    return randomise(NETWORKS[name]()).double().eval()
