"""Resizing keeps what it promises: function, shapes, attributes, and everything on failure."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import fxwidth
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.statistics.moments import moments_from_noise
from fxwidth.verification.replay_oracle import reference_outputs
from tests.zoo.models import FULL_SIZE, SMALL, build, relative_difference

EXACT = 1e-10
ALL = [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in FULL_SIZE)]


@pytest.fixture(autouse=True)
def _little_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is dropped here is dead, so that little evidence is enough; convolutions in float64 are slow."""
    monkeypatch.setattr("fxwidth.statistics.remembered_noise.moments_from_noise", partial(moments_from_noise, work=1e6))


def traced(name: str, dtype: torch.dtype = torch.float64) -> tuple[fx.GraphModule, Tensor]:
    model, x = build(name, dtype)
    return fxwidth.trace(model, x), x


def widths(gm: fx.GraphModule, groups: Iterable[str]) -> dict[str, int]:
    wg = fxwidth.analyze(gm)
    return {group: wg[group].width for group in groups}


def growth_plan(wg: fxwidth.WidthGraph) -> dict[str, int]:
    """Grow every group that can be, by one to five channels."""
    exact = [group for group in wg.free if group.inexact_growth is None]
    return {group.name: group.width + 1 + i % 5 for i, group in enumerate(exact)}


@pytest.mark.parametrize("name", ALL)
def test_growth_keeps_the_function_and_shrinking_back_restores_it(name: str) -> None:
    gm, x = traced(name)
    before = gm(x)
    wg = fxwidth.analyze(gm)
    plan = growth_plan(wg)
    assert plan, "nothing can be grown"
    old = widths(gm, plan)
    fxwidth.resize(gm, plan)
    assert widths(gm, plan) == plan
    assert relative_difference(gm(x), before) < EXACT
    fxwidth.resize(gm, old)
    assert relative_difference(gm(x), before) < EXACT
    assert widths(gm, plan) == old


@pytest.mark.parametrize("name", ["resnet18", "vit", pytest.param("rms_transformer", marks=pytest.mark.slow)])
def test_growth_in_float32(name: str) -> None:
    gm, x = traced(name, torch.float32)
    before = gm(x)
    fxwidth.resize(gm, growth_plan(fxwidth.analyze(gm)))
    assert relative_difference(gm(x), before) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_growth_of_each_group_alone(name: str) -> None:
    gm, x = traced(name)
    before = gm(x)
    for group, width in growth_plan(fxwidth.analyze(gm)).items():
        old = fxwidth.analyze(gm)[group].width
        fxwidth.resize(gm, {group: width})
        assert relative_difference(gm(x), before) < EXACT, group
        fxwidth.resize(gm, {group: old})
        assert relative_difference(gm(x), before) < EXACT, group


def some_channels(width: int, count: int) -> np.ndarray:
    return np.sort(np.random.default_rng(width).permutation(width)[:count])


