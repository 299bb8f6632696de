"""Networks to train: the seed residual network, and torchvision's classification models by name."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from fxwidth.errors import FxwidthError

SEED_RESNET = "seed-resnet"

# (inner, out) channels of each residual block, by stage; a 2x2 max pooling stands between two stages.
_STAGES = (((7, 24), (48, 72)), ((100, 120), (140, 160)), ((180, 200), (200, 200)))


class TiledResidualBlock(nn.Module):
    """conv3x3 - leaky ReLU 0.2 - conv3x3, added to the input tiled along channels and cut to `out_channels`.

    Shapes: (N, in_channels, H, W) -> (N, out_channels, H, W).
    """

    def __init__(self, in_channels: int, inner_channels: int, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.copies = math.ceil(out_channels / in_channels)
        self.conv1 = nn.Conv2d(in_channels, inner_channels, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(inner_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for x."""
        residual = self.conv2(F.leaky_relu(self.conv1(x), negative_slope=0.2))
        shortcut = x.repeat(1, self.copies, 1, 1)[:, : self.out_channels]
        output: Tensor = residual + shortcut
        return output


def seed_resnet(in_channels: int = 1, num_classes: int = 10, image_size: int = 28) -> nn.Sequential:
    """Return the residual network that evolution starts from: 1,971,308 parameters at 28x28 with one input channel.

    Shapes: (N, in_channels, image_size, image_size) -> (N, num_classes).

    Raises:
        FxwidthError: the image is too small for two 2x2 max poolings.
    """
    poolings = len(_STAGES) - 1
    final_size = image_size // 2**poolings
    if final_size == 0:
        raise FxwidthError(
            f"{SEED_RESNET} halves its images {poolings} times: an image size of {image_size} is too small, "
            f"it must be {2**poolings} or more"
        )
    layers: list[nn.Module] = []
    channels = in_channels
    for stage in _STAGES:
        if layers:
            layers.append(nn.MaxPool2d(2))
        for inner_channels, out_channels in stage:
            layers.append(TiledResidualBlock(channels, inner_channels, out_channels))
            channels = out_channels
    layers += [nn.Flatten(), nn.Linear(channels * final_size**2, num_classes)]
    return nn.Sequential(*layers)


def build_network(name: str, *, in_channels: int, num_classes: int, image_size: int) -> nn.Module:
    """Return a network by name with random weights: `seed-resnet` or a torchvision classification model.

    torchvision's models take three channels; grey images are to be repeated (`input_channels` says so).

    Raises:
        FxwidthError: no model has this name, or it cannot be built for these images.
    """
    if name == SEED_RESNET:
        return seed_resnet(in_channels, num_classes, image_size)
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        raise FxwidthError(f"no model {name!r}: choose {SEED_RESNET!r} or one of torchvision's: {', '.join(names)}")
    options: dict[str, object] = {}
    if name in ("googlenet", "inception_v3"):
        # Auxiliary heads change the type of the output in training; init_weights spares a deprecation warning.
        options = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        options = {"image_size": image_size}
    elif name.startswith("maxvit"):
        options = {"input_size": (image_size, image_size)}
    try:
        network: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **options)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise FxwidthError(
            f"torchvision cannot build {name!r} for {image_size}x{image_size} images ({error}); try another image size"
        ) from error
    return network


def input_channels(name: str, image_channels: int) -> int:
    """Return the channels that network `name` is fed with for images of `image_channels` channels."""
    return image_channels if name == SEED_RESNET else 3
