"""Sizes that a rewritten graph computes are computed wherever it goes from there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxwidth


class Attending(nn.Module):
    """Attention that is taken apart when its heads become narrower than the class can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 3)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.attention(self.first(x), x, x)[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated")
def test_a_traced_script_of_a_lowered_module_takes_any_batch() -> None:
    torch.manual_seed(0)
    model, x = Attending().double().eval(), torch.randn(2, 5, 16, dtype=torch.float64)
    gm = fxwidth.evolve(model, x, ratio=0.6, selection="magnitude", fold=False)
    assert fxwidth.report(gm).resizes[-1]["lowered"]
    script = torch.jit.trace(gm, x)
    for batch in (2, 7):
        other = torch.randn(batch, 5, 16, dtype=torch.float64)
        torch.testing.assert_close(script(other), gm(other), rtol=1e-12, atol=1e-12)