@pytest.mark.parametrize("name", ALL)
def test_halving_every_group_matches_the_replay_oracle(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gm, x = traced(name)
    wg = fxwidth.analyze(gm, x)
    channels = {group.name: some_channels(group.width, max(1, group.width // 2)) for group in wg.free}
    kept = {wg[name].factor: own for name, own in channels.items()}
    reference = reference_outputs(wg.analysis, IndexMaps(wg.analysis.space, kept), [x])
    # Gains are rescaled for the dropped part of a sum, which the oracle does not do.
    monkeypatch.setattr("fxwidth.resizing.parameters.variance_ratio", lambda *_: 1.0)
    fxwidth.resize(gm, {name: own.tolist() for name, own in channels.items()}, fold=False)
    assert relative_difference(gm(x), reference[0]) < EXACT
    assert gm(torch.cat([x, x[:1]])).shape[0] == len(x) + 1, "another batch size"
    train_a_step(gm, x)


def train_a_step(gm: fx.GraphModule, x: Tensor) -> None:
    gm.train()
    optimizer = torch.optim.SGD(gm.parameters(), lr=1e-3)
    old = [parameter.clone() for parameter in gm.parameters()]
    gm(x).square().mean().backward()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(old, gm.parameters(), strict=True))


@pytest.mark.parametrize("name", ALL)
def test_removing_channels_that_nobody_reads_or_writes_keeps_the_function(name: str) -> None:
    gm, x = traced(name)
    wg = fxwidth.analyze(gm)
    dead = {group.name: np.arange(0, group.width, 3) for group in wg.free if group.mixed is None and group.width > 3}
    silence(wg, dead)
    before = gm(x)
    fxwidth.resize(gm, {group: wg[group].width - len(gone) for group, gone in dead.items()})
    assert relative_difference(gm(x), before) < EXACT


def silence(wg: fxwidth.WidthGraph, dead: dict[str, np.ndarray]) -> None:
    """Zero the slices of channels in everything that reads or writes them."""
    maps = IndexMaps(
        wg.analysis.space, {wg[g].factor: np.setdiff1d(np.arange(wg[g].width), c) for g, c in dead.items()}
    )
    with torch.no_grad():
        for entry in wg.analysis.parameters.values():
            for dim, axis in enumerate(entry.axes):
                if maps.changes(axis) and "running_var" not in entry.name:
                    gone = np.setdiff1d(np.arange(entry.tensor.shape[dim]), maps.indices(axis))
                    entry.tensor.index_fill_(dim, torch.from_numpy(gone), 0)


def test_attributes_follow_the_parameters() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.GroupNorm(4, 8),
        nn.Flatten(),
        nn.Linear(128, 5),
    )
    gm = fxwidth.trace(model.eval(), torch.randn(2, 3, 8, 8))
    fxwidth.resize(gm, {"3#0": 3} if "3#0" in fxwidth.analyze(gm) else {fxwidth.analyze(gm).free[0].name: 3})
    conv, norm, depthwise, group_norm, _, linear = (gm.get_submodule(str(i)) for i in range(6))
    assert (conv.out_channels, norm.num_features) == (6, 6)
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (6, 6, 6)
    assert (group_norm.num_groups, group_norm.num_channels) == (3, 6)
    assert linear.in_features == 96


def test_instance_norms_follow() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.InstanceNorm2d(8), nn.Conv2d(8, 4, 3)
    )
    gm = fxwidth.trace(model.double().eval(), torch.randn(3, 3, 9, 9).double())
    x = torch.randn(5, 3, 9, 9).double()
    before = gm(x)
    fxwidth.resize(gm, {"0": 11})
    assert relative_difference(gm(x), before) < EXACT
    assert [gm.get_submodule(name).num_features for name in "12"] == [11, 11]


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.hidden = nn.Linear(8, 8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.hidden(self.embed(x))))

    gm = fxwidth.trace(Tied().eval(), torch.randint(0, 11, (2, 4)))
    tied = list(fxwidth.analyze(gm).free)
    fxwidth.resize(gm, {group.name: 5 for group in tied})
    assert gm.embed.weight is gm.head.weight
    assert gm.embed.weight.shape == (11, 5)


def test_a_failure_half_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gm, x = traced("vit")
    before, code = gm(x), gm.code
    parameters = dict(gm.named_parameters())
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1, momentum=0.9)

    def fails(*_: object) -> None:
        raise fxwidth.FxwidthError("planted")

    monkeypatch.setattr("fxwidth.resizing.edits.plan_optimizer_update", fails)
    with pytest.raises(fxwidth.FxwidthError, match="planted"):
        fxwidth.resize(gm, {"encoder.layers.encoder_layer_0.mlp.0": 7}, optimizer=optimizer)
    assert gm.code == code
    assert all(parameters[name] is parameter for name, parameter in gm.named_parameters())
    assert gm.get_submodule("encoder.layers.encoder_layer_0.mlp.0").out_features == 48
    assert torch.equal(gm(x), before)


def test_scales_computed_from_sizes_keep_their_trained_value() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x)
            return self.down(y / y.shape[-1] ** 0.5)

    gm = fxwidth.trace(Scaled().double().eval(), torch.randn(4, 6).double())
    x = torch.randn(4, 6).double()
    before = gm(x)
    fxwidth.resize(gm, {"up": 21})
    assert relative_difference(gm(x), before) < EXACT


@pytest.mark.parametrize("name", [pytest.param("resnet18", marks=pytest.mark.slow), "vit"])
def test_models_made_in_inference_mode_are_resized_like_others(name: str) -> None:
    results = []
    for is_inference in (False, True):
        with torch.inference_mode(is_inference):
            gm, x = traced(name)
        plan = {group.name: group.width // 2 for group in fxwidth.analyze(gm).free}
        with torch.no_grad():
            results.append(fxwidth.resize(gm, plan)(x))
    assert torch.equal(*results)


def test_a_failure_changes_nothing_in_inference_mode_either(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        gm, x = traced("resnet18")
    tensors = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    code = gm.code
    plan = {group.name: group.width // 2 for group in fxwidth.analyze(gm).free}

    def failing(*_: object) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr("fxwidth.resizing.edits.Edits.recalibrate", failing)
    with pytest.raises(RuntimeError, match="on purpose"):
        fxwidth.resize(gm, plan, data=[x])
    assert gm.code == code
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in gm.state_dict().items())


def test_what_is_resized_in_inference_mode_can_be_trained() -> None:
    gm, x = traced("resnet18")
    optimizer = torch.optim.Adam(gm.train().parameters())
    gm(x).square().sum().backward()
    optimizer.step()
    with torch.inference_mode():
        fxwidth.resize(gm, {group.name: group.width // 2 for group in fxwidth.analyze(gm).free}, optimizer=optimizer)
    before = [parameter.detach().clone() for parameter in gm.parameters()]
    gm(x).square().sum().backward()
    optimizer.step()
    assert not any(map(torch.equal, gm.parameters(), before))
