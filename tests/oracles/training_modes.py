"""Networks with dropout whose numbers can be compared: grown beside as they were, and dropouts that scale."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxwidth
from tests.oracles.judges import randomise


def scaled(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return x * (1 - p / 3) if training else x


def _scaled_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any, dropout_p: float, is_causal: bool) -> Tensor:
    return (1 - dropout_p / 3) * _fused(q, k, v, attn_mask, 0.0, is_causal)


_fused = F.scaled_dot_product_attention


@contextmanager
def dropout_that_scales() -> Iterator[None]:
    """Let every dropout scale by a number, so that two networks with dropout can be compared."""
    with patch.multiple(F, dropout=scaled, scaled_dot_product_attention=_scaled_attention):
        yield


def grown(model: nn.Module) -> tuple[nn.Module, fx.GraphModule]:
    """Return a model, and its graph after all groups that can grow without a change of function have grown."""
    model = randomise(model.eval()).double()
    gm = fxwidth.trace(copy.deepcopy(model), torch.randn(2, 5, 16, dtype=torch.float64))
    wg = fxwidth.analyze(gm)
    plan = {g.name: g.width + 1 + i % 2 for i, g in enumerate(wg.free) if g.inexact_growth is None}
    assert len(plan) >= 2
    fxwidth.resize(gm, plan)
    assert gm.meta["fxwidth_history"][-1]["lowered"]
    return model, gm
