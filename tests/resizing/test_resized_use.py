"""A resized graph is used like any model: other batch sizes, other layouts, autocast, training and eval mode."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import fxwidth
from tests.zoo.models import build, relative_difference

IMAGES = ["squeezenet1_1", "vit", "swin", "convnext"]
ALL = [*IMAGES, "rms_transformer"]


def halved(name: str, dtype: torch.dtype) -> tuple[fx.GraphModule, Tensor]:
    model, x = build(name, dtype)
    gm = fxwidth.trace(model, x)
    plan = {group.name: max(1, group.width // 2) for group in fxwidth.analyze(gm).free}
    # Which channels stay does not matter here, and magnitudes need no noise to be run.
    return fxwidth.resize(gm, plan, selection="magnitude", fold=False), x


@pytest.fixture(scope="module")
def small() -> dict[str, tuple[fx.GraphModule, Tensor]]:
    return {name: halved(name, torch.float64) for name in [*ALL, "resnet18"]}


@pytest.mark.parametrize("name", ALL)
def test_every_batch_size_gives_the_same_rows(name: str, small: dict[str, tuple[fx.GraphModule, Tensor]]) -> None:
    gm, x = small[name]
    with torch.no_grad():
        rows = gm(x)
        for batch in (torch.cat([x, x, x[:1]]), x[:1]):
            torch.testing.assert_close(gm(batch)[: len(x)], rows[: len(batch)], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", IMAGES)
def test_channels_last_gives_the_same(name: str, small: dict[str, tuple[fx.GraphModule, Tensor]]) -> None:
    gm, x = small[name]
    last = copy.deepcopy(gm).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert relative_difference(last(x.to(memory_format=torch.channels_last)), gm(x)) < 1e-10
    assert_trains(last, x.to(memory_format=torch.channels_last))


# torch's own warning for a module in float32 under autocast.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("name", ALL)
def test_autocast_goes_through(name: str) -> None:
    gm, x = halved(name, torch.float32)
    with torch.no_grad():
        plain = gm(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = gm(x)
    assert relative_difference(low, plain) < 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_trains(gm, x)


@pytest.mark.parametrize("name", ["resnet18", "swin"])
def test_training_mode_is_that_of_the_model(name: str, small: dict[str, tuple[fx.GraphModule, Tensor]]) -> None:
    gm = copy.deepcopy(small[name][0])
    x = small[name][1]
    quiet = [module for module in gm.modules() if isinstance(module, nn.BatchNorm2d)]
    means = [module.running_mean.clone() for module in quiet if module.running_mean is not None]
    gm.eval()
    assert torch.equal(gm(x), gm(x))
    gm.train()
    gm(x)
    moved = [not torch.equal(module.running_mean, mean) for module, mean in zip(quiet, means, strict=True)]
    assert all(moved)
    if name == "swin":
        for module in gm.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        assert not torch.equal(gm(x), gm(x))


def assert_trains(gm: fx.GraphModule, x: Tensor) -> None:
    gm.train()
    gm.zero_grad()
    gm(x).float().square().mean().backward()
    gm.eval()
    missing = [name for name, parameter in gm.named_parameters() if parameter.grad is None]
    assert not missing


class _SortedSamples(nn.Module):
    """Samples are put in order, which fixes a dim; here it is the batch, which must not become a number for that."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.attention = nn.Linear(6, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.down = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).sort(dim=0)[0]
        return self.down(self.attention(h, h, h, need_weights=False)[0])


def test_a_batch_that_is_sorted_may_change() -> None:
    gm = fxwidth.trace(_SortedSamples().eval(), torch.randn(2, 5, 6))
    fxwidth.resize(gm, {group.name: group.width // 2 for group in fxwidth.analyze(gm).free})
    assert gm.meta["fxwidth_history"][-1]["lowered"]
    assert gm(torch.randn(3, 5, 6)).shape == (3, 5, 3)


def _reshape(q: Tensor, batch: int, heads: int) -> Tensor:
    return q.reshape(batch * heads, 6, -1)


def _packed(q: Tensor, batch: int, heads: int) -> Tensor:
    return q.reshape((batch * heads, -1, q.shape[2]))


def _expanded(q: Tensor, batch: int, heads: int) -> Tensor:
    return q.reshape(-1, 6, q.shape[2]) + q.new_ones(1).expand(batch * heads, -1).unsqueeze(-1)


def _again(q: Tensor, batch: int, heads: int) -> Tensor:
    q = q.reshape(batch * heads, 6, -1)
    return (2 * q).view(q.shape)


class HeadsInTheBatch(nn.Module):
    """Attention heads are folded into the batch, in a form in which another size is left open."""

    def __init__(self, fold: Callable[[Tensor, int, int], Tensor], exported: bool) -> None:
        super().__init__()
        self.fold, self.exported = fold, exported
        self.into, self.out = nn.Conv1d(6, 24, 1), nn.Conv1d(24, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.exported and x.shape[1] != 6:
            raise ValueError("the wrong width")
        q = self.fold(self.into(x), x.shape[0], 4).softmax(1)
        return self.out(q.reshape(x.shape[0], -1, x.shape[2]))


@pytest.mark.parametrize("exported", [False, True], ids=["symbolic", "exported"])
@pytest.mark.parametrize("fold", [_reshape, _packed, _expanded, _again])
def test_a_size_of_batch_and_heads_follows_both(fold: Callable[..., Tensor], exported: bool) -> None:
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    gm = fxwidth.trace(HeadsInTheBatch(fold, exported).double().eval(), x)
    wg = fxwidth.analyze(gm)
    assert sorted(group.width for group in wg.free) == [4, 6]
    for widths in ({4: 2}, {6: 4}, {2: 3}):
        groups = fxwidth.analyze(gm).groups
        plan = {g.name: widths[g.width] for g in groups if g.pinned is None and g.width in widths}
        assert plan
        fxwidth.resize(gm, plan, fold=False, exact=False)
        with torch.no_grad():
            rows = gm(x)
            for batch in (torch.cat([x, x[:1]]), x[:1]):
                torch.testing.assert_close(gm(batch)[: len(x)], rows[: len(batch)], rtol=1e-9, atol=1e-12)
