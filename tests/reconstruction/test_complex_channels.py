"""Complex channels: what depends on others goes without a trace; what no reader takes over is reported."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxwidth

COMPLEX = (torch.complex64, torch.complex128)


class Spectral(nn.Module):
    """Complex layers with a product with the magnitude between them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Linear(6, 12, dtype=dtype),
            nn.Linear(12, 10, dtype=dtype),
            nn.Linear(10, 3, dtype=dtype),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = self.b(h * torch.tanh(h.abs()))
        return self.c(h * h.abs())


@pytest.mark.parametrize("with_data", [False, True], ids=["noise", "data"])
@pytest.mark.parametrize("dtype", COMPLEX)
@pytest.mark.parametrize("linear", [False, True])
def test_duplicates_go_without_a_trace(dtype: torch.dtype, with_data: bool, linear: bool) -> None:
    model = Spectral(dtype).eval()
    if linear:
        model = nn.Sequential(model.a, model.b, model.c)
    first, second = list(model.children())[:2]
    with torch.no_grad():
        for layer, scale in ((first, 1.0), (second, -1.0)):
            half = len(layer.weight) // 2
            layer.weight[half:] = scale * layer.weight[:half]
            layer.bias[half:] = scale * layer.bias[:half]
    x = torch.randn(40, 6, dtype=dtype)
    before = model(x).detach()
    gm = fxwidth.trace(model, x)
    plan = {group.name: group.width // 2 for group in fxwidth.analyze(gm).free}
    assert len(plan) == 2
    fxwidth.resize(gm, plan, data=[x] if with_data else None)
    assert fxwidth.report(gm).resizes[-1]["not_refitted"] == {}
    error = float((gm(x).detach() - before).abs().max() / before.abs().max())
    assert error < 100 * torch.finfo(dtype).eps


def test_folding_is_better_than_leaving_it() -> None:
    x = torch.randn(200, 6, dtype=torch.complex128)
    model = Spectral(torch.complex128).eval()
    before = model(x).detach()
    errors = []
    for fold in (True, False):
        torch.manual_seed(0)
        again = Spectral(torch.complex128).eval()
        again.load_state_dict(model.state_dict())
        gm = fxwidth.trace(again, x)
        fxwidth.resize(gm, {"a": 8, "b": 7}, data=[x], fold=fold)
        errors.append(float((gm(x) - before).detach().abs().square().mean()))
    assert errors[0] < 0.7 * errors[1]


class Computed(nn.Module):
    """Reads channels with a weight that is computed from another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.weight = nn.Linear(6, 12), nn.Parameter(torch.randn(3, 12))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.relu(self.a(x)), torch.tanh(self.weight))


def test_readers_that_are_not_refitted_are_reported() -> None:
    gm = fxwidth.trace(Computed().eval(), torch.randn(5, 6))
    fxwidth.resize(gm, {"a": 6})
    assert fxwidth.report(gm).resizes[-1]["not_refitted"] == {"node linear": "its weight is computed from parameters"}
    assert "node linear was not refitted: its weight is computed from parameters" in str(fxwidth.report(gm))
