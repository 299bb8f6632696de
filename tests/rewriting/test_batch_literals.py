"""Literals beside the batch: arguments that hold the batch and a width follow both after a resize, or it is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxwidth
from fxwidth import FxwidthError

WIDTH = 8


class Beside(nn.Module):
    """Works on its channels and the batch together."""

    def __init__(self, between: Callable[[Tensor, Tensor, int], Tensor]) -> None:
        super().__init__()
        self.between = between
        self.up, self.down = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(self.up(x).tanh(), x, WIDTH))


class Convolved(Beside):
    """Does so in two dimensions."""

    def __init__(self, between: Callable[[Tensor, Tensor, int], Tensor]) -> None:
        super().__init__(between)
        self.up, self.down = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 2, 1)


def twice(h: Tensor) -> Tensor:
    return torch.cat([h.flatten(), 2 * h.flatten()])


def kernels(h: Tensor) -> Tensor:
    """Return one kernel per sample and channel."""
    return h.mean((2, 3)).reshape(-1, 1, 1, 1)


FLAT: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "slice to": lambda h, x, c: twice(h)[: x.shape[0] * c].view(-1, c),
    "slice from": lambda h, x, c: twice(h)[x.shape[0] * c :].view(-1, c),
    "slice from the end": lambda h, x, c: twice(h)[-x.shape[0] * c :].view(-1, c),
    "narrow": lambda h, x, c: twice(h).narrow(0, x.shape[0] * c, x.shape[0] * c).view(-1, c),
    "split in two": lambda h, x, c: twice(h).split(x.shape[0] * c)[1].view(-1, c),
    "split in sections": lambda h, x, c: twice(h).split([x.shape[0] * c, x.shape[0] * c])[1].view(-1, c),
    "split per sample": lambda h, x, c: torch.stack(h.flatten().split(c)),
    "chunk per sample": lambda h, x, c: torch.stack(h.flatten().chunk(x.shape[0])),
    "last sample": lambda h, x, c: h + h.flatten()[-c:],
    "zeros": lambda h, x, c: h + torch.zeros(x.shape[0] * c, dtype=x.dtype).view(-1, c),
    "expand": lambda h, x, c: h.reshape(-1, 1).expand(x.shape[0] * c, 2).sum(-1).view(-1, c),
    "as strided": lambda h, x, c: h.as_strided((x.shape[0], c), (c, 1)),
    "pad": lambda h, x, c: F.pad(h.flatten(), (0, x.shape[0] * c))[: x.shape[0] * c].view(-1, c),
    "shape and heads": lambda h, x, c: h.view(h.shape[:-1] + (2, c // 2)).sigmoid().flatten(1),
    "shape as a list": lambda h, x, c: h.view([*h.shape[:-1], 2, c // 2]).sigmoid().flatten(1),
    "view as one": lambda h, x, c: h.reshape(x.shape[0] * c).view(x.shape[0], c),
}
IMAGES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "group norm": lambda h, x, c: F.group_norm(h.reshape(1, -1, 4, 4), x.shape[0] * c).view(-1, c, 4, 4),
    "convolution": lambda h, x, c: F.conv2d(h.reshape(1, -1, 4, 4), kernels(h), groups=x.shape[0] * c).view(h.shape),
    "transposed convolution": lambda h, x, c: F.conv_transpose2d(
        h.reshape(1, -1, 4, 4), kernels(h), groups=x.shape[0] * c
    ).view(h.shape),
    "batch norm": lambda h, x, c: F.batch_norm(h.reshape(1, x.shape[0] * c, 4, 4), None, None, training=True).view(
        -1, c, 4, 4
    ),
}
CASES = {name: (Beside, between, (6,)) for name, between in FLAT.items()} | {
    name: (Convolved, between, (3, 4, 4)) for name, between in IMAGES.items()
}


def model_and_graph(name: str) -> tuple[nn.Module, Any, Callable[[int], Tensor]]:
    kind, between, shape = CASES[name]
    torch.manual_seed(0)
    model = kind(between).double().eval()
    generator = torch.Generator().manual_seed(1)

    def batch(size: int) -> Tensor:
        return torch.randn(size, *shape, dtype=torch.float64, generator=generator)

    return copy.deepcopy(model), fxwidth.trace(model, batch(3)), batch


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_grown_networks_are_the_same_at_every_batch_size(name: str, training: bool) -> None:
    model, gm, batch = model_and_graph(name)
    plan = {group.name: group.width + 1 for group in fxwidth.analyze(gm).free}
    assert plan
    fxwidth.resize(gm, plan)
    model.train(training)
    gm.train(training)
    for size in (3, 1, 5, 6):
        x = batch(size)
        torch.testing.assert_close(gm(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in CASES if name != "last sample"])
def test_samples_of_shrunk_networks_have_nothing_to_do_with_each_other(name: str) -> None:
    _, gm, batch = model_and_graph(name)
    for _ in range(2):
        free = fxwidth.analyze(gm).free
        fxwidth.resize(gm, {group.name: max(1, group.width - 2) for group in free})
    x = batch(6)
    torch.testing.assert_close(gm(x), torch.cat([gm(x[:1]), gm(x[1:])]), rtol=1e-9, atol=1e-9)


def test_a_number_that_is_no_multiple_is_refused() -> None:
    def between(h: Tensor, x: Tensor, c: int) -> Tensor:
        return twice(h)[c : c + x.shape[0] * c].view(-1, c)

    gm = fxwidth.trace(Beside(between).double(), torch.randn(3, 6, dtype=torch.float64))
    with pytest.raises(FxwidthError, match=r"takes a size that holds both the batch and a width .*keep="):
        fxwidth.resize(gm, {"up": 5})
    assert gm.get_parameter("up.weight").shape == (WIDTH, 6)


@pytest.mark.parametrize("name", ["slice to", "group norm", "split in sections"])
def test_a_number_of_one_batch_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: the number that fits the batch of the example is written in."""
    monkeypatch.setattr("fxwidth.rewriting.node_arguments.rescaled", lambda size, wanted, *rest: wanted)
    model, gm, batch = model_and_graph(name)
    with pytest.raises(FxwidthError, match=r"would not follow the batch size any more: .*keep="):
        fxwidth.resize(gm, {"up": WIDTH + 1})
    x = batch(5)
    torch.testing.assert_close(gm(x), model(x), rtol=0, atol=0)


def test_a_model_of_one_batch_stays_one() -> None:
    def between(h: Tensor, x: Tensor, c: int) -> Tensor:
        return F.group_norm(h.reshape(1, 3 * c, 4, 4), 3 * c).view(3, c, 4, 4)

    torch.manual_seed(0)
    model = Convolved(between).double().eval()
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    gm = fxwidth.trace(copy.deepcopy(model), x)
    fxwidth.resize(gm, {"up": WIDTH + 1})
    torch.testing.assert_close(gm(x), model(x), rtol=1e-9, atol=1e-9)
