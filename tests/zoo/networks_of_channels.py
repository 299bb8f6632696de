"""Networks whose channels are joined, cut, tiled, shuffled and multiplied."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.network_cases import case, conv, images, pooled, tokens, vectors


def tiled(x: Tensor, width: int) -> Tensor:
    return torch.tile(x, (1, -(-width // x.shape[1]), 1, 1))[:, :width]


@case(4, images())
class TiledShortcut(nn.Module):
    """Each of 16 channels is added to two or three of 40, and those to two of 80: 8 of the 16 have another fate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = conv(3, 16), conv(16, 40), conv(40, 80)
        self.norm, self.head = nn.BatchNorm2d(40), nn.Linear(80, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.norm(self.first(x)) + tiled(x, 40))
        return self.head(pooled(F.relu(self.second(x) + tiled(x, 80))))


@case(3, images())
class PaddedShortcut(nn.Module):
    """ResNet's option A: the channels that meet the padding are groups of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = conv(3, 16), conv(16, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(pooled(F.relu(self.block(x) + F.pad(x, (0, 0, 0, 0, 8, 8)))))


@case(3, images())
class StridedPaddedShortcut(nn.Module):
    """Option A as it is written for CIFAR: a strided slice of positions, then padding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = conv(3, 16), conv(16, 32, stride=2), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(pooled(F.relu(self.block(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8), "constant", 0))))


@case(1, images())
class RolledChannels(nn.Module):
    """A channel roll by concatenation, with a residual: 5 and 7 are cut until what is left is one factor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(pooled(x + torch.cat([x[:, 4:], x[:, :4]], 1)))


@case(0, images())
class RolledOddly(RolledChannels):
    """Rolling 12 channels by 5 carries each to every other place."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(pooled(x + torch.cat([x[:, 5:], x[:, :5]], 1)))


# -- sums and products of channels --


@case(3, images())
class JoinedThenFlattened(nn.Module):
    """Concat, depthwise, flatten 7 x 7."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 6), conv(3, 10)
        self.depthwise, self.head = conv(16, 32, groups=16), nn.Linear(32 * 49, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(torch.cat([self.a(x), self.b(x)], 1), 7)
        return self.head(F.relu(self.depthwise(x)).flatten(1))


@case(2, images())
class JoinedThenFlattenedLast(nn.Module):
    """Concat, then flatten with the channels last: a sum inside a product."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(3, 10), nn.Linear(16 * 49, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(torch.cat([self.a(x), self.b(x)], 1), 7)
        return self.head(x.permute(0, 2, 3, 1).flatten(1))


