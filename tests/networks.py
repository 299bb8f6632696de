"""Networks that are hard to resize, as small as they go, with how many groups of channels must be free in each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Case:
    """A network, its example inputs, and the number of free groups that a careful reader finds in it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], list[Tensor]]
    free: int


CASES: dict[str, Case] = {}


def case(free: int, inputs: Callable[[], list[Tensor]], *arguments: Any) -> Callable[[type], type]:
    """Register a network class."""

    def register(network: type) -> type:
        CASES[network.__name__] = Case(lambda: network(*arguments), inputs, free)
        return network

    return register


def images(channels: int = 3, size: int = 14, batch: int = 2) -> Callable[[], list[Tensor]]:
    return lambda: [torch.randn(batch, channels, size, size)]


def vectors(width: int = 10, batch: int = 3) -> Callable[[], list[Tensor]]:
    return lambda: [torch.randn(batch, width)]


def tokens(width: int = 16, length: int = 5, batch: int = 2) -> Callable[[], list[Tensor]]:
    return lambda: [torch.randn(batch, length, width)]


def words(vocabulary: int = 30, length: int = 5, batch: int = 2) -> Callable[[], list[Tensor]]:
    return lambda: [torch.randint(vocabulary, (batch, length))]


def conv(into: int, out: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(into, out, size, padding=size // 2, **options)


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


# -- shortcuts --


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


@case(2, vectors(16))
class Maxout(nn.Module):
    """The largest of four, which may become the largest of three."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(16, 32), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(F.relu(self.into(x)).view(x.shape[0], 8, 4).amax(-1))


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


# -- attention --


@case(5, images(size=16))
class FusedAttention(nn.Module):
    """Fused q, k and v from sizes read at run time, `C // heads`, and scales that are computed from widths."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.patches, self.grouped = heads, nn.Conv2d(3, width, 4, 4), conv(width, width, groups=8)
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        x = (x + self.grouped(x)) / x.shape[1] ** 0.5
        x = x.flatten(2).transpose(1, 2)
        batch, count, width = x.shape
        split = self.qkv(self.norm(x)).reshape(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = split[0], split[1], split[2]
        weights = (query @ key.transpose(-2, -1) * (width // self.heads) ** -0.5).softmax(-1)
        x = x + self.out((weights @ value).transpose(1, 2).reshape(batch, count, width))
        halves = x.reshape(batch * count, -1)[:, : width // 2].view(batch, count, width // 2)
        return self.head(torch.cat([halves, x[..., width // 2 :]], -1).mean(1))


@case(4, tokens())
class GroupedQueryAttention(nn.Module):
    """Keys and values repeated for several query heads each."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query = self.q(x).view(batch, length, 8, 4).transpose(1, 2)
        key = self.k(x).view(batch, length, 4, 4).transpose(1, 2).repeat_interleave(2, 1)
        value = self.v(x).view(batch, length, 4, 4).transpose(1, 2).repeat_interleave(2, 1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).reshape(batch, length, 32))


@case(2, tokens(20))
class RotaryHalves(nn.Module):
    """Rotary positions on halves of each head: the two halves keep the same places."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(20, 64), nn.Linear(64, 7)
        self.register_buffer("cosine", torch.randn(5, 16))

    def forward(self, x: Tensor) -> Tensor:
        query = self.layer(x).view(x.shape[0], 5, 4, 16).transpose(1, 2)
        low, high = query.chunk(2, -1)
        turned = query * self.cosine + torch.cat([-high, low], -1)
        return self.head(turned.transpose(1, 2).flatten(2))


@case(1, tokens(20))
class RotaryPairs(nn.Module):
    """Rotary positions on neighbours: pairs stay together."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(20, 64), nn.Linear(64, 7)

    def forward(self, x: Tensor) -> Tensor:
        query = self.layer(x)
        return self.head(query + torch.stack([-query[..., 1::2], query[..., ::2]], -1).flatten(-2))


@case(3, tokens())
class SelfAttention(nn.Module):
    """nn.MultiheadAttention, whose embedding is as wide as the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(16, 24), nn.Linear(24, 7)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        return self.head(x + self.attention(x, x, x)[0])


@case(7, tokens())
class Encoder(nn.Module):
    """nn.TransformerEncoder, two layers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(24, 4, 40, 0.0, batch_first=True, norm_first=True)
        self.into, self.head = nn.Linear(16, 24), nn.Linear(24, 7)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.into(x)))


@case(6, tokens())
class Decoder(nn.Module):
    """nn.TransformerDecoder: attention to itself and to a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.memory, self.head = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 7)
        self.decoder = nn.TransformerDecoderLayer(24, 4, 40, 0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decoder(self.into(x), self.memory(x)))


# -- parametrisations, recurrence --


@case(2, vectors(16))
class NormedWeights(nn.Module):
    """Weight norm and spectral norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(16, 32))
        self.second = nn.utils.parametrizations.spectral_norm(nn.Linear(32, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


@case(2, images())
class StandardisedWeights(nn.Module):
    """Weight standardisation by batch norm over the weight, as in normaliser-free networks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = conv(3, 8), conv(8, 12), nn.Linear(12, 5)
        self.gains = nn.ParameterList([nn.Parameter(torch.randn(1, n)) for n in (8, 12)])

    def forward(self, x: Tensor) -> Tensor:
        for layer, gain in zip((self.first, self.second), self.gains, strict=True):
            flat = layer.weight.reshape(1, layer.weight.shape[0], -1)
            weight = F.batch_norm(flat, None, None, weight=gain.view(-1), training=True).reshape(layer.weight.shape)
            x = F.gelu(F.conv2d(x, weight, layer.bias, padding=1))
        return self.head(pooled(x))


@case(1, tokens())
class Recurrent(nn.Module):
    """A two-layer LSTM: one tensor of zeros is the first state of both layers, so that they are equally wide."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(16, 12, 2, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])
