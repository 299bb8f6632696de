"""Channels that a plan names are those that stay, and sites tell where they lie."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import fxwidth
from fxwidth import FxwidthError, Plan
from fxwidth.passes import ResizeWidths
from fxwidth.runtime.tensor_slots import named_tensors
from tests.zoo import models, nets
from tests.zoo.networks import CASES

PLAIN: dict[str, Any] = {"fold": False, "rotate": False, "recalibrate": False}


def _of_nets(name: str) -> tuple[fx.GraphModule, list[Tensor]]:
    make, inputs = nets.NETS[name]
    torch.manual_seed(0)
    x = inputs()[:4]
    return fxwidth.trace(nets.trained_like(make()), x), [x]


def _of_models(name: str) -> tuple[fx.GraphModule, list[Tensor]]:
    model, x = models.build(name)
    return fxwidth.trace(model, x), [x]


def _of_cases(name: str) -> tuple[fx.GraphModule, list[Tensor]]:
    torch.manual_seed(0)
    inputs = CASES[name].inputs()
    return fxwidth.trace(models.set_apart(CASES[name].build()).eval(), tuple(inputs)), inputs


NETWORKS: dict[str, tuple[Callable[[str], tuple[fx.GraphModule, list[Tensor]]], str]] = {
    **{name: (_of_nets, name) for name in nets.NETS},
    **{name: (_of_models, name) for name in models.SMALL},
    # What is traced here has a parameter named as fx names its own code.
    **{name: (_of_cases, name) for name in CASES if CASES[name].free and name != "MadeByLayer"},
}
# Those with concatenations, flattened channels, heads, and grouped convolutions; the others take longer.
QUICK = (*nets.NETS, "squeezenet1_1", "vit", "rms_transformer")
EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NETWORKS]


def some_channels(graph: fxwidth.WidthGraph, seed: int = 0) -> dict[str, list[int]]:
    """Return some channels of each free group, about two of three."""
    choices = random.Random(seed)
    sizes = {group: max(group.least.width, group.width - max(1, group.width // 3)) for group in graph.free}
    return {group.name: sorted(choices.sample(range(group.width), size)) for group, size in sizes.items()}


def of_positions(graph: fxwidth.WidthGraph, kept: dict[str, list[int]]) -> dict[str, Tensor]:
    """Return parameters and buffers without the positions of channels that do not stay."""
    left: dict[tuple[str, int], np.ndarray] = {}
    for name, channels in kept.items():
        for site in graph[name].sites:
            assert len(site.positions) == graph[name].width
            tensor = graph.analysis.parameters[site.parameter].tensor
            stay = left.setdefault((site.parameter, site.dim), np.full(tensor.shape[site.dim], True))
            for channel in set(range(graph[name].width)) - set(channels):
                stay[site.positions[channel]] = False
    result = {name: entry.tensor.detach().clone() for name, entry in graph.analysis.parameters.items()}
    for (name, dim), stay in left.items():
        result[name] = result[name].index_select(dim, torch.from_numpy(np.flatnonzero(stay)))
    return result


@pytest.mark.parametrize("name", EACH)
def test_what_stays_lies_where_sites_say(name: str) -> None:
    build, own = NETWORKS[name]
    gm, _ = build(own)
    graph = fxwidth.analyze(gm)
    kept = some_channels(graph)
    for group in graph.groups:
        # Those that are pinned lie somewhere too.
        assert all(len(site.positions) == group.width and all(map(len, site.positions)) for site in group.sites)
    expected = of_positions(graph, kept)
    fxwidth.resize(gm, kept, **PLAIN)
    record = fxwidth.report(gm).resizes[-1]
    assert record["kept"] == {n: own for n, own in kept.items() if len(own) < graph[n].width}
    tensors = named_tensors(gm)
    for parameter, tensor in expected.items():
        assert tensors[parameter].shape == tensor.shape, parameter
        # Gains make up for what a norm sees less of, and reparametrised weights for what their norms lose.
        if parameter not in record["norms"] and "parametrizations" not in parameter:
            assert torch.equal(tensors[parameter], tensor), parameter


def network() -> nn.Module:
    """Return layers with batch norm, a linear bottleneck behind them, and a softmax over channels."""
    torch.manual_seed(0)
    return nets.trained_like(
        nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4), nn.Softmax(-1), nn.Linear(4, 3),
        )
    )  # fmt: skip


X = nets.images(16)
PLAN = {"0": [1, 2, 7], "3": [0, 5], "4": 5}


def traced() -> fx.GraphModule:
    return fxwidth.trace(network(), X[:4])


def same(one: fx.GraphModule, other: fx.GraphModule) -> bool:
    mine, others = one.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


def left_by_a_pass(gm: fx.GraphModule) -> None:
    gm.meta["fxwidth_plan"] = PLAN
    ResizeWidths(data=[X])(gm)


WAYS: dict[str, Callable[[fx.GraphModule], Any]] = {
    "Plan": lambda gm: fxwidth.resize(gm, Plan(PLAN), data=[X]),
    "a dict of a Plan": lambda gm: fxwidth.resize(gm, dict(Plan(PLAN)), data=[X]),
    "JSON": lambda gm: fxwidth.resize(gm, Plan.from_json(Plan(PLAN).to_json()), data=[X]),
    "tuples": lambda gm: fxwidth.resize(gm, {"0": (1, 2, 7), "3": range(0, 6, 5), "4": 5}, data=[X]),
    "numbers": lambda gm: fxwidth.resize(gm, {**PLAN, "0": np.array([1, 2, 7]), "4": np.int64(5)}, data=[X]),
    "tensors": lambda gm: fxwidth.resize(gm, {**PLAN, "0": torch.tensor([1, 2, 7]), "4": torch.tensor(5)}, data=[X]),
    "a pass": ResizeWidths(PLAN, data=[X]),
    "the plan of a pass": left_by_a_pass,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_and_every_form_leads_to_the_same_network(way: str) -> None:
    models = network(), network()  # held: both are told of
    wanted, gm = (fxwidth.trace(model, X[:4]) for model in models)
    fxwidth.resize(wanted, PLAN, data=[X])
    WAYS[way](gm)
    assert same(gm, wanted)
    record = fxwidth.report(gm).resizes[-1]
    assert record == fxwidth.report(wanted).resizes[-1]
    assert record["widths"] == {"0": [8, 3], "3": [6, 2], "4": [8, 5]}
    assert {name: record["kept"][name] for name in ("0", "3")} == {"0": [1, 2, 7], "3": [0, 5]}
    assert record["named"] == ["0", "3"]
    assert "0: 8 -> 3, channels named by the plan" in str(fxwidth.report(gm))
    assert "4: 8 -> 5\n" in f"{fxwidth.report(gm)}\n"


@pytest.mark.parametrize("data", [None, [X]], ids=["noise", "data"])
def test_the_channels_that_a_method_chooses_lead_to_its_network(data: Any) -> None:
    """Readers take over dropped channels alike, whoever names those that stay."""
    chosen, named = traced(), traced()
    fxwidth.resize(chosen, {"0": 3, "3": 2, "4": 5}, data=data, rotate=False)
    kept = fxwidth.report(chosen).resizes[-1]["kept"]
    assert {name: len(own) for name, own in kept.items()} == {"0": 3, "3": 2, "4": 5}
    fxwidth.resize(named, kept, data=data)
    assert same(named, chosen)


def test_a_group_keeps_its_basis_where_its_channels_are_named() -> None:
    turned, named = traced(), traced()
    fxwidth.resize(turned, {"3": 2, "0": 5}, data=[X])
    record = fxwidth.report(turned).resizes[-1]
    assert record["rotated"] == ["3"]
    assert list(record["kept"]) == ["0"]
    fxwidth.resize(named, {"3": [0, 5]}, data=[X])
    record = fxwidth.report(named).resizes[-1]
    assert record["rotated"] == []
    old, new = network().state_dict(), named.state_dict()
    assert all(torch.equal(new[name], old[name][[0, 5]]) for name in ("3.weight", "3.bias"))


@pytest.mark.parametrize("why", ["rotate", "fold", "optimizer"])
def test_a_group_keeps_its_basis_where_it_is_not_to_change(why: str) -> None:
    """Without folds nobody would use another basis, and an optimizer's state is of the one that there is."""
    gm = traced()
    options = {"optimizer": torch.optim.SGD(gm.parameters(), 0.1)} if why == "optimizer" else {why: False}
    fxwidth.resize(gm, {"3": 2}, data=[X], **options)
    record = fxwidth.report(gm).resizes[-1]
    assert record["rotated"] == []
    old, new = network().state_dict(), gm.state_dict()
    (kept,) = record["kept"].values()
    assert all(torch.equal(new[name], old[name][kept]) for name in ("3.weight", "3.bias"))


