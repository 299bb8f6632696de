"""Graphs whose nodes a pass has changed: in files, in copies, and beside the model that was traced."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import fxwidth
from fxwidth.passes import CleanUp, FactorizeLinear, FoldBatchNorm, Pipeline, PlanWidths, ResizeWidths
from tests.passes.networks import largest, settled


def network() -> nn.Sequential:
    layers = [nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Identity(), nn.ReLU(), nn.Linear(16, 4)]
    return settled(nn.Sequential(*layers))  # type: ignore[return-value]


STEPS: list[Callable[[fx.GraphModule], object]] = [
    FoldBatchNorm(), CleanUp(), FactorizeLinear(params=0.9), Pipeline(FoldBatchNorm(), CleanUp(inference=True)),
]  # fmt: skip


@pytest.mark.parametrize("step", STEPS, ids=lambda step: type(step).__name__)
def test_files_and_copies(step: Callable[[fx.GraphModule], object], tmp_path: Path) -> None:
    x = torch.randn(6, 8, dtype=torch.float64)
    gm = fxwidth.trace(network(), x)
    step(gm)
    fxwidth.resize(gm, {group.name: max(2, group.width // 2) for group in fxwidth.analyze(gm).free}, data=[x])
    wanted = gm(x)
    with pytest.raises(fxwidth.FxwidthError, match=r"changed the nodes.*path that ends in '.pt2'"):
        fxwidth.save(gm, tmp_path / "x.safetensors")
    for copied in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert torch.equal(copied(x), wanted)
        assert copied.meta["fxwidth_rebuilt"] == gm.meta["fxwidth_rebuilt"]
        with pytest.raises(fxwidth.FxwidthError, match="changed the nodes of this graph"):
            fxwidth.save(copied, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
    for name in ("x.pt2", "x.pt"):
        fxwidth.save(gm, tmp_path / name)
        assert largest(fxwidth.load(tmp_path / name, trusted=True)(x), wanted) < 1e-12
    assert "fxwidth_rebuilt" in fxwidth.load(tmp_path / "x.pt", trusted=True).meta
    assert len(fxwidth.report(gm).resizes) == 1


def test_a_graph_that_no_pass_has_changed_goes_into_a_file_of_tensors(tmp_path: Path) -> None:
    x = torch.randn(6, 8, dtype=torch.float64)
    gm = fxwidth.trace(network(), x)
    Pipeline(PlanWidths(params=0.7), ResizeWidths(data=[x]))(gm)
    assert not FoldBatchNorm()(fxwidth.trace(nn.Linear(2, 2).eval(), torch.randn(2, 2))).modified
    fxwidth.save(gm, tmp_path / "x.safetensors")
    assert torch.equal(fxwidth.load(tmp_path / "x.safetensors", network, x)(x), gm(x))


def test_a_file_of_before_is_not_loaded_into_a_changed_graph(tmp_path: Path) -> None:
    x = torch.randn(6, 8, dtype=torch.float64)
    gm = fxwidth.trace(network(), x)
    fxwidth.save(gm, tmp_path / "x.safetensors")
    FoldBatchNorm()(gm)
    before, wanted = str(gm.graph), gm(x)
    with pytest.raises(fxwidth.FxwidthError):
        fxwidth.load(tmp_path / "x.safetensors", gm, x)
    assert str(gm.graph) == before
    assert torch.equal(gm(x), wanted)


def test_what_cannot_be_pickled_is_told_with_a_form_that_can(tmp_path: Path) -> None:
    x = torch.randn(6, 8, dtype=torch.float64)
    gm = fxwidth.trace(network(), x)
    CleanUp()(gm)
    gm.get_submodule("4").register_forward_hook(lambda *_: None)
    with pytest.raises(fxwidth.FxwidthError, match=r"save to a path that ends in '.pt2'"):
        fxwidth.save(gm, tmp_path / "x.pt")


def test_a_group_of_width_one_is_told_of() -> None:
    x = torch.randn(6, 8, dtype=torch.float64)
    gm = fxwidth.resize(fxwidth.trace(network(), x), {"0": 1})
    text = str(gm.graph)
    for one in (FoldBatchNorm(), CleanUp()):
        with pytest.raises(fxwidth.FxwidthError, match=f"Call {type(one).__name__} before a group is given width one"):
            one(gm)
    assert str(gm.graph) == text
