"""Models of the field in sizes that tests can afford, with everything set away from its default values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.swin_transformer import SwinTransformer

from fxwidth.training.networks import seed_resnet


def set_apart(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give biases, gains and statistics random values: with fresh ones a wrong index map does not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or tensor.dim() > 1:
                continue
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
            tensor.copy_(0.5 + noise if "weight" in name or "var" in name else noise - 0.5)
    return model


def _torchvision(name: str) -> nn.Module:
    # Its auxiliary heads are for training alone, so that a graph of evaluation would be another network.
    extra = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=10, **extra)
    return model


def _vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=10
    )


def _swin() -> nn.Module:
    return SwinTransformer(
        patch_size=[4, 4], embed_dim=12, depths=[2, 2], num_heads=[3, 6], window_size=[4, 4], num_classes=10
    )


def _convnext() -> nn.Module:
    blocks = [CNBlockConfig(12, 24, 2), CNBlockConfig(24, None, 1)]
    return ConvNeXt(blocks, num_classes=10)


class RMSTransformer(nn.Module):
    """A pre-norm transformer block with RMS norms, a gated MLP and separate projections."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(10, width)
        self.norm_1, self.norm_2, self.norm_3 = nn.RMSNorm(width), nn.RMSNorm(width, eps=1e-3), nn.RMSNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.gate, self.up, self.down = nn.Linear(width, 40), nn.Linear(width, 40), nn.Linear(40, width)
        self.head = nn.Linear(width, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        batch, length, _ = x.shape
        y = self.norm_1(x)
        q, k, v = (p(y).view(batch, length, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, -1)
        x = x + self.out(y)
        y = self.norm_2(x)
        x = x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return self.head(self.norm_3(x))


def _image(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


Case = tuple[Callable[[], nn.Module], Callable[[], Tensor]]

SMALL: dict[str, Case] = {
    "seed_resnet": (partial(seed_resnet, image_size=8), lambda: _image(8)[:, :1]),
    "resnet18": (partial(_torchvision, "resnet18"), lambda: _image(40)),
    "squeezenet1_1": (partial(_torchvision, "squeezenet1_1"), lambda: _image(40)),
    "vit": (_vit, lambda: _image(32)),
    "swin": (_swin, lambda: _image(32)),
    "convnext": (_convnext, lambda: _image(32)),
    "rms_transformer": (RMSTransformer, lambda: torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(1))),
}

FULL_SIZE: dict[str, Case] = {
    **{
        name: (partial(_torchvision, name), lambda: _image(64))
        for name in ("resnext50_32x4d", "densenet121", "googlenet", "efficientnet_b0", "swin_t", "convnext_tiny")
        + ("mobilenet_v2", "shufflenet_v2_x1_0")
    },
    "vgg11_bn": (partial(_torchvision, "vgg11_bn"), lambda: _image(32)),
    "vit_b_16": (partial(_torchvision, "vit_b_16"), lambda: _image(224)),
}


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """Return a model of the zoo in eval mode and an input for it."""
    make, example = {**SMALL, **FULL_SIZE}[name]
    torch.manual_seed(0)
    return set_apart(make()).to(dtype).eval(), example().to(dtype)


def relative_difference(new: Tensor, old: Tensor) -> float:
    """Return the largest difference relative to the largest magnitude."""
    new, old = new.detach().double(), old.detach().double()
    return float((new - old).abs().max() / old.abs().max())
