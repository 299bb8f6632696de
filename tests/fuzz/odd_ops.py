"""More ops of random networks: writes to parts of tensors, views by strides, sizes of the batch, computed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.fuzz.ops import POSITIONS, Choices, Numbers, Op, Proposed, divisor, kept, new_width


def _two_parts(choose: Choices, width: int, other: int) -> Proposed:
    """Draw two parts of the channels of one size that have none in common, in any order."""
    if width < 4:
        return None
    size = choose.between(1, width // 2)
    first = choose.between(0, width - 2 * size)
    second = choose.between(first + size, width - size)
    return (*choose.one_of([(first, second), (second, first)]), size), (width,)


def _part(choose: Choices, width: int, other: int) -> Proposed:
    if width < 3:
        return None
    start = choose.between(0, width - 2)
    return (start, choose.between(1, width - 1 - start)), (width,)


def _taken(choose: Choices, width: int, other: int) -> Proposed:
    found = _part(choose, width, other)
    return None if found is None else (found[0], (found[0][1],))


def _grouped(choose: Choices, width: int, other: int) -> Proposed:
    groups = divisor(choose, width)
    return None if groups is None else ((groups,), (width,))


def _same_by_strides(layer: Any, n: Numbers, x: Tensor, y: Tensor) -> Tensor:
    x = x.contiguous()
    return torch.tanh(x).as_strided(x.shape, x.stride())


def _transposed_by_strides(layer: Any, n: Numbers, x: Tensor, y: Tensor) -> Tensor:
    channels = x.shape[1]
    return x.contiguous().as_strided((x.shape[0], channels, POSITIONS), (channels * POSITIONS, 1, channels))


def _part_by_strides(layer: Any, n: Numbers, x: Tensor, y: Tensor) -> Tensor:
    strides = (x.shape[1] * POSITIONS, POSITIONS, 1)
    return x.contiguous().as_strided((x.shape[0], n[1], POSITIONS), strides, n[0] * POSITIONS)


def _behind_part_by_strides(layer: Any, n: Numbers, x: Tensor, y: Tensor) -> Tensor:
    """A view by strides of a view: it shows what is in memory, also what the view does not."""
    x = torch.tanh(x.contiguous())
    return x[:, : n[1]].as_strided((x.shape[0], x.shape[1], POSITIONS), (x.shape[1] * POSITIONS, POSITIONS, 1))


def _copied_part(layer: Any, n: Numbers, x: Tensor, y: Tensor) -> Tensor:
    x = torch.sin(x)
    x.narrow(1, n[0], n[2]).copy_(x.narrow(1, n[1], n[2]) * 2)
    return x


def _added_part(layer: Any, n: Numbers, x: Tensor, y: Tensor) -> Tensor:
    x = torch.sin(x)
    x[:, n[0] : n[0] + n[2]].add_(x[:, n[1] : n[1] + n[2]]).mul_(2)
    return x


def _set_part_by_method(layer: Any, n: Numbers, x: Tensor, y: Tensor) -> Tensor:
    x = torch.sin(x)
    x.__setitem__((slice(None), slice(n[0], n[0] + n[2])), x[:, n[1] : n[1] + n[2]] * 2)
    return x


def _filled_part(layer: Any, n: Numbers, x: Tensor, y: Tensor) -> Tensor:
    x = torch.sin(x)
    x[:, n[0] : n[0] + n[1]].fill_(0.5)
    return x


def _shifted(layer: Any, n: Numbers, x: Tensor, y: Tensor) -> Tensor:
    """Temporal shift: some channels come from the position before, the others stay."""
    result = torch.zeros_like(x)
    result[:, : n[0], 1:].copy_(x[:, : n[0], :-1])
    result[:, n[0] :].copy_(x[:, n[0] :])
    return result


def _samples_of_parts(layer: Any, n: Numbers, x: Tensor, y: Tensor) -> Tensor:
    batch = x.shape[0]
    return torch.tanh(x.reshape(batch * n[0], x.shape[1] // n[0], POSITIONS)).view(batch, -1, POSITIONS)


def _samples_of_channels(layer: Any, n: Numbers, x: Tensor, y: Tensor) -> Tensor:
    return torch.tanh(x.reshape(x.shape[0] * x.shape[1], POSITIONS)).view(x.shape[0], x.shape[1], POSITIONS)


def _expanded(layer: Any, n: Numbers, x: Tensor, y: Tensor) -> Tensor:
    return x + layer[0].expand(x.shape[0], -1, POSITIONS)


def _samples_as_groups(layer: Any, n: Numbers, x: Tensor, y: Tensor) -> Tensor:
    batch = x.shape[0]
    weight = layer.weight.repeat(batch, 1, 1)
    return F.conv1d(x.reshape(1, -1, POSITIONS), weight, groups=batch).view(batch, -1, POSITIONS)


class Hypernetwork(nn.Module):
    """A linear layer whose weight a small layer makes of a parameter."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.code, self.maker = nn.Parameter(torch.randn(3)), nn.Linear(3, inputs * outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.transpose(1, 2), self.maker(self.code).view(self.outputs, self.inputs)).transpose(1, 2)