def test_nothing_is_looked_at_where_all_channels_are_named_and_nothing_is_folded(monkeypatch: Any) -> None:
    def unasked(*_: object) -> None:
        raise AssertionError("moments were asked for")

    monkeypatch.setattr("fxwidth.resizing.channel_selection.gather_evidence", unasked)
    gm = traced()
    fxwidth.resize(gm, {"0": [1, 2, 7], "3": [0, 5]}, fold=False)
    assert "channels chosen" not in str(fxwidth.report(gm))
    with pytest.raises(AssertionError, match="moments were asked for"):
        fxwidth.resize(traced(), PLAN, fold=False)


def test_the_state_of_an_optimizer_follows() -> None:
    gm = traced()
    optimizer = torch.optim.Adam(gm.parameters())
    gm(X).square().sum().backward()
    optimizer.step()
    graph = fxwidth.analyze(gm)
    before = {name: optimizer.state[parameter]["exp_avg"].clone() for name, parameter in gm.named_parameters()}
    site = next(site for site in graph["0"].sites if site.parameter == "3.weight")
    places = np.concatenate([site.positions[channel] for channel in PLAN["0"]])
    fxwidth.resize(gm, {"0": PLAN["0"]}, optimizer=optimizer, **PLAIN)
    after = optimizer.state[gm.get_parameter("3.weight")]["exp_avg"]
    assert torch.equal(after, before["3.weight"][:, places])


