"""Evolving: in one call, during training, as passes, and across a save."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx.passes.infra.pass_manager import PassManager

import fxwidth
from fxwidth import FxwidthError
from fxwidth.passes import AnalyzeWidths, PlanWidths, ResizeWidths


def network(width: int = 24) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(4 * width, 4),
    )  # fmt: skip


def data(steps: int) -> list[tuple[Tensor, Tensor]]:
    """Four quadrants: which one is bright?"""
    generator = torch.Generator().manual_seed(0)
    result = []
    for _ in range(steps):
        y = torch.randint(0, 4, (32,), generator=generator)
        x = torch.randn(32, 1, 8, 8, generator=generator)
        for i, label in enumerate(y.tolist()):
            x[i, :, 4 * (label // 2) :, 4 * (label % 2) :][:, :4, :4] += 1
        result.append((x, y))
    return result


def test_evolve_in_one_call() -> None:
    gm = fxwidth.evolve(network(), torch.randn(2, 1, 8, 8), params=0.5)
    count = sum(p.numel() for p in gm.parameters())
    assert count <= 0.5 * sum(p.numel() for p in network().parameters())
    assert gm(torch.randn(5, 1, 8, 8)).shape == (5, 4)
    text = str(fxwidth.report(gm))
    assert f"{count:,} parameters" in text
    ((_, widths),) = [(record["parameters"], record["widths"]) for record in fxwidth.report(gm).resizes]
    assert all(old > new for old, new in widths.values())
    assert all(f"  {name}: {old} -> {new}\n" in f"{text}\n" for name, (old, new) in widths.items())
    assert "readers refitted from noise" in text


def test_evolver_goes_to_its_target_while_the_loop_trains() -> None:
    gm = fxwidth.trace(network(), torch.randn(2, 1, 8, 8))
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    evolver = fxwidth.Evolver(gm, optimizer, every=10, start=10, params=800, rounds=3)
    for x, y in data(60):
        nn.functional.cross_entropy(gm(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        evolver.step(x, y)
    assert evolver.finished
    assert [record["step"] for record in evolver.history] == [20, 30, 40]
    assert sum(p.numel() for p in gm.parameters()) <= 800
    assert [record["evidence"] for record in fxwidth.report(gm).resizes] == ["training"] * 3
    x, y = data(61)[-1]
    assert float((gm.eval()(x).argmax(1) == y).float().mean()) > 0.9


class TwoInputs(nn.Module):
    """Channels made from two inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.head = nn.Linear(4, 16), nn.Linear(5, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head((self.left(x) + self.right(y)).relu())


def test_evolver_learns_from_all_inputs_of_a_step_and_from_no_target() -> None:
    batch = (torch.randn(32, 4), torch.randn(32, 5))
    gm, other = (fxwidth.trace(TwoInputs(), batch) for _ in range(2))
    fxwidth.Evolver(gm, every=1, params=0.5, rounds=1).step(*batch, torch.zeros(32))
    fxwidth.evolve(other, params=0.5, data=[batch])
    assert [record["evidence"] for record in fxwidth.report(gm).resizes] == ["training and noise"]
    torch.testing.assert_close(dict(gm.state_dict()), dict(other.state_dict()), rtol=0, atol=0)


def test_evolver_grows_a_network_that_is_too_narrow() -> None:
    gm = fxwidth.trace(network(2), torch.randn(2, 1, 8, 8))
    evolver = fxwidth.Evolver(gm, every=1, shrink_energy=0.0, grow_energy=0.1, grow_step=3)
    x = torch.randn(4, 1, 8, 8)
    gm.eval()
    before = gm(x)
    plan = evolver.step(x)
    assert plan is not None
    assert all(width == 5 for width in plan.values())
    assert torch.allclose(gm(x), before, atol=1e-5)


def test_bad_evolvers() -> None:
    gm = fxwidth.trace(network(), torch.randn(2, 1, 8, 8))
    for every in (0, 1.5, True, "a"):
        with pytest.raises(FxwidthError, match="every= is 'epoch' or the number of steps between resizes, a whole"):
            fxwidth.Evolver(gm, every=every)  # type: ignore[arg-type]
    for start in (-1, 0.5, None):
        with pytest.raises(FxwidthError, match=r"start= is the number of steps before .* of at least 0, but received"):
            fxwidth.Evolver(gm, start=start)  # type: ignore[arg-type]
    for rounds in (0, 2.5, True):
        with pytest.raises(FxwidthError, match=r"rounds= is the number of resizes on .* of at least 1, but received"):
            fxwidth.Evolver(gm, rounds=rounds, params=0.5)  # type: ignore[arg-type]
    with pytest.raises(FxwidthError, match="only='nothing' matches no group"):
        fxwidth.Evolver(gm, only="nothing")
    with pytest.raises(FxwidthError, match=r"rounds=3 needs params= or budget= to go to"):
        fxwidth.Evolver(gm, rounds=3)
    with pytest.raises(FxwidthError, match=r"params=101\.0 as a ratio of .* must lie in \(0, 100\]"):
        fxwidth.Evolver(gm, params=101.0)
    with pytest.raises(FxwidthError, match=r"params=10 is out of reach: .*parameters remain"):
        fxwidth.Evolver(gm, params=10)
    with pytest.raises(FxwidthError, match=r"out of reach: .*left out by only= or keep="):
        fxwidth.Evolver(gm, params=0.5, keep="*")
    with pytest.raises(FxwidthError, match=r"out of reach: .*lower min_width"):
        fxwidth.Evolver(gm, params=0.5, min_width=24)


def test_passes_in_a_pass_manager() -> None:
    gm = fxwidth.trace(network(), torch.randn(2, 1, 8, 8))
    result = PassManager([AnalyzeWidths(), PlanWidths(params=0.4), ResizeWidths()])(gm)
    assert result.modified
    assert sum(p.numel() for p in result.graph_module.parameters()) <= 0.4 * sum(
        p.numel() for p in network().parameters()
    )
    assert "fxwidth_plan" not in result.graph_module.meta
    assert {"0", "3"} <= set(result.graph_module.meta["fxwidth_groups"])


def test_the_pass_that_plans_leaves_the_plan_and_what_it_notes() -> None:
    gm = fxwidth.trace(network(), torch.randn(2, 1, 8, 8))
    expected = fxwidth.plan(fxwidth.analyze(gm), params=0.4)
    result = PlanWidths(params=0.4).call(gm)
    assert not result.modified
    assert result.graph_module.meta["fxwidth_plan"] == dict(expected)
    assert result.graph_module.meta["fxwidth_plan_notes"] == expected.notes != {}
    assert ResizeWidths().call(gm).graph_module.meta.keys().isdisjoint({"fxwidth_plan", "fxwidth_plan_notes"})


def test_a_resize_pass_without_a_plan() -> None:
    gm = fxwidth.trace(network(), torch.randn(2, 1, 8, 8))
    with pytest.raises(FxwidthError, match="ResizeWidths has no plan; give it one, or run PlanWidths before it"):
        ResizeWidths().call(gm)
    assert ResizeWidths({"0": 5}).call(gm).modified


@pytest.mark.parametrize("file", ["evolved.pt", "evolved.safetensors"])
def test_saved_graphs_come_back(tmp_path: Path, file: str) -> None:
    gm = fxwidth.evolve(network(), torch.randn(2, 1, 8, 8), params=0.5).eval()
    fxwidth.resize(gm, {"0": 5})
    fxwidth.save(gm, tmp_path / file)
    args = (network(), torch.randn(2, 1, 8, 8)) if file.endswith(".safetensors") else ()
    again = fxwidth.load(tmp_path / file, *args, trusted=not args).eval()
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(again(x), gm(x))
    assert again.meta["fxwidth_inputs"] == gm.meta["fxwidth_inputs"]
    assert [record["widths"] for record in fxwidth.report(again).resizes] == [
        record["widths"] for record in fxwidth.report(gm).resizes
    ]
    fxwidth.resize(again, {"0": 4})
    assert again(x).shape == (3, 4)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FxwidthError, match=r"there is no file .*; pass the path that"):
        fxwidth.load(tmp_path / "nothing.pt")
    gm = fxwidth.trace(network(), torch.randn(2, 1, 8, 8))
    fxwidth.save(gm, tmp_path / "a.safetensors")
    with pytest.raises(FxwidthError, match="holds tensors only; pass model="):
        fxwidth.load(tmp_path / "a.safetensors")
    with pytest.raises(FxwidthError, match=r"does not fit this model: 0\.weight has shape \(24, 1, 3, 3\) in the file"):
        fxwidth.load(tmp_path / "a.safetensors", network(8), torch.randn(2, 1, 8, 8))


class Merged(nn.Module):
    """A layer norm over two halves of what one layer writes: growing it changes the function."""

    def __init__(self) -> None:
        super().__init__()
        self.write, self.norm, self.read = nn.Linear(16, 6), nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the last layer reads of both halves, twice."""
        x = self.write(x)
        result: Tensor = self.read(self.norm(torch.cat([x[:, ::2], x[:, 1::2]], -1)))
        return result


def test_an_inexact_growth_that_was_planned_is_carried_out() -> None:
    options = {"shrink_energy": 0.0, "grow_energy": 0.0, "grow_step": 2, "exact": False}
    torch.manual_seed(0)
    x = torch.randn(2, 4, 16)
    gm = fxwidth.evolve(Merged(), x, **options)
    assert gm.get_parameter("write.weight").shape == (8, 16)
    evolver = fxwidth.Evolver(fxwidth.trace(Merged(), x), every=1, **options)
    assert evolver.step(x) == {"write": 8}
