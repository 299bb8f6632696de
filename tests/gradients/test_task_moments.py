"""What a loss tells of new channels, against explicit gradients with all samples in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxwidth
from fxwidth.gradients.task_moments import GroupMoments, gather_task_moments
from fxwidth.growth.directions import TaskMoments
from fxwidth.growth.informed_directions import gradmax_directions, tiny_directions
from tests.growth.informed_networks import NETWORKS, images, labels, network

ALL = frozenset({"inputs_second", "cross", "residual"})


def gathered(model: nn.Module, batches: list[tuple[Tensor, Tensor]], name: str) -> GroupMoments:
    gm = fxwidth.trace(model, batches[0][0])
    wg = fxwidth.analyze(gm)
    pairs = [([x], (y,)) for x, y in batches]
    return gather_task_moments(wg, [wg[name]], pairs, F.cross_entropy, ALL)[wg[name]]


def moments(model: nn.Module, batches: list[tuple[Tensor, Tensor]], name: str) -> TaskMoments:
    found = gathered(model, batches, name)
    assert found.untold == {}
    assert found.moments is not None
    return found.moments


class Explicit:
    """The matrices of an MLP's middle group, by autograd and least squares on all samples at once."""

    def __init__(self, model: nn.Sequential, x: Tensor, y: Tensor) -> None:
        count = len(x)
        hidden = model[1](model[0](x)).detach()
        read = model[2](hidden).requires_grad_()
        gradient = -count * torch.autograd.grad(F.cross_entropy(model[4](model[3](read)), y), read)[0]
        known = torch.cat([hidden, torch.ones(count, 1, dtype=x.dtype)], 1)
        residual = gradient - known @ torch.linalg.lstsq(known, gradient).solution
        self.second = x.T @ x / count
        self.cross, self.residual = x.T @ gradient / count, x.T @ residual / count


def mlp() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x = torch.randn(48, 7, dtype=torch.float64) @ torch.randn(7, 7, dtype=torch.float64)
    return model, x, torch.arange(48) % 4


def test_moments_of_an_mlp_are_those_of_explicit_gradients() -> None:
    model, x, y = mlp()
    found, wanted = moments(model, [(x, y)], "0"), Explicit(model, x, y)
    assert found.inputs_second is not None
    torch.testing.assert_close(found.inputs_second[0], wanted.second, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.cross, wanted.cross, rtol=1e-10, atol=1e-12)
    # Up to the ridge of the regression.
    torch.testing.assert_close(found.residual, wanted.residual, rtol=1e-4, atol=1e-5)


def test_directions_of_an_mlp_are_the_singular_vectors_of_explicit_matrices() -> None:
    model, x, y = mlp()
    found, wanted = moments(model, [(x[:11], y[:11]), (x[11:], y[11:])], "0"), Explicit(model, x, y)
    rows, generator = model[0].weight.detach(), torch.Generator().manual_seed(0)
    values, vectors = torch.linalg.eigh(wanted.second + 1e-2 * wanted.second.diagonal().mean() * torch.eye(7))
    whitening = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    for method, left in (
        (gradmax_directions, torch.linalg.svd(wanted.cross)[0]),
        (tiny_directions, whitening @ torch.linalg.svd(whitening @ wanted.residual)[0]),
    ):
        made = method(rows, 3, generator, found)
        torch.testing.assert_close(made.norm(dim=1), rows.norm(dim=1).mean().expand(3))
        cosines = F.cosine_similarity(made, left[:, :3].T).abs()
        torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-8)


def test_the_first_direction_of_tiny_lowers_the_loss_of_the_best_reader_most() -> None:
    """Of all directions, a linear reader of it can explain most of what is left of the gradient."""
    model, x, y = mlp()
    found = moments(model, [(x, y)], "0")
    assert found.inputs_second is not None
    assert found.residual is not None

    def gain(row: Tensor) -> float:
        assert found.inputs_second is not None
        assert found.residual is not None
        return float((row @ found.residual).square().sum() / (row @ found.inputs_second[0] @ row))

    rows, generator = model[0].weight.detach(), torch.Generator().manual_seed(0)
    best = gain(tiny_directions(rows, 1, generator, found)[0])
    others = torch.randn(500, 7, generator=generator, dtype=torch.float64)
    assert best > max(gain(row) for row in others)


@pytest.mark.parametrize("name", NETWORKS)
def test_moments_do_not_depend_on_how_the_data_come(name: str) -> None:
    x, y = images(24), labels(24)
    whole = fxwidth.analyze(fxwidth.trace(network(name), x))
    for group in [one for one in whole.free if one.inexact_growth is None][:3]:
        together = gathered(network(name), [(x, y)], group.name)
        apart = gathered(network(name), [(x[:5], y[:5]), (x[5:17], y[5:17]), (x[17:], y[17:])], group.name)
        assert together.untold == apart.untold
        if together.moments is None or apart.moments is None:
            continue
        for one, other in (
            (together.moments.cross, apart.moments.cross),
            (together.moments.residual, apart.moments.residual),
            *zip(together.moments.inputs_second or (), apart.moments.inputs_second or (), strict=True),
        ):
            assert one is not None
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9 * float(one.abs().max()))


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": 2}, {"groups": 2}])
def test_taps_of_convolutions_are_those_of_unfolding(options: dict[str, int]) -> None:
    torch.manual_seed(0)
    writer = nn.Conv2d(4, 6, 3, **options).double()
    x = images(6, 4)
    model = nn.Sequential(writer, nn.Flatten(), nn.Linear(writer(x)[0].numel(), 4))
    found = moments(model.double(), [(x, labels(6))], "0")
    places = {"stride": 1, "padding": 0, "dilation": 1} | {k: v for k, v in options.items() if k != "groups"}
    groups = options.get("groups", 1)
    assert found.inputs_second is not None
    for part, own in zip(found.inputs_second, x.chunk(groups, 1), strict=True):
        rows = F.unfold(own, 3, **places).movedim(1, -1).flatten(0, 1)
        torch.testing.assert_close(part, rows.T @ rows / 6, rtol=1e-10, atol=1e-10)


