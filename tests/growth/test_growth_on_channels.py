"""Ops on channels between a convolution and a classifier: which recipe each leaves, and that it is true."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxwidth.axes.factors import Axis
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.growth.call_view import AxisFacts
from fxwidth.growth.transfers import FAMILY_TRANSFERS
from fxwidth.rules.op_families import Positions
from tests.oracles.growth import check_all, check_refusals, recipes, sequence, width_graph
from tests.zoo.networks_of_channels import ShuffledGroups


class Images(nn.Module):
    """A convolution, something on its channels, and a classifier."""

    def __init__(self, body: nn.Module, out: int = 8) -> None:
        super().__init__()
        self.write, self.body = nn.Conv2d(3, 8, 3, padding=1), body
        self.read = nn.Linear(out, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.body(self.write(x)).mean((2, 3)))


class SqueezeExcitation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class OverChannels(nn.Module):
    """Adds a reduction over the channels to each of them."""

    def __init__(self, reduction: str, activation: nn.Module) -> None:
        super().__init__()
        self.reduction, self.activation = reduction, activation

    def forward(self, x: Tensor) -> Tensor:
        return x + getattr(torch, self.reduction)(self.activation(x), dim=1, keepdim=True)


class FrozenBatchNorm(nn.Module):
    """A batch norm by hand, its statistics being buffers."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


class InPlace(nn.Module):
    """Writes into a part of what it made."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, :, :2] = x[:, :, :2]
        y[:, :, 2:].add_(x[:, :, 2:].sigmoid())
        return y.mul_(2)


class DepthwiseOfVector(nn.Module):
    """A depthwise convolution whose weights, one per channel, are a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.view(-1, 1, 1, 1), groups=x.shape[1])


class Padded(nn.Module):
    """A parameter-free shortcut into more channels."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 3))


class Adapted(nn.Module):
    """A layer whose weight is a sum of itself and a product of two small ones."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.a, self.b = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.linear(x, self.layer.weight + self.b @ self.a, self.layer.bias).permute(0, 3, 1, 2)


BODIES = {
    "squeeze_excitation": (SqueezeExcitation(), 8, {"FREE"}),
    "group_norm": (nn.GroupNorm(4, 8), 8, {"FREE", "inexact"}),
    "instance_norm": (nn.InstanceNorm2d(8, affine=True), 8, {"FREE"}),
    "mean_of_linear": (OverChannels("mean", nn.Identity()), 8, {"MEAN"}),
    "mean_of_sigmoid": (OverChannels("mean", nn.Sigmoid()), 8, {"inexact"}),
    "sum_of_relu": (OverChannels("sum", nn.ReLU()), 8, {"ZERO"}),
    "sum_of_sigmoid": (OverChannels("sum", nn.Sigmoid()), 8, {"inexact"}),
    "maximum": (OverChannels("amax", nn.Identity()), 8, {"MEAN"}),
    "variance": (OverChannels("var", nn.Identity()), 8, {"inexact"}),
    "softmax": (nn.Softmax(dim=1), 8, {"inexact"}),
    "prelu": (nn.PReLU(8), 8, {"FREE"}),
    "depthwise": (nn.Conv2d(8, 16, 3, groups=8), 16, {"FREE"}),
    "depthwise_of_a_vector": (DepthwiseOfVector(), 8, {"FREE"}),
    "grouped": (nn.Conv2d(8, 12, 3, groups=2), 12, {"FREE"}),
    "transposed": (nn.ConvTranspose2d(8, 12, 3, groups=2), 12, {"FREE"}),
    "frozen_batch_norm": (FrozenBatchNorm(), 8, {"FREE"}),
    "in_place": (InPlace(), 8, {"FREE"}),
    "padded": (Padded(), 13, {"FREE"}),
    "gated": (nn.GLU(dim=1), 4, {"FREE"}),
    "adapted": (Adapted(), 8, {"FREE"}),
    "weight_norm": (nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)), 8, {"FREE"}),
    "shuffled": (nn.ChannelShuffle(2), 8, {"FREE"}),
    "pixel_shuffle": (nn.PixelShuffle(2), 2, {"FREE"}),
}


@pytest.mark.parametrize("name", BODIES)
def test_ops_on_channels(name: str) -> None:
    body, out, expected = BODIES[name]
    x = sequence(2, 3, 6, 6)
    wg = width_graph(Images(body, out), x)
    assert set(recipes(wg).values()) == expected, [(group.name, group.inexact_growth) for group in wg.free]
    check_all(wg, x)
    check_refusals(wg, x)


def test_groups_of_a_group_norm_grow_and_channels_within_do_not() -> None:
    x = sequence(2, 3, 6, 6)
    wg = width_graph(Images(nn.GroupNorm(4, 8)), x)
    assert {group.width: group.inexact_growth is None for group in wg.free} == {4: True, 2: False}


def test_channels_that_are_groups_to_one_convolution_and_read_within_groups_by_another() -> None:
    x = sequence(2, 3, 6, 6)
    wg = width_graph(ShuffledGroups(), x)
    assert any(AxisFacts(group.factor, wg.analysis.space).repeats(axis) for group in wg.free for axis in axes_of(wg))
    assert set(recipes(wg).values()) == {"FREE"}
    check_all(wg, x)


def axes_of(wg: WidthGraph) -> list[Axis]:
    return [axis for call in wg.analysis.calls for axes in call.output_axes for axis in axes]


def test_an_unknown_op_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FAMILY_TRANSFERS, Positions)
    wg = width_graph(Images(nn.MaxPool2d(2)), sequence(2, 3, 6, 6))
    assert wg["write"].inexact_growth == (
        "how new channels pass it is not known (max_pool2d_with_indices at node body)"
    )
