"""Models that take one sample without a batch: their first dim is one of channels or places."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth import FxwidthError


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 3), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))).mean((-2, -1)))


class Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Places(nn.Module):
    """Adds an embedding of each place of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.places, self.b = nn.Linear(6, 8), nn.Parameter(torch.randn(5, 8)), nn.Linear(8, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(torch.relu(self.a(x) + self.places))))


class Flattened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3 * 4, 8), nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(torch.relu(self.a(x.flatten())))))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "images": (Images, (3, 9, 9)),
    "features": (Features, (6,)),
    "places": (Places, (5, 6)),
    "flattened": (Flattened, (3, 4)),
}


@pytest.mark.parametrize("with_data", [False, True], ids=["noise", "data"])
@pytest.mark.parametrize("name", CASES)
def test_duplicates_go_without_a_trace(name: str, with_data: bool) -> None:
    make, shape = CASES[name]
    model = make().double().eval()
    with torch.no_grad():
        for layer in (model.a, model.b):
            half = len(layer.weight) // 2
            layer.weight[half:] = layer.weight[:half]
            layer.bias[half:] = layer.bias[:half]
        if name == "places":
            model.places[:, 4:] = model.places[:, :4]
    samples = torch.randn(64, *shape, dtype=torch.float64)
    expected = torch.stack([model(x) for x in samples[:5]])
    gm = fxwidth.trace(model, samples[0])
    free = fxwidth.analyze(gm).free
    assert len(free) == 2
    fxwidth.resize(gm, {group.name: group.width // 2 for group in free}, data=list(samples) if with_data else None)
    assert fxwidth.report(gm).resizes[0]["evidence"] in (("data", "data and noise") if with_data else ("noise",))
    torch.testing.assert_close(torch.stack([gm(x) for x in samples[:5]]), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_growth_and_plans(name: str) -> None:
    make, shape = CASES[name]
    model, x = make().double().eval(), torch.randn(shape, dtype=torch.float64)
    expected = model(x)
    gm = fxwidth.trace(model, x)
    fxwidth.resize(gm, {group.name: group.width + 3 for group in fxwidth.analyze(gm).free})
    torch.testing.assert_close(gm(x), expected, rtol=1e-10, atol=1e-10)
    plan = fxwidth.plan(fxwidth.analyze(gm), params=0.5)
    fxwidth.resize(gm, plan)
    assert gm(x).isfinite().all()


def test_many_samples_at_once_are_refused() -> None:
    gm = fxwidth.trace(Images().eval(), torch.randn(3, 9, 9))
    with pytest.raises(
        FxwidthError, match=r"has shape \(7, 3, 9, 9\), the graph takes one sample of shape \(3, 9, 9\)"
    ):
        fxwidth.resize(gm, {"a": 4}, data=torch.randn(7, 3, 9, 9))


def test_a_batch_is_a_batch() -> None:
    """The other side: the first dim of the same networks' batches is free to change."""
    make, shape = CASES["images"]
    gm = fxwidth.trace(make().eval(), torch.randn(3, *shape))
    width_graph = fxwidth.analyze(gm)
    assert width_graph.analysis.batch is not None
    fxwidth.resize(gm, {"a": 4})
    assert gm(torch.randn(5, *shape)).shape[0] == 5