class Standardised(nn.Conv1d):
    """A convolution whose weights have mean zero and variance one in each output channel."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2), keepdim=True)
        weight = weight / (weight.square().mean((1, 2), keepdim=True) + 1e-5).sqrt()
        return F.conv1d(x, weight, self.bias, padding=1)


class Modulated(nn.Module):
    """A convolution whose weights are scaled for each sample by what the sample shows, all samples as one of groups.

    Source: T. Karras et al., Analyzing and Improving the Image Quality of StyleGAN (2020).
    """

    def __init__(self, inputs: int, outputs: int, demodulates: bool) -> None:
        super().__init__()
        self.style, self.demodulates = nn.Linear(inputs, inputs), demodulates
        self.weight = nn.Parameter(torch.randn(1, outputs, inputs, 3))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels = x.shape[0], x.shape[1]
        weight = self.weight * self.style(x.mean(2)).view(batch, 1, channels, 1)
        if self.demodulates:
            weight = weight * torch.rsqrt(weight.square().sum((2, 3), keepdim=True) + 1e-5)
        weight = weight.view(-1, channels, 3)
        signal = x.reshape(1, batch * channels, POSITIONS)
        return F.conv1d(signal, weight, padding=1, groups=batch).view(batch, -1, POSITIONS)


def _modulated(choose: Choices, width: int, other: int) -> Proposed:
    new = choose.one_of([6, 8, 12])
    return (new, choose.between(0, 1)), (new,)


def _messages(layer: Any, n: Numbers, x: Tensor, y: Tensor) -> Tensor:
    """Positions send to others what they hold; n tells how far, and how what arrives is put together."""
    sent = torch.tanh(x).transpose(1, 2)
    index = (torch.arange(POSITIONS) + n[0]) % (POSITIONS - 1)
    if n[1] == 0:
        return torch.zeros_like(sent).index_add(1, index, sent).transpose(1, 2)
    wide = index.view(1, -1, 1).expand_as(sent)
    if n[1] == 1:
        return torch.zeros_like(sent).scatter_add_(1, wide, sent).transpose(1, 2)
    return sent.scatter_reduce(1, wide, sent * 2, "amax").transpose(1, 2)


def _drawn_messages(choose: Choices, width: int, other: int) -> Proposed:
    return (choose.between(0, 2), choose.between(0, 2)), (width,)


def _frequencies(layer: Any, n: Numbers, x: Tensor, y: Tensor) -> Tensor:
    spectrum = torch.fft.rfft(x, dim=2)
    return torch.fft.irfft(spectrum * torch.tensor([1.0, 0.5, 2.0], dtype=x.dtype), n=POSITIONS, dim=2)


def _set_at_places(layer: Any, n: Numbers, x: Tensor, y: Tensor) -> Tensor:
    """A number is written under a mask of positions, the same for all samples."""
    mask = torch.arange(POSITIONS) != n[0]
    x = torch.sin(x)
    x.__setitem__((slice(None), slice(None), mask), 0.5 * n[0])
    return x


def applied(layer: Any, n: Numbers, x: Tensor, y: Tensor) -> Tensor:
    return layer(x)


ODD_OPS: dict[str, Op] = {
    "same by strides": Op(kept, _same_by_strides),
    "transposed by strides": Op(kept, _transposed_by_strides),
    "part by strides": Op(_taken, _part_by_strides),
    "behind part by strides": Op(_part, _behind_part_by_strides),
    "copied part": Op(_two_parts, _copied_part),
    "added part": Op(_two_parts, _added_part),
    "set part by method": Op(_two_parts, _set_part_by_method),
    "filled part": Op(_part, _filled_part),
    "shifted": Op(_part, _shifted),
    "samples of parts": Op(_grouped, _samples_of_parts),
    "samples of channels": Op(kept, _samples_of_channels),
    "messages": Op(_drawn_messages, _messages),
    "frequencies": Op(kept, _frequencies),
    "set at places": Op(lambda choose, width, other: ((choose.between(0, 2),), (width,)), _set_at_places),
    "expanded": Op(kept, _expanded, lambda w, n: nn.ParameterList([nn.Parameter(torch.randn(w, 1))])),
    "samples as groups": Op(new_width, _samples_as_groups, lambda w, n: nn.Conv1d(w, n[0], 1, bias=False)),
    "hypernetwork": Op(new_width, applied, lambda w, n: Hypernetwork(w, n[0])),
    "standardised conv": Op(new_width, applied, lambda w, n: Standardised(w, n[0], 3, padding=1)),
    "modulated conv": Op(_modulated, applied, lambda w, n: Modulated(w, n[0], bool(n[1]))),
}
