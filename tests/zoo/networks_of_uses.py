"""Networks that use parameters, tensors and sizes in unusual ways."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.network_cases import case, conv, images, pooled, vectors, words

# -- parameters used in several places --


@case(4, images())
class OneHeadOnThreeLevels(nn.Module):
    """A head that is called three times, and a parameter that serves a convolution and its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = conv(3, 16), conv(16, 16, stride=2)
        self.head = nn.Sequential(conv(16, 16, groups=4), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 5))
        self.weight = nn.Parameter(torch.randn(24, 16, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        one = self.first(x)
        two = self.down(one)
        back = F.conv_transpose2d(F.conv2d(one, self.weight), self.weight)
        return self.head(one + back), self.head(two), self.head(self.down(two))


@case(4, words())
class TiedEmbedding(nn.Module):
    """Input and output share a table; a block is used twice; attention in between."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(30, 16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        for _ in range(2):
            x = x + self.down(F.gelu(self.up(x)))
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


@case(1, vectors())
class UnusedParameters(nn.Module):
    """A layer that is never called is not free: nothing says what depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.head = nn.Linear(10, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.register_buffer("table", torch.randn(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.used(x)))


@case(1, images())
class FeatureOutputs(nn.Module):
    """A width that the caller sees stays."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = conv(3, 8), conv(8, 12), conv(12, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        shown = F.relu(self.second(F.relu(self.first(x))))
        return {"features": shown, "mask": self.third(shown)}


@case(4, vectors())
class FunctionalParameters(nn.Module):
    """Weights and scales used without a module, and a buffer per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(12, 10)), nn.Parameter(torch.randn(12))
        self.matrix, self.last = nn.Parameter(torch.randn(12, 8)), nn.Parameter(torch.randn(2, 8, 6))
        self.register_buffer("mean", torch.randn(12))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh((F.linear(x, self.weight) - self.mean) * self.scale) @ self.matrix
        return self.head(torch.einsum("bi,kio->bko", x, self.last).flatten(1))


# -- writing in place, making tensors --


@case(3, images())
class InPlaceOnAView(nn.Module):
    """Adding to a slice couples it; scaling every other channel makes pairs of the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other, self.head = conv(3, 24), conv(24, 8), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.layer(x))
        update = self.other(x)
        x[:, 4:12] += update
        x[:, ::2] *= 2
        return self.head(pooled(x))


@case(2, vectors())
class MetadataInPlace(nn.Module):
    """The same tensor object gets other dims on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.conv, self.head = nn.Linear(10, 12), nn.Conv1d(12, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        x.unsqueeze_(2)
        x = self.conv(F.relu(x))
        x.transpose_(1, 2)
        x.squeeze_(1)
        x.mul_(0.5)
        return self.head(x)


@case(2, images())
class LiteralTensors(nn.Module):
    """Zeros that take a width, and ones that add channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = conv(3, 24), nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.layer(x))
        x = x + torch.zeros(x.shape[0], x.shape[1], 1, 1)
        return self.head(pooled(torch.cat([x, torch.ones(x.shape[0], 16, *x.shape[2:])], 1)))


@case(2, images())
class LiteralTensorsOfADtype(LiteralTensors):
    """The same, made by methods, which symbolic tracing can follow."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.layer(x))
        x = x + x.new_zeros(x.shape[0], x.shape[1], 1, 1)
        return self.head(pooled(torch.cat([x, x.new_ones(x.shape[0], 16, *x.shape[2:])], 1)))


@case(2, lambda: [torch.randn(8, 8, 8, 8)])
class AllSizesEqual(nn.Module):
    """Batch, channels, height and width are 8, and channels are swapped with positions on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.head = conv(8, 8), conv(8, 8, 1), conv(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.relu(self.second(x.transpose(1, 2)).transpose(1, 2))
        return self.head(pooled(self.third(x)))


@case(2, images(batch=1))
class BatchOfOne(nn.Module):
    """Nothing tells a batch of one from a dim that is merely broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = conv(3, 8), conv(8, 12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x))))
        return self.head(x.mean((2, 3)).view(1, -1))
