"""Convolutions whose kernels are computed from activations, for a learnt image too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxwidth


class Generator(nn.Module):
    """A style modulates and demodulates a kernel, which goes over a learnt image."""

    def __init__(self) -> None:
        super().__init__()
        self.mapping, self.style = nn.Linear(5, 8), nn.Linear(8, 6)
        self.image = nn.Parameter(torch.randn(1, 6, 4, 4))
        self.kernel = nn.Parameter(torch.randn(7, 6, 3, 3))
        self.to_rgb = nn.Conv2d(7, 3, 1)

    def forward(self, z: Tensor) -> Tensor:
        style = self.style(F.leaky_relu(self.mapping(z), 0.2)) + 1
        kernels = self.kernel[None] * style[:, None, :, None, None]
        kernels = kernels * torch.rsqrt(kernels.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        images = self.image.expand(z.shape[0], -1, -1, -1).reshape(1, -1, 4, 4)
        made = F.conv2d(images, kernels.reshape(-1, *kernels.shape[2:]), padding=1, groups=z.shape[0])
        return self.to_rgb(F.leaky_relu(made.view(z.shape[0], -1, 4, 4), 0.2))


@pytest.mark.parametrize(
    "data", [None, [torch.randn(8, 5, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]]
)
def test_a_kernel_for_a_learnt_image(data: Any) -> None:
    torch.manual_seed(0)
    model, z = Generator().eval(), torch.randn(4, 5)
    for name in ("mapping", "style", "kernel"):
        gm = fxwidth.trace(model, z)
        width_graph = fxwidth.analyze(gm)
        group = next(group for group in width_graph.free if group.name.startswith(name))
        assert fxwidth.spectrum(width_graph, data=data)
        assert fxwidth.plan(width_graph, params=0.5, data=data)
        before = gm(z)
        fxwidth.resize(gm, {group.name: group.width // 2}, data=data)
        after = gm(torch.cat([z, z[:1]]))
        assert after.isfinite().all()
        torch.testing.assert_close(after[:4], gm(z))
        assert not torch.equal(after[:4], before)
