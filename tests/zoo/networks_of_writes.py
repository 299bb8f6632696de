"""Networks that write to parts of tensors, and networks whose weights are made from parameters or from their input."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.network_cases import case, images, tokens, vectors


class Written(nn.Module):
    """Two layers with a write to some channels in between."""

    def __init__(self, inputs: int = 10) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(inputs, 16), nn.Linear(16, 3)

    def write(self, h: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.write(torch.sin(self.into(x))))


@case(2, vectors())
class PartIsSet(Written):
    def write(self, h: Tensor) -> Tensor:
        h[:, :4] = h[:, 4:8] * 2
        return h


@case(2, vectors())
class PartIsSetByMethod(Written):
    def write(self, h: Tensor) -> Tensor:
        h.__setitem__((slice(None), slice(0, 4)), h[:, 4:8] * 2)
        return h


@case(2, vectors())
class PartIsCopied(Written):
    def write(self, h: Tensor) -> Tensor:
        h[:, :4].copy_(h[:, 4:8] * 2)
        return h


@case(2, vectors())
class PartIsZeroed(Written):
    def write(self, h: Tensor) -> Tensor:
        h[:, :4] = 0
        return h


@case(1, vectors())
class PartIsAddedTo(Written):
    def write(self, h: Tensor) -> Tensor:
        h[:, :8].add_(h[:, 8:])
        h[:, 8:].mul_(2)
        return h


@case(3, tokens(), 16)
class ShiftedIntoBuffer(Written):
    """Temporal shift: two parts of the channels are taken from the token after and before, written to a new tensor."""

    def write(self, h: Tensor) -> Tensor:
        out, part = torch.zeros_like(h), h.shape[2] // 8
        out[:, :-1, :part] = h[:, 1:, :part]
        out[:, 1:, part : 2 * part] = h[:, :-1, part : 2 * part]
        out[:, :, 2 * part :] = h[:, :, 2 * part :]
        return out


@case(0, vectors(width=8, batch=4))
class TransposedByStrides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(8, 16), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.into(x))
        return self.out(h.as_strided((x.shape[0], 4, 4), (16, 1, 4)))


@case(3, vectors(width=6))
class MadeByLayer(nn.Module):
    """A linear layer whose weight another layer makes of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.maker, self.out = nn.Linear(6, 8), nn.Linear(3, 40), nn.Linear(5, 3)
        self.latent = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.linear(torch.relu(self.into(x)), self.maker(self.latent).view(5, 8)))


@case(2, tokens(8))
class TableThroughLayer(nn.Module):
    """Attention whose keys of positions are made of a table by the layer that makes the others."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.out, self.table = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.randn(1, 5, 8))

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), 5, 4, 2).permute(0, 2, 1, 3).reshape(-1, 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        key, places = self.split(self.key(x)), self.split(self.key(self.table)).repeat(x.size(0), 1, 1)
        y = torch.bmm(torch.softmax(torch.bmm(key, places.transpose(1, 2)), -1), key)
        return self.out(y.view(x.size(0), 4, 5, 2).permute(0, 2, 1, 3).reshape(x.size(0), 5, 8))


@case(2, images(size=6))
class WeightsOfEachSample(nn.Module):
    """A convolution with weights scaled for each sample, all samples as the groups of one."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.style = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 8)
        self.weight, self.out = nn.Parameter(torch.randn(1, 6, 8, 3, 3)), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.into(x))
        batch, channels, height, width = h.shape
        weight = self.weight * self.style(h.mean((2, 3))).view(batch, 1, channels, 1, 1)
        signal = h.reshape(1, batch * channels, height, width)
        y = F.conv2d(signal, weight.view(-1, channels, 3, 3), padding=1, groups=batch)
        return self.out(y.view(batch, -1, height, width))
