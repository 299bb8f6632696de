"""Batch norms right behind writers, and several readers of one basis, in the rotation of linear groups."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth.bases.channel_provenance import Place
from fxwidth.bases.linear_groups import linear_group
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.importance.estimates import Evidence, gather_evidence
from fxwidth.reconstruction import basis_change, norm_absorption
from fxwidth.reconstruction.basis_change import rotated
from fxwidth.rewriting.transaction import Transaction
from fxwidth.statistics.moments import moments_from_data
from fxwidth.tracing.analyze import analyze_module
from fxwidth.weights.readers import wiring_of
from tests.zoo.nets import tokens, trained_like
from tests.zoo.networks_of_norms import (
    NETS,
    WRITERS_AND_READERS,
    Heads,
    Parts,
    Spatial,
    change,
    images,
    made,
    measured,
    relative,
    traced,
    turned,
)


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_a_rotation_changes_no_function(name: str) -> None:
    gm, x, graph, found, moments = turned(name)
    writers, readers = WRITERS_AND_READERS[name]
    (change,) = found.changes
    assert (len(found.norms), len(change.basis.views)) == (writers, readers)
    before, expected = copy.deepcopy(gm.state_dict()), gm(x)
    transaction = Transaction()
    after = rotated(wiring_of(graph), found, moments, transaction)
    assert relative(gm(x), expected) < 1e-12
    changed = {key for key, value in gm.state_dict().items() if not torch.equal(value, before[key])}
    scales = {scale for norm in found.norms for scale in norm.scales}
    assert changed == {place.parameter for place in change.basis.places} | scales
    # The moments are those of the network as it is now.
    again = moments_from_data(graph, [x])
    assert again is not None
    for key in (view.readers.first.key for view in change.basis.views):
        new, old = after.contracted[key].covariance, again.contracted[key].covariance
        torch.testing.assert_close(new, old, rtol=1e-7, atol=1e-8)
    transaction.roll_back()
    assert all(torch.equal(value, before[key]) for key, value in gm.state_dict().items())


@pytest.mark.parametrize(("make", "groups", "bases"), [(Parts, 2, 1), (Heads, 1, 2)])
@torch.no_grad()
def test_a_batch_norm_may_belong_to_several_bases(make: type[nn.Module], groups: int, bases: int) -> None:
    torch.manual_seed(0)
    net, x = measured(trained_like(make()), tokens()), tokens()
    gm = fxwidth.trace(net, x[:4])
    graph = WidthGraph(analyze_module(gm))
    moments = moments_from_data(graph, [x])
    assert moments is not None
    expected = gm(x)
    found = [basis_change.rotation(graph, group, moments) for group in graph.free]
    changes = [one for one in found if one is not None]
    assert [len(one.changes) for one in changes] == [bases] * groups
    for one in changes:
        moments = rotated(wiring_of(graph), one, moments, Transaction())
    assert relative(gm(x), expected) < 1e-12
    # Its variances are those of what it is given now.
    variance = gm.get_buffer("norm.running_var").clone()
    torch.testing.assert_close(variance, measured(gm, x).norm.running_var, rtol=1e-2, atol=0)


@pytest.mark.parametrize("has_data", [True, False])
@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_it_loses_less_than_a_subset(name: str, has_data: bool) -> None:
    errors = {}
    for rotate in (True, False):
        net, x = made(name)
        gm = fxwidth.trace(measured(net, x), x[:4])
        group, expected = fxwidth.analyze(gm)[NETS[name][2]], gm(x)
        fxwidth.resize(gm, {group.name: group.width // 2}, data=[x] if has_data else None, rotate=rotate)
        errors[rotate] = relative(gm(x), expected)
    assert errors[True] < errors[False]


@pytest.mark.parametrize("name", NETS)
def test_half_of_the_new_channels_is_predicted_to_do_better_than_a_subset(name: str) -> None:
    _, x, graph, group = traced(name)
    evidence = gather_evidence(graph, [x], rotates=True)
    plain = evidence.unrotated()
    half = group.width // 2
    assert evidence.rotation(group) is not None
    assert evidence.errors(group)[half] < plain.errors(group)[half]


def test_a_basis_that_does_worse_than_a_subset_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    worse = lambda pairs, _: np.linspace(3.0, 2.9, pairs.width + 1)  # noqa: E731
    monkeypatch.setattr("fxwidth.reconstruction.basis_change.lost_share", worse)
    _, x, graph, group = traced("mobile")
    evidence = gather_evidence(graph, [x], rotates=True)
    assert evidence.rotation(group) is None
    monkeypatch.undo()
    assert gather_evidence(graph, [x], rotates=True).rotation(group) is not None


def of_rank(rank: int) -> tuple[nn.Module, Tensor]:
    """Return a network all of whose layers in front of the bottleneck's batch norms write to the same subspace."""
    net, x = made("mobile")
    parts = dict(net.named_modules())
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(8, rank, generator=generator).double() / rank**0.5
    layers = {"project": "norm", "blocks.0.project": "blocks.0.last", "blocks.1.project": "blocks.1.last"}
    for layer, norm in layers.items():
        weight = parts[layer].weight
        rows = torch.randn(rank, weight[0].numel(), generator=generator).double() / weight[0].numel() ** 0.5
        scale = 0.5 + torch.rand(8, generator=generator).double()
        # What the batch norm makes of the layer has the rank; the layer alone has it in another basis.
        weight.copy_((scale[:, None] * (mixing @ rows)).reshape(weight.shape))
        measured(net, x)
        parts[norm].weight.copy_((parts[norm].running_var + parts[norm].eps).sqrt() / scale)
        parts[norm].bias.copy_(mixing @ torch.randn(rank, generator=generator).double())
    return measured(net, x), x


