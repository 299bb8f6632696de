"""Batch norms folded into the layers before them: the same function, and nothing else changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_manager import PassManager

import fxwidth
from fxwidth.passes import AnalyzeWidths, FoldBatchNorm
from tests.passes.networks import Exported, Folded, images, largest, settled

ROUNDING = 1e-12


@pytest.mark.parametrize("kind", [Folded, Exported])
def test_the_folded_graph_does_the_same_and_the_model_keeps_its_own(kind: type[nn.Module]) -> None:
    model, x = settled(kind()), images()
    gm = fxwidth.trace(model, x)
    optimizer = torch.optim.Adam(gm.parameters())
    before, wanted, other = copy.deepcopy(model.state_dict()), model(x), images(7)
    assert FoldBatchNorm(optimizer)(gm).modified
    assert largest(gm(x), wanted) < ROUNDING
    assert largest(gm(other), model(other)) < ROUNDING
    assert not [name for name in gm.state_dict() if "norm" in name or "own" in name]
    assert not [node for node in gm.graph.nodes if "norm" in str(node.target) or "own" in str(node.target)]
    assert {*map(id, optimizer.param_groups[0]["params"])} == {*map(id, gm.parameters())}
    gm(x).square().mean().backward()
    optimizer.step()
    assert largest(gm(x), wanted) > 1e-6
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not FoldBatchNorm()(gm).modified


def _raw(model: nn.Module, x: Tensor) -> fx.GraphModule:
    return AnalyzeWidths(x)(fx.symbolic_trace(model)).graph_module


def test_a_model_of_which_nobody_knows_keeps_its_tensors_too() -> None:
    model, x = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())), images()
    wanted, before = model(x), copy.deepcopy(model.state_dict())
    gm = _raw(model, x)
    assert FoldBatchNorm()(gm).modified
    assert largest(gm(x), wanted) < ROUNDING
    assert torch.equal(model(x), wanted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_class_does_not_hold_what_is_folded() -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()))
    gm = fxwidth.trace(model, images())
    FoldBatchNorm()(gm)
    with pytest.raises(fxwidth.FxwidthError, match=r"Where a pass has folded or split layers since, .* write back bef"):
        fxwidth.write_back(gm, model)


def test_ops_without_training_are_folded() -> None:
    model, x = settled(nn.Sequential(nn.Conv2d(3, 4, 3, groups=1), nn.BatchNorm2d(4), nn.ReLU())), images()
    program = torch.export.export(model, (x,)).run_decompositions()
    gm = AnalyzeWidths(x)(program.module()).graph_module
    assert any("no_training" in str(node.target) or "convolution" in str(node.target) for node in gm.graph.nodes)
    wanted = model(x)
    assert FoldBatchNorm()(gm).modified
    assert largest(gm(x)[0] if isinstance(gm(x), tuple) else gm(x), wanted) < ROUNDING


class Read(nn.Module):
    """The result of the layer is read by another one too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.norm(x) + x


class Called(Read):
    """The layer is called twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.conv(2 * x)


class Tied(Read):
    """The weight of the layer is read elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.conv.weight.sum()


class Named(Read):
    """The weight of the layer is that of another one, which is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(3, 4, 1)
        self.other.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Positions(nn.Module):
    """A batch norm over positions, and not over the channels that the layer writes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Linear(8, 3), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x[:, 0]))


def _hooked(model: Any) -> None:
    model.conv.register_forward_hook(_double)


def _hooked_norm(model: Any) -> None:
    model.norm.register_full_backward_hook(_nothing)


def _weight_norm(model: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.conv)


def _training(model: Any) -> None:
    model.norm.train()


def _double(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return 2 * output


def _nothing(*_: Any) -> None:
    return None


class Plain(Read):
    """One that is folded, but for what is done to it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (Read, None), (Called, None), (Tied, None), (Named, None), (Positions, None),
        (Plain, _hooked), (Plain, _hooked_norm), (Plain, _weight_norm), (Plain, _training),
    ],
)  # fmt: skip
def test_what_is_read_elsewhere_or_runs_other_code_stays(
    kind: type[nn.Module], change: Callable[[Any], None] | None
) -> None:
    model, x = settled(kind()), images()
    if change is not None:
        change(model)
    gm = _raw(model, x)
    if change is _training:
        gm.get_submodule("norm").train()
    if kind is Named:
        gm.add_module("other", model.get_submodule("other"))
    text, wanted = str(gm.graph), gm(x)
    before = copy.deepcopy(gm.state_dict())
    assert not FoldBatchNorm()(gm).modified
    assert str(gm.graph) == text
    if change is not _training:
        assert torch.equal(gm(x), wanted)
        assert all(torch.equal(tensor, before[name]) for name, tensor in gm.state_dict().items())
    # The rest of the network shows that it would have been.
    assert kind is not Plain or FoldBatchNorm()(_raw(settled(Plain()), x)).modified


def test_a_graph_in_training_is_refused() -> None:
    gm = fxwidth.trace(settled(Folded()), images()).train()
    with pytest.raises(fxwidth.FxwidthError, match=r"FoldBatchNorm needs that it is in eval mode; call gm.eval\(\)"):
        FoldBatchNorm()(gm)
    with pytest.raises(fxwidth.FxwidthError, match="FoldBatchNorm needs a graph in eval mode"):
        FoldBatchNorm().call(gm)


def test_a_negative_variance_is_refused_and_nothing_changes() -> None:
    model, x = settled(Plain()), images()
    model.norm.running_var.fill_(-1)
    gm = _raw(model, x)
    text = str(gm.graph)
    with pytest.raises(fxwidth.FxwidthError, match=r"norm.running_var, by whose root batch norm divides"):
        FoldBatchNorm()(gm)
    assert str(gm.graph) == text


def test_a_folded_graph_is_resized_and_reported() -> None:
    model, x = settled(Folded()), images()
    gm = fxwidth.trace(model, x)
    before = copy.deepcopy(model.state_dict())
    PassManager([FoldBatchNorm()])(gm)
    fxwidth.resize(gm, {group.name: max(1, group.width // 2) for group in fxwidth.analyze(gm).free}, data=[x])
    assert fxwidth.report(gm).resizes[0]["original"] is None
    assert gm(images(5)).shape == (5, 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
