"""The methods of selection against brute force."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth.errors import FxwidthError
from fxwidth.passes import ResizeWidths
from fxwidth.selection import greedy
from fxwidth.selection.error_curves import logarithmic, lost_share, share_of
from fxwidth.selection.grams import Grams
from fxwidth.selection.greedy import greedy_order
from fxwidth.selection.methods import (
    backward_order,
    cholesky_order,
    leverage_order,
    projection_order,
    spectral_pruning_order,
)
from fxwidth.selection.orders import rank
from fxwidth.selection.registry import METHODS
from fxwidth.statistics.moments import moments_from_noise
from tests.oracles.channels import select
from tests.zoo.nets import build, images, trained_like

ORDERS = [name for name, method in METHODS.items() if method.needs_moments]


def pairs(width: int = 6, count: int = 2, seed: int = 0, rows: int = 20) -> Grams:
    generator = torch.Generator().manual_seed(seed)
    h, w = (torch.randn(count, n, width, generator=generator, dtype=torch.float64) for n in (rows, 4))
    h = h @ torch.randn(count, width, width, generator=generator, dtype=torch.float64)
    return Grams(h.mT @ h, w.mT @ w, 1e-16)


def unexplained(S: Tensor, kept: list[int]) -> Tensor:
    return S - S[:, kept] @ torch.linalg.solve(S[kept][:, kept], S[kept]) if kept else S


def missed(given: Grams, kept: list[int]) -> float:
    """Return what readers miss of a set of channels, by explicit regression."""
    both = zip(given.activation, given.weight, strict=True)
    return sum(float((D * unexplained(S, kept)).sum()) for S, D in both)


def assert_steps(order: list[int], score: Callable[[list[int], int], float]) -> None:
    """Check that each channel of an order has the best score given those before it."""
    for step in range(len(order) - 1):
        scores = {j: score(order[:step], j) for j in order[step:]}
        assert scores[order[step]] == pytest.approx(max(scores.values()), rel=1e-7)


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("count", [1, 4, 9])
def test_every_order_is_a_permutation(name: str, count: int) -> None:
    assert sorted(METHODS[name].function(pairs(9), count).tolist()) == list(range(9))


@pytest.mark.parametrize("name", ORDERS)
def test_what_nobody_reads_comes_last(name: str) -> None:
    given = pairs(7)
    given.weight[:, [1, 4]] = 0
    given.weight[:, :, [1, 4]] = 0
    assert set(rank(given, 3, name)[-2:].tolist()) == {1, 4}


@pytest.mark.parametrize("seed", range(3))
def test_cholesky_takes_the_loudest_pivot(seed: int) -> None:
    given = pairs(seed=seed)

    def pivot(before: list[int], j: int) -> float:
        both = zip(given.activation, given.weight, strict=True)
        return sum(float(unexplained(S, before)[j, j] * D[j, j]) for S, D in both)

    assert_steps(cholesky_order(given, 3).tolist(), pivot)


@pytest.mark.parametrize("seed", range(3))
def test_backward_drops_the_cheapest(seed: int) -> None:
    given = pairs(seed=seed)
    order = backward_order(given, 3).tolist()
    for left in range(6, 1, -1):
        costs = {j: missed(given, [k for k in order[:left] if k != j]) for j in order[:left]}
        assert costs[order[left - 1]] == pytest.approx(min(costs.values()), rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_spectral_pruning_minimises_both_losses(seed: int) -> None:
    given = pairs(count=1, seed=seed)
    S, D = given.activation[0], given.weight[0]

    def gain(before: list[int], j: int) -> float:
        E = unexplained(S, [*before, j])
        return -float(E.trace() / S.trace() + (D * E).sum() / (D * S).sum())

    assert_steps(spectral_pruning_order(given, 3).tolist(), gain)


def test_leverage_scores_add_up_to_the_count() -> None:
    given = pairs(8, count=1)
    loud = given.weight[0].diagonal().sqrt()
    heard = given.activation[0] * loud[:, None] * loud
    low, high = 0.0, float(heard.trace())
    for _ in range(200):
        ridge = (low + high) / 2
        scores = (heard @ torch.linalg.inv(heard + ridge * torch.eye(8).double())).diagonal()
        low, high = (ridge, high) if float(scores.sum()) > 3 else (low, ridge)
    assert leverage_order(given, 3).tolist() == torch.argsort(scores, descending=True).tolist()


def test_leverage_is_shared_by_copies() -> None:
    h = torch.randn(50, 4, dtype=torch.float64)
    h[:, :2] = torch.linalg.qr(h[:, :2])[0]
    h = torch.stack([h[:, 0], h[:, 0], 0.9 * h[:, 1]], 1)
    given = Grams((h.mT @ h)[None], torch.eye(3).double()[None], 1e-16)
    assert leverage_order(given, 2)[0] == 2


def test_projection_keeps_rows_that_tell_the_leading_directions_apart() -> None:
    basis = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    energy = torch.tensor([9.0, 8, 7, 1e-6, 1e-6, 1e-6, 1e-6, 1e-6]).double()
    S = basis * energy @ basis.T
    kept = projection_order(Grams(S[None], torch.eye(8).double()[None], 1e-16), 3)[:3]
    assert float(torch.linalg.svdvals(basis[kept, :3]).min()) > 0.1


@pytest.mark.parametrize("rows", [400, 30])
def test_blocks_choose_about_as_well_as_one_by_one(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = pairs(64, count=3, rows=rows)
    single = lost_share(given, greedy_order(given, 64))
    monkeypatch.setattr(greedy, "_BLOCKWISE", 1)
    monkeypatch.setattr(greedy, "_BLOCK", 8)
    blocks = greedy_order(given, 64)
    assert sorted(blocks.tolist()) == list(range(64))
    several = lost_share(given, blocks)
    open_ = single > 1e-6 * single[0]
    assert float(np.mean(several[open_] / single[open_])) < 1.2


def test_blocks_see_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    given = pairs(12, count=1)
    S = given.activation[0]
    twice = torch.cat([torch.cat([S, S], 1), torch.cat([S, S], 1)])[None]
    monkeypatch.setattr(greedy, "_BLOCKWISE", 1)
    monkeypatch.setattr(greedy, "_BLOCK", 5)
    order = greedy_order(Grams(twice, pairs(24, count=1, seed=3).weight, 1e-16), 24)
    assert sorted(int(j) % 12 for j in order[:12]) == list(range(12))


class TestCurves:
    """Width curves against explicit regression."""

    @pytest.mark.parametrize("seed", range(3))
    def test_every_width_in_one_pass(self, seed: int) -> None:
        given = pairs(seed=seed)
        order = greedy_order(given, 6)
        expected = [missed(given, order[:k].tolist()) for k in range(7)]
        np.testing.assert_allclose(lost_share(given, order), expected, rtol=1e-6, atol=1e-9 * expected[0])

    def test_few_rows_are_believed_less(self) -> None:
        given = pairs(12, count=1, rows=16)
        order = greedy_order(given, 12)
        few = lost_share(Grams(given.activation, given.weight, 1e-16, torch.tensor([16.0])), order)
        many = lost_share(Grams(given.activation, given.weight, 1e-16, torch.tensor([1e15])), order)
        np.testing.assert_allclose(many, lost_share(given, order), rtol=1e-9, atol=1e-12)
        assert (few[1:-1] > many[1:-1]).all()
        assert (np.diff(few) <= 0).all()
        assert few[-1] == 0

    def test_where_few_rows_cannot_tell_widths_apart_the_wider_is_better(self) -> None:
        errors = logarithmic(np.array([4.0, 3.0, 3.0, 3.0, 0.0, 0.0]))
        assert (np.diff(errors[:5]) < 0).all()
        assert (errors[4:] == 0).all()

    def test_logarithms_of_what_is_kept(self) -> None:
        lost = np.array([2.0, 1.0, 0.5, 0.0])
        errors = logarithmic(lost)
        np.testing.assert_allclose(errors[1:], [-2 * np.log(0.5), -2 * np.log(0.75), 0.0])
        np.testing.assert_allclose(share_of(errors), lost / 2, atol=1e-11)
        assert (logarithmic(np.zeros(4)) == 0).all()


class TestNames:
    """Methods are chosen by name, everywhere alike."""

    def test_an_unknown_method(self) -> None:
        graph, x = build("conv")
        gm = graph.analysis.module
        for call in (
            lambda: select(graph, graph.free[0], 2, None, "best"),
            lambda: fxwidth.resize(gm, {"0": 3}, selection="best"),
            lambda: fxwidth.evolve(gm, x[:4], params=0.5, selection="best"),
            lambda: fxwidth.plan(graph, params=0.5, selection="best"),
            lambda: fxwidth.Evolver(gm, selection="best"),
            lambda: ResizeWidths(selection="best"),
        ):
            with pytest.raises(FxwidthError, match=r"selection='best' is none of 'greedy', 'cholesky', .*'magnitude'"):
                call()

    @pytest.mark.parametrize("name", METHODS)
    def test_a_resize_by_each_method(self, name: str) -> None:
        model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 1), nn.Flatten(2))
        x = images()
        gm = fxwidth.trace(trained_like(model), x[:4])
        fxwidth.evolve(gm, data=[x], params=0.6, selection=name)
        assert gm.meta["fxwidth_history"][-1]["selection"] == name
        assert gm(x).shape == (64, 3, 36)

    def test_magnitude_reads_no_moments(self) -> None:
        graph, _ = build("conv")
        moments = moments_from_noise(graph)
        by_norm = select(graph, graph["2"], 3, None, "magnitude")
        assert (select(graph, graph["2"], 3, moments, "magnitude") == by_norm).all()