@pytest.mark.parametrize("has_data", [True, False])
@torch.no_grad()
def test_a_bottleneck_shrinks_to_its_rank(has_data: bool) -> None:
    net, x = of_rank(5)
    gm = fxwidth.trace(net, x[:4])
    expected, below = gm(x), copy.deepcopy(gm)
    fxwidth.resize(gm, {"project": 5}, data=[x] if has_data else None)
    assert relative(gm(x), expected) < 1e-8
    fxwidth.resize(below, {"project": 4}, data=[x] if has_data else None)
    assert relative(below(x), expected) > 1e-3


@pytest.mark.parametrize("name", ["mobile", "vectors"])
@torch.no_grad()
def test_in_training_the_network_stays_close(name: str) -> None:
    net, x = made(name)
    gm = fxwidth.trace(measured(net, x), x[:4])
    graph = WidthGraph(analyze_module(gm))
    moments = moments_from_data(graph, [x])
    assert moments is not None
    found = Evidence(graph, moments, rotates=True).rotation(graph[NETS[name][2]])
    assert found is not None
    expected = copy.deepcopy(gm).train()(x)
    rotated(wiring_of(graph), found, moments, Transaction())
    assert relative(copy.deepcopy(gm).train()(x), expected) < 0.02
    # A batch norm that has another variance than its channels does not train like the old one.
    gm.get_buffer(found.norms[0].variance).fill_(100.0)
    gm.get_parameter(found.norms[0].weight).fill_((100.0 + found.norms[0].eps) ** 0.5)
    assert relative(gm.train()(x), expected) > 0.1


@torch.no_grad()
def test_a_batch_norm_knows_the_variance_of_its_new_channels() -> None:
    net, x = made("mobile")
    gm = fxwidth.trace(measured(net, x), x[:4])
    fxwidth.resize(gm, {"project": 4}, data=[x], recalibrate=False)
    kept = gm.norm.running_var.clone(), gm.norm.running_mean.clone()
    measured(gm, x)
    torch.testing.assert_close(kept, (gm.norm.running_var, gm.norm.running_mean), rtol=1e-2, atol=1e-6)


@torch.no_grad()
def test_statistics_are_compared_with_those_of_the_rotated_network() -> None:
    states = []
    for recalibrate in (True, False):
        gm, x, _, group = traced("mobile")
        fxwidth.resize(gm, {group.name: 4}, data=[x], recalibrate=recalibrate)
        assert gm.meta["fxwidth_history"][-1]["recalibrated"] is recalibrate
        states.append(gm.state_dict())
    # What is put into the first writer is as it was, so that its statistics are right already.
    for name in ("norm.running_mean", "norm.running_var"):
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-9, atol=1e-12)
    # Those behind the first reader see what is lost.
    assert relative(states[0]["blocks.0.first.running_var"], states[1]["blocks.0.first.running_var"]) > 1e-4


@torch.no_grad()
def test_what_loses_nothing_is_not_recalibrated() -> None:
    net, x = of_rank(5)
    gm = fxwidth.trace(net, x[:4])
    expected = gm(x)
    fxwidth.resize(gm, {"project": 5}, data=[x], recalibrate=True)
    assert relative(gm(x), expected) < 1e-8


def without_scales(net: nn.Module) -> None:
    net.norm = nn.BatchNorm2d(8, affine=False).double().eval()


def own_statistics(net: nn.Module) -> None:
    net.norm = nn.BatchNorm2d(8, track_running_stats=False).double().eval()


def shared(net: nn.Module) -> None:
    net.blocks[0].last = net.norm


def shared_layer(net: nn.Module) -> None:
    net.blocks[0].project = net.blocks[1].project


def nonlinear(net: nn.Module) -> None:
    net.norm = nn.Sequential(net.norm, nn.ReLU6())


def nonlinear_layer(net: nn.Module) -> None:
    net.project = nn.Sequential(net.project, nn.ReLU6())


class TwiceRead(Spatial):
    """What the layer writes is read beside its batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.head(self.second(self.norm(y) + y).relu())


class AddedBefore(Spatial):
    """A batch norm of a sum."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(x) + self.first(x.flip(-1)))).relu())


