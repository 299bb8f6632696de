"""What the channels of groups are: found from the ops, in three ways to write attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxwidth

WIDTH, HEADS, HEAD_DIM = 24, 3, 8


class Block(nn.Module):
    """A transformer block with its attention by one op or by products."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.embed = nn.Embedding(17, WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * HEAD_DIM) for _ in range(3))
        self.out, self.up, self.gate = nn.Linear(HEADS * HEAD_DIM, WIDTH), nn.Linear(WIDTH, 40), nn.Linear(WIDTH, 40)
        self.down, self.head = nn.Linear(40, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = (part(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for part in (self.q, self.k, self.v))
        if self.form == "op":
            mixed = F.scaled_dot_product_attention(q, k, v)
        elif self.form == "matmul":
            mixed = torch.softmax(q @ k.transpose(-2, -1) * 0.3, -1) @ v
        else:
            mixed = torch.einsum("bhij,bhjd->bhid", torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k), -1), v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return self.head(x)


@pytest.mark.parametrize("form", ["op", "matmul", "einsum"])
def test_a_transformer_block(form: str) -> None:
    graph = fxwidth.analyze(fxwidth.trace(Block(form), torch.zeros(2, 6, dtype=torch.int64)))
    of_width: dict[tuple[str, int], set[str]] = {}
    for group in graph.groups:
        of_width.setdefault((str(graph.kinds[group.name]), group.width), set()).add(group.name)
    assert of_width == {
        ("residual stream", WIDTH): {"embed:1"},
        ("entries looked up", 17): {"embed"},
        ("heads", HEADS): {"q#0"},
        ("head dim", HEAD_DIM): {"q#1", "v#1"},
        ("hidden", 40): {"up"} if "up" in graph else {"gate"},
        ("output", 5): {"head"},
    }


def test_a_product_of_two_layers_is_no_stream() -> None:
    class Gated(nn.Module):
        def __init__(self, adds: bool) -> None:
            super().__init__()
            self.a, self.b, self.c, self.adds = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2), adds

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x) + self.b(x) if self.adds else self.a(x) * self.b(x))

    kinds = [fxwidth.analyze(fxwidth.trace(Gated(adds), torch.randn(2, 4))).kinds["a"] for adds in (True, False)]
    assert kinds == ["residual stream", "hidden"]
