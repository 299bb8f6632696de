"""What was added exactly goes without a trace: growing and shrinking back is the identity, norms included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxwidth
from tests.checkpoint.test_saving import Convolutions, Stream
from tests.zoo.models import RMSTransformer, relative_difference, set_apart


class Deep(nn.Module):
    """A residual stream with several pre-norm blocks, read as it is at the end."""

    def __init__(self, blocks: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, 3)
        self.norms = nn.ModuleList(norm(16) for _ in range(blocks))
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for norm, part in zip(self.norms, self.parts, strict=True):
            x = x + part(norm(x))
        return self.head(x)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "one layer norm": (lambda: Deep(1, nn.LayerNorm), (16, 8)),
    "two layer norms": (lambda: Deep(2, nn.LayerNorm), (16, 8)),
    "two RMS norms": (lambda: Deep(2, nn.RMSNorm), (16, 8)),
    "attention and layer norms": (lambda: Stream(nn.LayerNorm), (8, 4, 6)),
    "attention and RMS norms": (RMSTransformer, (8, 4, 10)),
    "group, batch and weight norm": (Convolutions, (8, 3, 6, 6)),
}


def network(name: str, seed: int) -> tuple[nn.Module, Tensor]:
    make, shape = NETWORKS[name]
    torch.manual_seed(seed)
    return set_apart(make(), seed).double().eval(), torch.randn(shape, dtype=torch.float64)


def grown_and_back(name: str, seed: int, with_data: bool, steps: tuple[int, ...] = (3,)) -> float:
    """Return how far outputs are from where they were."""
    model, x = network(name, seed)
    gm = fxwidth.trace(model, x)
    with torch.no_grad():
        before = gm(x)
    # Groups whose old entries no norm of activations would tell from others: heads of attention are rotated.
    widths = {group.name: group.width for group in fxwidth.analyze(gm).free if group.inexact_growth is None}
    for step in steps:
        fxwidth.resize(gm, {name: fxwidth.analyze(gm)[name].width + step for name in widths})
    with torch.no_grad():
        assert relative_difference(gm(x), before) < 1e-12
    fxwidth.resize(gm, widths, data=[torch.randn(128, *x.shape[1:], dtype=torch.float64)] if with_data else None)
    assert all(fxwidth.analyze(gm)[name].width == width for name, width in widths.items())
    with torch.no_grad():
        return relative_difference(gm(x), before)


@pytest.mark.parametrize("with_data", [False, True], ids=["noise", "data"])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", NETWORKS)
def test_growing_and_shrinking_back_changes_nothing(name: str, seed: int, with_data: bool) -> None:
    assert grown_and_back(name, seed, with_data) <= 1e-10


def test_growing_twice_and_shrinking_once() -> None:
    assert grown_and_back("two layer norms", 0, with_data=True, steps=(2, 3)) <= 1e-10


def test_without_a_look_at_norms_the_way_back_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: channels are chosen by what readers hear alone."""
    monkeypatch.setattr("fxwidth.importance.estimates.silent_channels", lambda *_: None)
    assert grown_and_back("one layer norm", 0, with_data=False) > 1e-3