@pytest.mark.parametrize("spoil", [without_scales, own_statistics, shared, shared_layer, nonlinear, nonlinear_layer])
@torch.no_grad()
def test_what_is_not_one_linear_map_of_its_own_keeps_its_basis(spoil: Callable[[nn.Module], None]) -> None:
    net, x = made("mobile")
    spoil(net)
    gm = fxwidth.trace(net, x[:4])
    graph = WidthGraph(analyze_module(gm))
    assert [group.name for group in graph.free if linear_group(graph, group) is not None] == []


@pytest.mark.parametrize("make", [TwiceRead, AddedBefore])
def test_a_layer_that_others_read_too_keeps_its_basis(make: type[nn.Module]) -> None:
    graph = WidthGraph(analyze_module(fxwidth.trace(trained_like(make()), images()[:4])))
    assert [group.name for group in graph.free if linear_group(graph, group) is not None] == []


@pytest.mark.parametrize("where", ["norm", "blocks.1.last"])
@torch.no_grad()
def test_a_variance_that_is_none_keeps_the_basis(where: str) -> None:
    net, x = made("mobile")
    net.get_submodule(where).running_var[2] = -1e-7
    gm = fxwidth.trace(net, x[:4])
    graph = WidthGraph(analyze_module(gm))
    assert gather_evidence(graph, [x], rotates=True).rotation(graph["project"]) is None
    expected = copy.deepcopy(gm.state_dict())
    fxwidth.resize(gm, {"project": 7}, data=[x], recalibrate=False)
    old, new = expected["project.weight"], gm.get_parameter("project.weight")
    assert all(bool((old == row).flatten(1).all(1).any()) for row in new)


@torch.no_grad()
def test_a_variance_that_is_not_a_number_is_refused() -> None:
    net, x = made("mobile")
    gm = fxwidth.trace(net, x[:4])
    gm.get_buffer("norm.running_var")[2] = torch.nan
    with pytest.raises(fxwidth.FxwidthError, match=r"norm\.running_var holds"):
        fxwidth.resize(gm, {"project": 4}, data=[x])


def test_the_whole_of_mobilenet_keeps_its_function() -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    net = trained_like(torchvision.models.mobilenet_v2(width_mult=0.5))
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    gm = fxwidth.trace(net, x)
    graph = WidthGraph(analyze_module(gm))
    moments = moments_from_data(graph, [x])
    assert moments is not None
    with torch.no_grad():
        expected = gm(x)
        found = [basis_change.rotation(graph, group, moments) for group in graph.free]
        changes = [one for one in found if one is not None]
        assert len(changes) == 7
        assert sum(len(one.norms) for one in changes) == 17
        for one in changes:
            moments = rotated(wiring_of(graph), one, moments, Transaction())
        assert relative(gm(x), expected) < 1e-10


def test_a_wrong_order_of_channels_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = basis_change._turned_place

    def wrong(tensor: Tensor, place: Place, one: basis_change.BasisChange) -> Tensor:
        positions = place.positions[::-1].copy() if place.parameter == "norm.bias" else place.positions
        return right(tensor, Place(place.parameter, place.dim, positions, place.inverse), one)

    assert change("mobile") < 1e-12
    monkeypatch.setattr(basis_change, "_turned_place", wrong)
    assert change("mobile") > 1e-3


@pytest.mark.parametrize("fault", ["sign of gains", "no eps", "mean without scale"])
def test_a_wrong_scale_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = norm_absorption._values

    def wrong(graph: WidthGraph, name: str) -> Tensor:
        values = right(graph, name)
        if fault == "sign of gains" and name == "norm.weight":
            return values.abs()
        if fault == "no eps" and name == "norm.running_var":
            return values + 1e-2
        return values * 1.1 if fault == "mean without scale" and name == "norm.running_mean" else values

    assert change("mobile") < 1e-12
    monkeypatch.setattr(norm_absorption, "_values", wrong)
    assert change("mobile") > 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@torch.no_grad()
def test_a_channel_that_never_varies_is_not_divided_by_zero(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float
) -> None:
    spread = basis_change._turned_spread
    monkeypatch.setattr(basis_change, "_turned_spread", lambda *args: (spread(*args)[0], spread(*args)[1] * 0))
    net, x = made("vectors")
    net, x = net.to(dtype), x.to(dtype)
    net[1].eps = 1e-300  # type: ignore[index]  # none in single precision, but more than 0, which torch 2.11 refuses
    gm = fxwidth.trace(net, x[:4])
    graph = WidthGraph(analyze_module(gm))
    moments = moments_from_data(graph, [x])
    assert moments is not None
    found, expected = basis_change.rotation(graph, graph["0"], moments), gm(x)
    assert found is not None
    rotated(wiring_of(graph), found, moments, Transaction())
    assert relative(gm(x), expected) < tolerance