def test_growth_keeps_all_channels_and_all_of_them_named_change_nothing() -> None:
    gm = traced()
    fxwidth.resize(gm, {"4": 10})
    assert fxwidth.report(gm).resizes[-1]["kept"] == {"4": list(range(8))}
    fxwidth.resize(gm, {"4": range(10), "10": [0, 1, 2]})
    assert len(fxwidth.report(gm).resizes) == 1


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"0": [0, 8]}, r"channel 8 of group '0', whose channels are 0 to 7. Name channels.*to grow .* give it a width"),
    ({"0": list(range(9))}, "channel 8 of group '0', whose channels are 0 to 7"),
    ({"0": [0, 0, 1]}, r"of group '0' the channels \[0, 0, 1\], but they must be ascending, each once. Give those"),
    ({"0": [2, 1]}, r"the channels \[2, 1\], but they must be ascending"),
    ({"0": [-1, 2]}, r"the channels \[-1, 2\], but -1 is none: a channel is an integer from 0.*grows by a width"),
    ({"0": []}, r"of group '0' the channels \[\], but at least one channel stays"),
    ({"0": [True, False]}, "but True is none: a channel is an integer from 0"),
    ({"0": [0, 1.5]}, "but 1.5 is none"),
    ({"0": [0, None]}, "but None is none"),
    ({"0": [[0, 1]]}, r"but \[0, 1\] is none"),
    ({"0": torch.tensor([0.5])}, "but 0.5 is none"),
    ({"0": "012"}, "the plan gives group '0' the width '012'"),
    ({"0": {0, 1}}, r"the plan gives group '0' the width \{0, 1\}; a width is an integer"),
    ({"10": [0, 2]}, "group '10' must keep its width 3: the size of the model's output.*Remove it from the plan"),
    ({"8": [2]}, r"group '8' cannot shrink from 4 to 1 \(channels \[2\]\): .*Its least width is 2"),
    ({"4": 5, "nothing": [0]}, "there is no channel group 'nothing'"),
]


@pytest.mark.parametrize(("plan", "words"), REFUSED)
def test_what_cannot_be_is_refused_and_nothing_changes(plan: dict[str, Any], words: str) -> None:
    gm = traced()
    before, code, parameters = gm(X), gm.code, [id(parameter) for parameter in gm.parameters()]
    for way in (lambda: fxwidth.resize(gm, plan), lambda: ResizeWidths(plan)(gm)):
        with pytest.raises(FxwidthError, match=words):
            way()
    assert torch.equal(gm(X), before)
    assert gm.code == code
    assert [id(parameter) for parameter in gm.parameters()] == parameters


def loaded(path: Path) -> fx.GraphModule:
    return fxwidth.load(path, network(), X[:4]) if path.suffix == ".safetensors" else fxwidth.load(path, trusted=True)


@pytest.mark.parametrize("file", ["a.safetensors", "a.fx"])
def test_files_hold_which_channels_were_kept(tmp_path: Path, file: str) -> None:
    gm = traced()
    fxwidth.resize(gm, PLAN, data=[X])
    fxwidth.resize(gm, {"0": [0, 2], "4": 7})
    fxwidth.save(gm, tmp_path / file)
    again = loaded(tmp_path / file)
    wanted = [record["kept"] for record in fxwidth.report(gm).resizes]
    assert wanted[1] == {"0": [0, 2], "4": [0, 1, 2, 3, 4]}
    assert [record["kept"] for record in fxwidth.report(again).resizes] == wanted
    assert torch.equal(again(X), gm(X))
    # And so do those that are saved of what was loaded.
    fxwidth.save(again, tmp_path / f"again.{file}")
    last = loaded(tmp_path / f"again.{file}")
    assert [record["kept"] for record in fxwidth.report(last).resizes] == wanted