class Chain(nn.Module):
    """Two linear convolutions, what a new channel between them would do being bilinear in its two kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.write = nn.Conv2d(2, 3, 3, padding=1, stride=2)
        self.read = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.read(self.write(x)).relu().mean((2, 3)))


def test_the_cross_moment_is_the_mixed_derivative_of_the_loss() -> None:
    torch.manual_seed(0)
    model = Chain().double()
    x, y = images(8, 2), labels(8)
    found = moments(model, [(x, y)], "write")
    row = torch.zeros(18, dtype=torch.float64, requires_grad=True)
    entries = torch.zeros(36, dtype=torch.float64, requires_grad=True)
    added = F.conv2d(F.conv2d(x, row.view(1, 2, 3, 3), padding=1, stride=2), entries.view(4, 1, 3, 3), padding=1)
    loss = F.cross_entropy(model.head((model.read(model.write(x)) + added).relu().mean((2, 3))), y)
    (by_entries,) = torch.autograd.grad(loss, entries, create_graph=True)
    mixed = torch.stack([torch.autograd.grad(one, row, retain_graph=True)[0] for one in by_entries], 1)
    assert found.cross is not None
    torch.testing.assert_close(found.cross, -mixed, rtol=1e-9, atol=1e-12)


WRITERS = {
    "linear": (lambda: nn.Linear(8, 5, bias=False), lambda: images(6)),
    "linear without rows": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 5, bias=False)), lambda: images(6)),
    "line": (lambda: nn.Conv1d(4, 6, 3, stride=2, groups=2, bias=False), lambda: images(6, 4).flatten(2)),
    "plane": (lambda: nn.Conv2d(4, 6, (3, 2), padding=(2, 0), dilation=2, bias=False), lambda: images(6, 4)),
    "volume": (lambda: nn.Conv3d(2, 3, 2, bias=False), lambda: images(6, 8).unflatten(1, (2, 4))),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, bias=False), lambda: images(6, 4)),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_second_moments_tell_the_squares_of_what_is_written(kind: str) -> None:
    torch.manual_seed(0)
    make, inputs = WRITERS[kind]
    writer, x = make().double(), inputs()
    model = nn.Sequential(writer, nn.Flatten(), nn.Linear(writer(x)[0].numel(), 4)).double()
    written = writer(x).detach()
    channel = written.dim() - 1 if "linear" in kind else 1
    squares = written.square().sum([dim for dim in range(written.dim()) if dim != channel]) / len(x)
    gm = fxwidth.trace(model, x)
    wg = fxwidth.analyze(gm)
    group = wg.free[0]
    found = gather_task_moments(wg, [group], [([x], (labels(6),))], F.cross_entropy, ALL)[group]
    assert found.moments is not None, found.untold
    assert found.moments.inputs_second is not None
    told = torch.zeros_like(squares)
    for one, second in zip(found.places.written, found.moments.inputs_second, strict=True):
        rows = one.rows(gm.get_parameter(one.parameter).detach())
        told[one.positions] = ((rows @ second) * rows).sum(1)
    torch.testing.assert_close(told, squares, rtol=1e-9, atol=1e-12)


class Stream(nn.Module):
    """A stream that is written twice and read twice, in between by what writes it again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down, self.head = nn.Linear(7, 3), nn.Linear(3, 5), nn.Linear(5, 3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.stem(x)
        return self.head(stream + self.down(torch.tanh(self.up(stream))))

    def grown(self, x: Tensor, stem: Tensor, down: Tensor, up: Tensor, head: Tensor) -> Tensor:
        """Return the output with one more channel: what writes it, and what reads it."""
        stream, more = self.stem(x), x @ stem
        hidden = torch.tanh(self.up(stream) + more[:, None] * up)
        stream, more = stream + self.down(hidden), more + hidden @ down
        return self.head(stream) + more[:, None] * head


def test_gradients_end_at_other_readers_of_a_stream() -> None:
    torch.manual_seed(0)
    model = Stream().double()
    x, y = torch.randn(12, 7, dtype=torch.float64), labels(12)
    gm = fxwidth.trace(model, x)
    wg = fxwidth.analyze(gm)
    group = wg["stem"]
    found = gather_task_moments(wg, [group], [([x], (y,))], F.cross_entropy, ALL)[group]
    assert [one.parameter for one in found.places.written] == ["stem.weight", "down.weight"]
    places = [torch.zeros(size, dtype=x.dtype, requires_grad=True) for size in (7, 5, 5, 4)]
    loss = F.cross_entropy(model.grown(x, *places), y)
    entries = torch.cat(torch.autograd.grad(loss, places[2:], create_graph=True))
    mixed = [
        torch.cat([torch.zeros(size) if one is None else one for size, one in zip((7, 5), row, strict=True)])
        for row in (torch.autograd.grad(one, places[:2], retain_graph=True, allow_unused=True) for one in entries)
    ]
    assert found.moments is not None
    assert found.moments.cross is not None
    torch.testing.assert_close(found.moments.cross, -torch.stack(mixed, 1), rtol=1e-9, atol=1e-12)
