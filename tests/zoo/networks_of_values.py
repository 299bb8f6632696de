"""Networks whose code looks at values: only one run tells what they do next."""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator

WIDTH, HIDDEN, OUT = 6, 10, 3


class Positive(nn.Module):
    """Chooses rows by their values, and computes on these; no tracer can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.norm = nn.GroupNorm(2, 2 * HIDDEN)

    def forward(self, x: Tensor) -> list[Tensor]:
        rows = torch.where(x.sum(1) > 0)[0]
        if len(rows) == 0:
            return [self.norm(self.mix(x)).mean(1)]
        return [self.norm(self.mix(x[rows])).relu(), x[x[:, 0] > 0]]


class WithPart(nn.Module):
    """All but one part of it can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.part, self.down = nn.Linear(WIDTH, HIDDEN), Positive(), nn.Linear(2 * HIDDEN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.part(torch.relu(self.up(x)))[0])


class OnValue(nn.Module):
    """Branches on a number: what comes behind may never come for other inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(WIDTH, WIDTH + 1)
        self.up, self.down = nn.Linear(WIDTH + 1, HIDDEN), nn.Linear(HIDDEN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x)
        return self.down(self.up(h)) if h.norm() > 0 else h[:, :OUT]


class Three(nn.Module):
    """Three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, HIDDEN + 2)
        self.down = nn.Linear(HIDDEN + 2, OUT)


class WrittenIn(Three):
    """A width is a literal of code that cannot be taken apart; another is not."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.mid(self.up(x).relu()).reshape(-1, HIDDEN + 2)
        rows = torch.nonzero(h.sum(1) > 0.0)[:, 0]
        return self.down(h) if len(rows) == 0 else self.down(h)[rows]


class Seldom(Three):
    """Finds nothing in ordinary inputs, and has layers for what it finds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.up(x)
        rows = torch.where(h.sum(1) > 1e9)[0]
        # Whatever is found, this is used on nothing; and a batch norm looks at its input then, not at its weights.
        nothing = self.other(self.norm(x[:0]))
        if len(rows) == 0:
            return x.new_zeros(0, OUT), nothing.sum(1)
        return self.down(self.mid(h[rows])) + self.down(self.mid(h[h[:, 0] > 1e9])), nothing.sum(1)


class Chooser(nn.Module):
    """Chooses some rows, and nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.where(x.sum(1) > 0)[0]
        return x[:1] if len(rows) > 1000 else x[rows]


class Attended(nn.Module):
    """Attention over what was found: taken apart, it would have to know how much that is."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.choose = nn.Linear(WIDTH, 8), Chooser()
        self.attention, self.mid, self.down = nn.MultiheadAttention(8, 2), nn.Linear(8, HIDDEN), nn.Linear(HIDDEN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        h = self.choose(self.up(x))[:, None]
        h = self.attention(h, h, h, need_weights=False)[0][:, 0]
        h = self.mid(h)
        return self.down(h.reshape(h.shape[0], -1, 2).flatten(1))


class EmptyHanded(Three):
    """Has a width written in where nothing is found."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        rows = torch.where(h.sum(1) > 0)[0]
        found = self.mid(h[rows]) if len(rows) else x.new_zeros(0, HIDDEN + 2)
        return self.down(found)


class OtherWay(nn.Module):
    """Has a layer for what is not in the example."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.other = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, OUT), nn.Linear(HIDDEN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        found = h[h.sum(1).abs() >= 0]
        return self.down(found) if len(found) < 6 else self.other(found)


class Counting(nn.Module):
    """Keeps what it has seen: in a buffer, in a tensor, in a number and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, OUT)
        self.register_buffer("total", torch.zeros(HIDDEN))
        self.seen, self.last, self.sizes = 0, None, []

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        self.total += h.sum(0)
        self.seen += len(h[h.sum(1) > 0])
        self.last = h
        self.sizes.append(len(h))
        return self.down(h)


class OutsideOfTorch(nn.Module):
    """Nobody can follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.from_numpy(x.numpy() + 1))


class Features(nn.Sequential):
    """A small backbone with a residual sum, whose norm has groups to be kept apart."""

    def __init__(self, channels: int = 12) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False)
        )
        self.append(nn.Conv2d(8, channels, 1)).append(nn.GroupNorm(3, channels)).append(nn.ReLU())
        self.out_channels = channels


def faster_rcnn() -> nn.Module:
    return detection.FasterRCNN(
        Features(),
        min_size=32,
        max_size=32,
        rpn_anchor_generator=AnchorGenerator(((8, 16),), ((0.5, 1.0),)),
        box_roi_pool=torchvision.ops.MultiScaleRoIAlign(["0"], output_size=3, sampling_ratio=2),
        rpn_pre_nms_top_n_test=40,
        rpn_post_nms_top_n_test=20,
        box_score_thresh=0.0,
        box_head=detection.faster_rcnn.TwoMLPHead(12 * 9, 20),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(20, 3),
    )


def retina_net() -> nn.Module:
    anchors = AnchorGenerator(((8, 16),), ((0.5, 1.0),))
    head = detection.retinanet.RetinaNetHead(12, 4, 3)
    options = {"min_size": 32, "max_size": 32, "score_thresh": 0.0, "topk_candidates": 50}
    return detection.RetinaNet(Features(), 3, anchor_generator=anchors, head=head, **options)


def single_shot() -> nn.Module:
    boxes = DefaultBoxGenerator([[2]])
    head = detection.ssd.SSDHead([12], boxes.num_anchors_per_location(), 3)
    return detection.ssd.SSD(Features(), boxes, (32, 32), 3, head=head, score_thresh=0.0, topk_candidates=50)


DETECTORS = {"faster_rcnn": faster_rcnn, "retina_net": retina_net, "single_shot": single_shot}


def images(count: int = 2, size: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, size, size, generator=generator, dtype=torch.float64) for _ in range(count)]


def targets(count: int = 2) -> list[dict[str, Any]]:
    boxes = torch.tensor([[2.0, 3.0, 20.0, 25.0]], dtype=torch.float64)
    return [{"boxes": boxes, "labels": torch.tensor([1])} for _ in range(count)]
