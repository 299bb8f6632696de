"""Networks trained on MNIST, the same for every benchmark that shrinks trained networks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxwidth.training.datasets import load_dataset
from fxwidth.training.networks import seed_resnet


class Block(nn.Module):
    """conv - batch norm - ReLU - conv - batch norm, added to the input or its projection."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        projection = [nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out)] if into != out else []
        self.shortcut = nn.Sequential(*projection)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = F.relu(self.norm1(self.conv1(x)))
        output: Tensor = F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))
        return output


def residual_cnn() -> nn.Module:
    """Return a residual network with batch norm: three stages of two blocks, 16, 32 and 64 channels."""
    stem = [nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    shapes = [(16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*stem, *(Block(*shape) for shape in shapes), *head)


def batch_norm_mlp(*hidden: int) -> nn.Module:
    """Return a network of linear layers with batch norm, of so many hidden channels each."""
    layers: list[nn.Module] = [nn.Flatten()]
    for into, out in itertools.pairwise((784, *hidden)):
        layers += [nn.Linear(into, out), nn.BatchNorm1d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], 10))


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and an MLP."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, (N, tokens, width) as the input."""
        y = self.norm1(x)
        q, k, v = (p(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        output: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return output


class SmallViT(nn.Module):
    """A vision transformer over patches of 7 x 7 pixels, 3 blocks of width 64."""

    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, 7)
        self.positions = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(width, 4, 2 * width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (N, 1, 28, 28) -> (N, 10)."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return logits


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "residual-cnn": residual_cnn,
    "batch-norm-mlp": partial(batch_norm_mlp, 256, 256, 128),
    "deep-mlp": partial(batch_norm_mlp, *[256] * 6),
    "seed-resnet": seed_resnet,
    "small-vit": SmallViT,
}
_BATCH = 128
# Epochs over the training images, and the learning rate at the peak of its one cycle.
_SCHEDULES = {
    "residual-cnn": (3, 3e-3),
    "batch-norm-mlp": (6, 3e-3),
    "deep-mlp": (6, 3e-3),
    "seed-resnet": (1, 1e-3),
    "small-vit": (6, 2e-3),
}


@dataclass(frozen=True, eq=False)
class Images:
    """Normalised images and their labels."""

    images: Tensor
    labels: Tensor

    def first(self, count: int) -> Images:
        """Return the first so many."""
        return Images(self.images[:count], self.labels[:count])


def load_images(data: Path) -> tuple[Images, Images]:
    """Return MNIST's training and test images from the files under a folder."""
    found = load_dataset("mnist", data)
    assert found.test is not None
    return tuple(Images(found.normalize(part.images), part.labels) for part in (found.train, found.test))  # type: ignore[return-value]


def trained(name: str, train: Images, folder: Path, seed: int = 0) -> nn.Module:
    """Return a network in eval mode, trained on the images; it is kept in a folder and trained only once."""
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    file = folder / f"{name}-{seed}.pt"
    if file.exists():
        model.load_state_dict(torch.load(file))
        return model.eval()
    epochs, rate = _SCHEDULES[name]
    train_epochs(model, train, epochs, rate)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), file)
    return model.eval()


def train_epochs(
    model: nn.Module, train: Images, epochs: int, rate: float, *, tunes: bool = False, mixed: bool = False
) -> None:
    """Train a model in place, over one cycle of the learning rate with its peak at `rate`.

    Args:
        model: the model; its parameters stay in float32.
        train: what it is trained on.
        epochs: how often it sees them.
        rate: the learning rate at its peak.
        tunes: whether it is trained already: gradients longer than one are cut to that, since one large step, as a
            network without norms may take, would undo it.
        mixed: whether convolutions and matrix products are computed in bfloat16.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    batches = len(train.images) // _BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * batches)
    model.train()
    # The layout in which bfloat16 convolutions are quickest.
    layout = torch.channels_last if mixed else torch.contiguous_format
    for _ in range(epochs):
        for index in torch.randperm(len(train.images))[: batches * _BATCH].view(batches, _BATCH):
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                logits = model(train.images[index].contiguous(memory_format=layout))
            loss = F.cross_entropy(logits.float(), train.labels[index])
            optimizer.zero_grad()
            loss.backward()
            if tunes:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


@torch.no_grad()
def loss_and_accuracy(model: nn.Module, test: Images) -> tuple[float, float]:
    """Return the mean cross entropy and the share of right answers."""
    logits = torch.cat([model(part) for part in test.images.split(500)])
    right = (logits.argmax(1) == test.labels).float().mean()
    return float(F.cross_entropy(logits, test.labels)), float(right)