def shuffled(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.shape
    return x.view(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(x.shape)


@case(3, images())
class ShuffledGroups(nn.Module):
    """ShuffleNet v1: grouped convolution, channel shuffle, grouped convolution."""

    def __init__(self, width: int = 36) -> None:
        super().__init__()
        self.stem, self.first, self.second = conv(3, 12), conv(12, width, groups=3), conv(width, 12, groups=3)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(pooled(F.relu(x + self.second(shuffled(self.first(x), 3)))))


@case(1, images())
class ShuffledUnevenGroups(ShuffledGroups):
    """8 channels per group do not come from 3 groups evenly: what is shuffled keeps its width."""

    def __init__(self) -> None:
        super().__init__(24)


class _ShuffleUnit(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.depthwise, self.last = (
            conv(width, width, 1),
            conv(width, width, groups=width),
            conv(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        kept, worked = x.chunk(2, dim=1)
        return shuffled(torch.cat([kept, self.last(self.depthwise(F.relu(self.first(worked))))], 1), 2)


@case(5, images())
class ShuffledHalves(nn.Module):
    """ShuffleNet v2 with halves of 6, twice even and then odd."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.head = conv(3, 12), _ShuffleUnit(6), _ShuffleUnit(6), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(pooled(self.two(self.one(F.relu(self.stem(x))))))


@case(5, images())
class Res2Net(nn.Module):
    """Channels in four parts, each convolved with the result of the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.head = conv(3, 16), conv(16, 16, 1), nn.Linear(16, 10)
        self.parts = nn.ModuleList(conv(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        first, *rest = torch.split(self.mix(x), 4, 1)
        done, last = [first], None
        for layer, part in zip(self.parts, rest, strict=True):
            last = F.relu(layer(part if last is None else part + last))
            done.append(last)
        return self.head(pooled(x + torch.cat(done, 1)))


@case(9, images())
class Dense(nn.Module):
    """Every layer reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 8), nn.Linear(8 + 4 * 4, 10)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 4 * i) for i in range(4))
        self.squeezes = nn.ModuleList(conv(8 + 4 * i, 6, 1) for i in range(4))
        self.layers = nn.ModuleList(conv(6, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, squeeze, layer in zip(self.norms, self.squeezes, self.layers, strict=True):
            features.append(layer(squeeze(F.relu(norm(torch.cat(features, 1))))))
        return self.head(pooled(torch.cat(features, 1)))


@case(3, images())
class GroupsOfManySizes(nn.Module):
    """GroupNorm(4) against groups=6 on 24 channels, then a transposed convolution in 3 groups and a pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.grouped = conv(3, 24), nn.GroupNorm(4, 24), conv(24, 24, groups=6)
        self.up, self.shuffle = nn.ConvTranspose2d(24, 36, 2, 2, groups=3), nn.PixelShuffle(2)
        self.last, self.head = conv(9, 8, 1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.head(pooled(self.last(self.shuffle(self.up(x + self.grouped(x))))))


@case(2, images())
class GroupsAcrossTheSeam(nn.Module):
    """Two streams with GroupNorm(4) each, laid end to end under GroupNorm(4): its third group has parts of both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = conv(3, 32), conv(3, 16), conv(48, 6, 1)
        self.norms = nn.ModuleList([nn.GroupNorm(4, 32), nn.GroupNorm(4, 16), nn.GroupNorm(4, 48)])
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.norms[0](self.a(x)), self.norms[1](self.b(x))], 1)
        return self.head(pooled(self.last(F.relu(self.norms[2](both)))))


@case(2, vectors())
class OuterProduct(nn.Module):
    """Two widths, multiplied and flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(10, 6), nn.Linear(10, 8), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.einsum("bi,bj->bij", self.a(x), self.b(x)).flatten(1))


@case(1, images())
class Gram(nn.Module):
    """The same width twice in one dim."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = conv(3, 6), nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = self.layer(x).flatten(2)
        return self.head((features @ features.transpose(1, 2)).flatten(1))


@case(1, images())
class GramTriangle(nn.Module):
    """The upper half of a Gram matrix, by index: the indexed width is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = conv(3, 6), nn.Linear(21, 5)
        self.register_buffer("places", torch.triu_indices(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        features = self.layer(x).flatten(2)
        return self.head((features @ features.transpose(1, 2))[:, self.places[0], self.places[1]])


@case(2, images())
class PermutedByBuffer(nn.Module):
    """Channels reordered by an index buffer are fixed, those behind are not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.next, self.head = conv(3, 12), conv(12, 8), nn.Linear(8, 5)
        self.register_buffer("order", torch.randperm(12))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(pooled(self.next(self.layer(x)[:, self.order])))


@case(4, tokens(20))
class GatedAndFolded(nn.Module):
    """GLU, unflatten, a weight per head by einsum, normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.next, self.head = nn.Linear(20, 64), nn.Linear(32, 24), nn.Linear(20, 7)
        self.weight = nn.Parameter(torch.randn(4, 6, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.next(F.glu(self.into(x))).unflatten(-1, (4, 6))
        x = torch.einsum("bnhi,hio->bnho", x, self.weight).flatten(-2)
        return self.head(F.normalize(x, dim=-1))


@case(2, images())
class MaximumOverChannels(nn.Module):
    """The values of a maximum, as spatial attention takes them: its positions are not looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.last, self.head = conv(3, 8), conv(2, 1), conv(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        summary = torch.cat([x.max(1, keepdim=True)[0], x.mean(1, keepdim=True)], 1)
        return self.head(pooled(self.last(x * torch.sigmoid(self.gate(summary)))))


@case(1, images())
class PlacesOfTheMaximum(MaximumOverChannels):
    """The same, but the positions of the maximum are looked at."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        place = x.max(1, keepdim=True)[1].to(x.dtype)
        return self.head(pooled(self.last(x * torch.sigmoid(self.gate(torch.cat([place, place], 1))))))


@case(2, vectors(16))
class Maxout(nn.Module):
    """The largest of four, which may become the largest of three."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(16, 32), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(F.relu(self.into(x)).view(x.shape[0], 8, 4).amax(-1))
