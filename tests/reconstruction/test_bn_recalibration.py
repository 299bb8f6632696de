"""Batch norm statistics after a resize."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth.errors import FxwidthError
from fxwidth.statistics import calibration_data
from tests.zoo.nets import images, trained_like


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6, momentum=0.37), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def calibrated(x: Tensor, *, training: bool = False) -> nn.Module:
    """Return a network whose running statistics are those of some inputs, layer after layer."""
    torch.manual_seed(0)
    model = trained_like(network())
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.BatchNorm2d):
                y = model[: list(model).index(layer)](x)
                layer.running_mean.copy_(y.mean((0, 2, 3)))
                layer.running_var.copy_(y.var((0, 2, 3), correction=0))
    return model.train(training)


def norms(gm: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in gm.modules() if isinstance(module, nn.BatchNorm2d)]


@torch.no_grad()
def seen(gm: nn.Module, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return mean and variance of what each batch norm is given in eval mode."""
    found: list[tuple[Tensor, Tensor]] = []
    handles = [
        norm.register_forward_pre_hook(
            lambda _, a: found.append((a[0].mean((0, 2, 3)), a[0].var((0, 2, 3), correction=0)))
        )
        for norm in norms(gm)
    ]
    copy.deepcopy(gm).eval() if not handles else gm.eval()(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("sizes", [(64,), (16, 16, 16, 16), (1, 30, 2, 31)])
def test_statistics_are_those_of_the_resized_network(sizes: tuple[int, ...]) -> None:
    x = images()
    gm = fxwidth.trace(calibrated(x), x[:4])
    fxwidth.resize(gm, {"0": 4, "3": 3, "7": 4}, data=x.split(sizes))
    for norm, (mean, variance) in zip(norms(gm), seen(gm, x), strict=True):
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(norm.running_var, variance, rtol=1e-10, atol=1e-9)


class TwoScales(nn.Module):
    """One batch norm for images and for smaller ones, which have fewer positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 6, 3, bias=False)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 3)

    def inputs_of_norm(self, x: Tensor) -> list[Tensor]:
        """Return what the batch norm is given, at either scale."""
        return [self.second(torch.relu(self.first(scale))) for scale in (x, nn.functional.avg_pool2d(x, 2) + 1)]

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of images."""
        large, small = (torch.relu(self.norm(values)).mean((2, 3)) for values in self.inputs_of_norm(x))
        logits: Tensor = self.head(large + small)
        return logits


@torch.no_grad()
def of_all_values(model: TwoScales, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance per channel over all values that the batch norm is given."""
    values = torch.cat([y.movedim(1, 0).flatten(1) for y in model.inputs_of_norm(x)], 1)
    return values.mean(1), values.var(1, correction=0)


def test_every_value_counts_the_same_where_a_batch_norm_is_used_at_two_scales() -> None:
    torch.manual_seed(0)
    x, model = images(size=12), trained_like(TwoScales())
    mean, variance = of_all_values(model, x)
    model.norm.running_mean.copy_(mean)
    model.norm.running_var.copy_(variance)
    gm = fxwidth.trace(model, x[:4])
    fxwidth.resize(gm, {"first": 3}, data=[x])
    assert fxwidth.report(gm).resizes[-1]["original"] == "resized"
    mean, variance = of_all_values(model, x)
    torch.testing.assert_close(model.norm.running_mean, mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.norm.running_var, variance, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("count", [100, 160, 161])
def test_how_the_data_are_cut_does_not_matter(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More data than are run at once, in one batch and in batches of unequal sizes."""
    monkeypatch.setattr(calibration_data, "_samples_at_once", lambda *_: 40)
    x = images(count)
    found = []
    for data in ([x], x.split((count - 70, 3, 1, 60, 6))):
        gm = fxwidth.trace(calibrated(x), x[:4])
        fxwidth.resize(gm, {"0": 4, "3": 3, "7": 4}, data=data)
        found.append(gm.state_dict())
    for one, other in zip(found[0].values(), found[1].values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_a_graph_that_takes_batches_of_one_size_alone() -> None:
    x = images(32)
    program = torch.export.export(calibrated(x), (x[:8],)).module()
    gm = fxwidth.trace(program, x[:8])
    plan = {group.name: group.width // 2 for group in fxwidth.analyze(gm).free[:1]}
    fxwidth.resize(gm, plan, data=x.split(8))
    assert gm.meta["fxwidth_history"][-1]["recalibrated"] is True


@pytest.mark.parametrize("recalibrate", [None, True])
@pytest.mark.parametrize(
    "norm",
    [
        nn.Identity,
        lambda: nn.GroupNorm(1, 8),
        lambda: nn.InstanceNorm2d(8),
        lambda: nn.BatchNorm2d(8, track_running_stats=False),
    ],
    ids=["none", "group norm", "instance norm", "batch norm without statistics"],
)
def test_without_running_statistics_none_are_corrected(norm: Callable[[], nn.Module], recalibrate: bool | None) -> None:
    x = images()
    model = nn.Sequential(nn.Conv2d(1, 8, 3), norm(), nn.ReLU(), nn.Conv2d(8, 4, 3)).double().eval()
    gm = fxwidth.trace(model, x[:4])
    fxwidth.resize(gm, {"0": 5}, data=[x], recalibrate=recalibrate)
    assert fxwidth.report(gm).resizes[-1]["recalibrated"] is False
    assert "recalibrated" not in str(fxwidth.report(gm))


def test_without_it_they_are_not() -> None:
    x = images()
    gm = fxwidth.trace(calibrated(x), x[:4])
    fxwidth.resize(gm, {"0": 3, "3": 2}, data=[x], recalibrate=False)
    assert gm.meta["fxwidth_history"][-1]["recalibrated"] is False
    ratios = torch.cat([norm.running_var / var for norm, (_, var) in zip(norms(gm), seen(gm, x), strict=True)])
    assert float((ratios - 1).abs().max()) > 1e-3


def test_other_inputs_than_those_of_training_move_only_what_the_resize_has_moved() -> None:
    x, other = images(), images(seed=2)[:8]
    gm = fxwidth.trace(calibrated(x), x[:4])
    before = [norm.running_var.clone() for norm in norms(gm)]
    with torch.no_grad():
        gm.get_parameter("3.weight")[:, 5] = 0
        expected = gm(x)
    fxwidth.resize(gm, {"0": 7}, data=[other])
    assert gm.meta["fxwidth_history"][-1]["recalibrated"] is True
    with torch.no_grad():
        torch.testing.assert_close(gm(x), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(norms(gm)[2].running_var, before[2], rtol=1e-9, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_else_changes(training: bool) -> None:
    x = images()
    gm, plain = (fxwidth.trace(calibrated(x, training=training), x[:4]) for _ in range(2))
    torch.manual_seed(5)
    fxwidth.resize(gm, {"0": 4}, data=[x])
    assert torch.initial_seed() == 5
    fxwidth.resize(plain, {"0": 4}, data=[x], recalibrate=False)
    assert all(module.training is training for module in gm.modules())
    assert [norm.momentum for norm in norms(gm)] == [0.1, 0.37, 0.1]
    changed = []
    for (name, one), (other, two) in zip(gm.state_dict().items(), plain.state_dict().items(), strict=True):
        assert name == other
        if not torch.equal(one, two):
            changed.append(name)
    assert changed
    assert all(name.endswith(("running_mean", "running_var")) for name in changed)


def test_exported_graphs_too() -> None:
    x = images()
    program = torch.export.export(calibrated(x), (x,)).module()
    gm = fxwidth.trace(program, x)
    plan = {group.name: group.width // 2 for group in fxwidth.analyze(gm).free[:1]}
    fxwidth.resize(gm, plan, data=[x])
    with torch.no_grad():
        assert gm(x).isfinite().all()


def test_a_generator_is_gone_through_once() -> None:
    x = images()
    count = 0

    def batches() -> Iterator[tuple[Tensor, int]]:
        nonlocal count
        for part in x.split(16):
            count += 1
            yield part, 0

    one, two = (fxwidth.trace(calibrated(x), x[:4]) for _ in range(2))
    fxwidth.evolve(one, data=batches(), params=0.6)
    assert count == 4
    fxwidth.evolve(two, data=x.split(16), params=0.6)
    assert one.meta["fxwidth_history"][-1]["recalibrated"] is True
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def nan_images() -> Tensor:
    x = images()
    x[3, 0, 2, 2] = torch.nan
    return x


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data gave no batches"),
        (iter([]), "data gave no batches"),
        ([nan_images()], "holds NaN or infinite values; leave such samples out"),
        ([(0, "a")], "batch 0 of data has 0 tensors, the graph takes 1"),
        ([{"pixels": images()}], r"batch 0 of data holds \['pixels'\] but no tensor"),
        ([images(channels=2)], "has shape"),
        (3, "data is a int; pass an iterable of batches"),
        ("ab", "data is a str; pass an iterable of batches"),
        ({"x": images()}, "data is a dict; pass an iterable of batches"),
    ],
)
@pytest.mark.parametrize("call", ["resize", "evolve", "plan", "spectrum"])
def test_bad_data_change_nothing(data: Any, message: str, call: str) -> None:
    x = images()
    gm = fxwidth.trace(calibrated(x), x[:4])
    before, code = {name: value.clone() for name, value in gm.state_dict().items()}, gm.code
    calls = {
        "resize": lambda: fxwidth.resize(gm, {"0": 4}, data=data),
        "evolve": lambda: fxwidth.evolve(gm, data=data, params=0.5),
        "plan": lambda: fxwidth.plan(fxwidth.analyze(gm), data=data, params=0.5),
        "spectrum": lambda: fxwidth.spectrum(fxwidth.analyze(gm), data=data),
    }
    with pytest.raises(FxwidthError, match=message):
        calls[call]()
    assert gm.code == code
    assert all(torch.equal(value, before[name]) for name, value in gm.state_dict().items())


@pytest.mark.parametrize("form", ["tensors", "tuples", "lists", "dicts", "dicts and targets", "one tensor"])
def test_data_of_every_form_say_the_same(form: str) -> None:
    x = images()
    y = torch.zeros(64, dtype=torch.long)
    forms: dict[str, Any] = {
        "tensors": [x],
        "tuples": [(x, y)],
        "lists": [[x, y]],
        "dicts": [{"input": x, "label": y}],
        "dicts and targets": [({"input": x}, y)],
        "one tensor": x,
    }
    gm, plain = (fxwidth.trace(calibrated(x), x[:4]) for _ in range(2))
    fxwidth.resize(gm, {"0": 4}, data=forms[form])
    fxwidth.resize(plain, {"0": 4}, data=[x])
    assert all(torch.equal(a, b) for a, b in zip(gm.state_dict().values(), plain.state_dict().values(), strict=True))


def test_singular_moments() -> None:
    """One constant image, from which nothing can be told about anything."""
    gm = fxwidth.trace(calibrated(images()), images()[:4])
    fxwidth.resize(gm, {"0": 4, "3": 2}, data=[torch.zeros(1, 1, 8, 8).double()])
    with torch.no_grad():
        assert gm(images()).isfinite().all()


def test_it_needs_data() -> None:
    gm = fxwidth.trace(calibrated(images()), images()[:4])
    with pytest.raises(FxwidthError, match="recalibrate=True needs data= to run the network on"):
        fxwidth.resize(gm, {"0": 4}, recalibrate=True)


def test_a_failure_on_the_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = images()
    gm = fxwidth.trace(calibrated(x), x[:4])
    before, code = {name: value.clone() for name, value in gm.state_dict().items()}, gm.code
    optimizer = torch.optim.Adam(gm.parameters())

    def fails(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr("fxwidth.reconstruction.bn_recalibration.Recalibration.corrected", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        fxwidth.resize(gm, {"0": 4}, data=[x], optimizer=optimizer)
    assert gm.code == code
    assert gm.get_submodule("0").out_channels == 8
    assert list(gm.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in gm.state_dict().items())
    assert {id(p) for p in gm.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}
