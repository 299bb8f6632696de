"""Numbers computed from sizes: what tensors are multiplied with keeps its trained value at every batch size."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import fxwidth
from fxwidth import FxwidthError

WIDTH, LEFT = 8, 3


class Scaled(nn.Module):
    """Divides by a number computed from the sizes of its activation."""

    def __init__(self, number: Callable[[Tensor], float]) -> None:
        super().__init__()
        self.number = number
        self.up, self.down = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(h / self.number(h))


def traced(number: Callable[[Tensor], float]) -> fx.GraphModule:
    torch.manual_seed(0)
    return fxwidth.trace(fx.symbolic_trace(Scaled(number).double().eval()), torch.randn(4, 6, dtype=torch.float64))


NUMBERS = {
    "a width": (lambda h: h.shape[1], lambda batch: WIDTH),
    "a width from the end": (lambda h: h.size(-1), lambda batch: WIDTH),
    "a width in a sum": (lambda h: h.shape[1] + 3, lambda batch: WIDTH + 3),
    "all elements": (lambda h: h.numel(), lambda batch: batch * WIDTH),
    "a product": (lambda h: h.size(0) * h.size(1) * 2, lambda batch: batch * WIDTH * 2),
    "a root of a product": (lambda h: (h.shape[1] * h.shape[0]) ** 0.5, lambda batch: math.sqrt(batch * WIDTH)),
    "the batch": (lambda h: h.size(0), lambda batch: batch),
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("batch", [4, 7, 1])
def test_numbers_keep_their_trained_values(name: str, batch: int) -> None:
    number, trained = NUMBERS[name]
    gm = traced(number)
    fxwidth.resize(gm, {"up": LEFT}, fold=False)
    x = torch.randn(batch, 6, dtype=torch.float64)
    expected = gm.down(gm.up(x) / trained(batch))
    assert gm.up.out_features == LEFT
    torch.testing.assert_close(gm(x), expected, rtol=1e-12, atol=1e-12)


def test_a_second_resize_keeps_them_too() -> None:
    gm = traced(NUMBERS["all elements"][0])
    for width in (LEFT, 5):
        fxwidth.resize(gm, {"up": width}, fold=False)
    x = torch.randn(7, 6, dtype=torch.float64)
    torch.testing.assert_close(gm(x), gm.down(gm.up(x) / (7 * WIDTH)), rtol=1e-12, atol=1e-12)


def test_a_sum_of_batch_and_width_is_refused() -> None:
    gm = traced(lambda h: h.size(0) + h.size(1))
    with pytest.raises(FxwidthError, match=r"node 'truediv' computes with a number that holds both the batch and a"):
        fxwidth.resize(gm, {"up": LEFT})
    assert gm.up.out_features == WIDTH


class Folded(nn.Module):
    """Puts a part of its channels beside the batch, in a size that is computed with a width in the code."""

    def __init__(self, rows: Callable[[Tensor], int]) -> None:
        super().__init__()
        self.rows = rows
        self.up, self.down = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(h.view(self.rows(h), -1).softmax(1).view(h.shape[0], -1))


def folded(rows: Callable[[Tensor], int]) -> tuple[fx.GraphModule, dict[str, int]]:
    torch.manual_seed(0)
    gm = fxwidth.trace(Folded(rows).double().eval(), torch.randn(4, 6, dtype=torch.float64))
    return gm, {group.name: 2 for group in fxwidth.analyze(gm).free if group.width == 4}


def test_a_size_of_batch_and_width_follows_as_a_product() -> None:
    gm, plan = folded(lambda h: h.size(0) * 4)
    assert plan
    fxwidth.resize(gm, plan, fold=False)
    for batch in (4, 7, 1):
        assert gm(torch.randn(batch, 6, dtype=torch.float64)).shape == (batch, 2)


def test_a_size_that_is_a_sum_of_batches_is_refused() -> None:
    gm, plan = folded(lambda h: h.size(0) + h.size(0) * 3)
    with pytest.raises(
        FxwidthError,
        match=r"node 'view' takes a size that holds both the batch and a width \(16 at node 'add', where 8",
    ) as refusal:
        fxwidth.resize(gm, plan, fold=False)
    assert "keep=" in str(refusal.value)
    assert gm.up.out_features == WIDTH


class Closed(nn.Module):
    """A module that has a width written into its code, so that it must be lowered, and divides by a number."""

    def __init__(self, number: Callable[[Tensor], float]) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 2, WIDTH // 2).flatten(1) / self.number(x)


class Opaque(nn.Module):
    """Has a closed module between two layers."""

    def __init__(self, number: Callable[[Tensor], float]) -> None:
        super().__init__()
        self.up, self.closed, self.down = nn.Linear(6, WIDTH), Closed(number), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.closed(self.up(x)))


class ClosedTracer(fx.Tracer):
    """Leaves closed modules as they are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Closed) or super().is_leaf_module(m, module_qualified_name)


def traced_with_closed(number: Callable[[Tensor], float]) -> fx.GraphModule:
    torch.manual_seed(0)
    model = Opaque(number).double().eval()
    return fxwidth.trace(fx.GraphModule(model, ClosedTracer().trace(model)), torch.randn(4, 6, dtype=torch.float64))


@pytest.mark.parametrize("batch", [4, 7, 1])
def test_a_lowered_module_keeps_a_number_of_its_width(batch: int) -> None:
    gm = traced_with_closed(lambda h: h.shape[1])
    group = next(group.name for group in fxwidth.analyze(gm).groups if not group.pinned)
    fxwidth.resize(gm, {group: 1}, fold=False)
    x = torch.randn(batch, 6, dtype=torch.float64)
    torch.testing.assert_close(gm(x), gm.down(gm.up(x) / WIDTH), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("number", [lambda h: h.numel(), lambda h: 1 / h.shape[0], lambda h: h.shape[0] + h.shape[1]])
def test_a_lowered_module_that_counts_the_batch_is_refused(number: Callable[[Tensor], float]) -> None:
    gm = traced_with_closed(number)
    group = next(group.name for group in fxwidth.analyze(gm).groups if not group.pinned)
    with pytest.raises(FxwidthError, match=r"node 'closed' has to be taken apart .* for a batch larger by one it does"):
        fxwidth.resize(gm, {group: 1})
    assert gm.up.out_features == WIDTH


def test_without_the_larger_batch_the_number_would_be_written_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: nothing else sees that a lowered module counts the batch."""
    monkeypatch.setattr("fxwidth.rewriting.old_sizes.differs_in_batch", lambda analysis, name: None)
    gm = traced_with_closed(lambda h: h.numel())
    group = next(group.name for group in fxwidth.analyze(gm).groups if not group.pinned)
    fxwidth.resize(gm, {group: 1}, fold=False)
    for batch, is_right in [(4, True), (7, False)]:
        x = torch.randn(batch, 6, dtype=torch.float64)
        difference = (gm(x) - gm.down(gm.up(x) / (batch * WIDTH))).abs().max()
        assert (difference < 1e-12) == is_right
