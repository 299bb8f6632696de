"""Networks over sequences: attention, recurrence, and weights that are computed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.network_cases import case, conv, images, pooled, tokens, vectors

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
