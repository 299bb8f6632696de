"""What no tracer can follow is run as it is: parts that look at values, and detectors as a whole."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxwidth
from fxwidth import FxwidthError
from fxwidth.analysis.replay import ResizedReplay
from fxwidth.analysis.replay_places import Places
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.frontends.call_signature import arguments_of, call_of
from fxwidth.frontends.export import exported_graph
from fxwidth.runtime.pytrees import deep_tensors
from fxwidth.verification.replay_oracle import largest_difference
from fxwidth.verification.stepwise import prescribed_difference, stepwise_difference
from tests.oracles.judges import ROUNDING, randomise, removals
from tests.serialization.earlier_form import earlier_texts, tensors_in, write_earlier
from tests.zoo.networks_of_values import (
    DETECTORS,
    HIDDEN,
    OUT,
    WIDTH,
    Attended,
    Counting,
    EmptyHanded,
    OnValue,
    OtherWay,
    OutsideOfTorch,
    Seldom,
    WithPart,
    WrittenIn,
    images,
    targets,
)


def rows(count: int = 5) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def traced(model: nn.Module, *args: Any) -> fx.GraphModule:
    return fxwidth.trace(randomise(model).double().eval(), args)


@functools.cache
def detector(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(DETECTORS[name]()).double().eval()


def resized(gm: fx.GraphModule, values: list[Any], monkeypatch: pytest.MonkeyPatch) -> ResizedReplay:
    """Halve every group, and return the tape at the new sizes, ready to be run."""
    wg = fxwidth.analyze(gm)
    removed = removals(wg.free, 0.5)
    kept = {group.name: removed[group.factor] for group in wg.free}
    maps = IndexMaps(wg.analysis.space, removed)
    difference, place = stepwise_difference(wg.analysis, maps, values)
    assert difference < ROUNDING, place
    replay = ResizedReplay(wg.analysis, maps, torch.float64)
    fxwidth.resize(gm, {group: channels.tolist() for group, channels in kept.items()}, fold=False)
    return replay


def assert_as_prescribed(gm: fx.GraphModule, replay: ResizedReplay, values: list[Any]) -> None:
    padded = [*values, *[None] * (len(replay.analysis.inputs) - len(values))]
    difference, compared = prescribed_difference(gm, replay.analysis, replay.maps, padded)
    assert difference < ROUNDING
    assert compared >= 3


# -- parts ---------------------------------------------------------------------------------------------------------


def test_only_the_part_that_cannot_be_traced_is_a_leaf(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = traced(WithPart(), rows())
    assert [node.target for node in gm.graph.find_nodes(op="call_module")] == ["up", "part", "down"]
    wg = fxwidth.analyze(gm)
    assert {group.name for group in wg.free} == {"up", "part.mix#0", "part.mix#1"}, str(wg)
    replay = resized(gm, [rows()], monkeypatch)
    assert (gm.part.mix.out_features, gm.part.norm.num_groups) == (HIDDEN // 2, 1)
    assert_as_prescribed(gm, replay, [rows()])
    for count in (1, 9):
        assert gm(rows(count)).shape[1] == OUT


def test_what_comes_behind_a_branch_on_a_value_is_pinned() -> None:
    wg = fxwidth.analyze(traced(OnValue(), rows()))
    assert not wg.free
    assert wg["up"].pinned is not None
    assert wg["up"].pinned.startswith("it is used after the code has branched on a value, or may have (")
    assert wg["up"].pinned.endswith("at node model, in up)")


def test_a_size_written_into_a_leaf_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = traced(WrittenIn(), rows())
    wg = fxwidth.analyze(gm)
    assert [group.name for group in wg.free] == ["up"]
    assert wg["mid"].pinned is not None
    assert wg["mid"].pinned.startswith("a size is written into code that cannot be taken apart: node 'model'")
    replay = resized(gm, [rows()], monkeypatch)
    assert_as_prescribed(gm, replay, [rows()])


def test_finds_are_pretended_where_there_are_none() -> None:
    """Nothing is found in the example, but layers for finds are resized all the same; those on nothing are not."""
    gm = traced(Seldom(), rows())
    wg = fxwidth.analyze(gm)
    assert {group.name for group in wg.free} == {"up", "mid"}
    assert wg["other"].pinned == ("it is used on an empty tensor (addmm at node model, in other)")
    told = wg.why_pinned("other")
    assert "in addmm at node model, which is module 'model' (Seldom), in its part 'other'" in told
    assert told.endswith("to free it: Pass example_inputs in which more is found.")
    assert all(group.pinned is not None for group in wg.groups if "norm" in group.name)
    fxwidth.resize(gm, {"up": 4, "mid": 5})
    with torch.no_grad():
        gm.model.up.bias.fill_(1e10)
        assert gm(rows())[0].shape == (5, OUT)
    # What is on record are the places, which are as many at other widths.
    again = fxwidth.analyze(gm)
    assert {group.name: group.width for group in again.free} == {"up": 4, "mid": 5}
    fxwidth.resize(gm, {"up": 2, "mid": 7})
    with torch.no_grad():
        gm.model.up.bias.fill_(1e10)
        assert gm(rows(9))[0].shape == (9, OUT)


def test_what_was_found_is_not_written_into_the_graph() -> None:
    """Attention over the found rows would be taken apart into ops for five of them."""
    gm = traced(Attended(), rows())
    wg = fxwidth.analyze(gm)
    assert {group.name for group in wg.free} == {"attention.out_proj", "mid#0", "mid#1"}, str(wg)
    assert wg["up"].pinned is not None
    assert "what it does depends on values, so that it cannot be taken apart" in wg["up"].pinned
    fxwidth.resize(gm, {group.name: 3 for group in wg.free})
    outputs = [gm(rows(count)) for count in (2, 9, 40)]
    assert len({len(output) for output in outputs}) == 3


def test_a_size_written_in_for_nothing_found_is_pinned() -> None:
    gm = traced(EmptyHanded(), rows())
    wg = fxwidth.analyze(gm)
    assert {group.name for group in wg.free} == {"up"}
    assert wg["mid"].pinned is not None
    assert "with 0 things found" in wg["mid"].pinned
    fxwidth.resize(gm, {"up": 4})
    with torch.no_grad():
        gm.model.up.bias.fill_(-1e9)
    assert gm(rows()).shape == (0, OUT)


def test_a_graph_of_one_call_has_the_names_of_the_model(tmp_path: Path) -> None:
    model = Seldom()
    gm = traced(model, rows())
    assert [node.target for node in gm.graph.find_nodes(op="call_module")] == ["model"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for twin in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert {name for name, _ in twin.named_parameters()} == {name for name, _ in model.named_parameters()}
        assert {name for name, _ in twin.named_buffers()} == {name for name, _ in model.named_buffers()}
        assert twin.up.weight is twin.model.up.weight
        assert twin.state_dict().keys() == model.state_dict().keys()
        other = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}
        twin.load_state_dict(other)
        torch.testing.assert_close(dict(twin.state_dict()), other, rtol=0, atol=0)
        twin.load_state_dict(before)
    fxwidth.resize(gm, {"up": 4, "mid": 5})
    assert gm.up.weight is gm.model.up.weight
    # In earlier versions all names began with that of the call.
    fxwidth.save(gm, tmp_path / "now.safetensors")
    tensors = {f"model.{name}": tensor for name, tensor in tensors_in(tmp_path / "now.safetensors").items()}
    told = earlier_texts(tmp_path / "now.safetensors")
    metadata = {key: text.replace('"up"', '"model.up"').replace('"mid"', '"model.mid"') for key, text in told.items()}
    write_earlier(tmp_path / "old.safetensors", tensors, metadata)
    for name in ("now", "old"):
        again = fxwidth.load(tmp_path / f"{name}.safetensors", Seldom().double().eval(), (rows(),))
        torch.testing.assert_close(again.state_dict(), gm.state_dict(), rtol=0, atol=0)
        assert again(rows())[1].equal(gm(rows())[1])


def test_a_way_that_was_not_taken_pins() -> None:
    wg = fxwidth.analyze(traced(OtherWay(), rows()))
    assert not wg.free
    assert wg["up"].pinned is not None
    assert wg["up"].pinned.startswith(
        "a part was followed along one way, on which other.weight was not used; on another both may be ("
    )


def test_tracing_leaves_the_state_of_a_model_alone() -> None:
    model = Counting()
    gm = traced(model, rows())
    before = model.total.clone()
    wg = fxwidth.analyze(gm)
    fxwidth.resize(gm, {wg.free[0].name: 4}, data=[rows(), rows()])
    assert (model.seen, model.last, model.sizes) == (0, None, [])
    assert torch.isin(model.total, before).all()
    gm(rows())
    assert model.last.shape == (5, 4)
    assert model.sizes == [5]
    assert not torch.isin(model.total, before).any()


def test_a_loss_is_probed_without_a_trace() -> None:
    model = Counting()
    gm = traced(model, rows())
    wg = fxwidth.analyze(gm)
    before = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    data = [(rows(9), torch.zeros(9, OUT)), (rows(5), torch.ones(5, OUT))]
    fxwidth.plan(wg, params=0.7, data=data, loss=torch.nn.functional.mse_loss)
    assert (model.seen, model.last, model.sizes) == (0, None, [])
    assert all(torch.equal(before[name], tensor) for name, tensor in gm.state_dict().items())


class Drifting(Counting):
    """Answers otherwise each time it is called."""

    def forward(self, x: Tensor) -> Tensor:
        answer = super().forward(x)
        return answer + self.seen * 100


def test_rises_of_the_loss_are_not_those_of_what_a_model_keeps() -> None:
    gm = traced(Drifting(), rows())
    wg = fxwidth.analyze(gm)
    spectra = [fxwidth.spectrum(wg, data=[(rows(9), torch.zeros(9, OUT))], loss=_mean) for _ in range(2)]
    own = [spectrum[wg.free[0].name].errors for spectrum in spectra]
    assert own[0] == own[1]


def _mean(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def test_every_front_end_tells_why_it_fails() -> None:
    told = r"OutsideOfTorch cannot be traced. torch.fx.symbolic_trace says: .* torch.export says: .* with leaves says: "
    with pytest.raises(FxwidthError, match=told):
        fxwidth.trace(OutsideOfTorch(), torch.randn(2, WIDTH))


def test_a_model_without_values_cannot_look_at_them() -> None:
    with torch.device("meta"):
        model = WithPart()
    with pytest.raises(FxwidthError, match=r"WithPart cannot be traced.*with leaves says"):
        fxwidth.trace(model, torch.empty(2, WIDTH))


# -- detectors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "single_shot" else pytest.mark.slow) for name in DETECTORS]
)
def test_detectors_are_halved(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = detector(name)
    with torch.no_grad():
        expected = model(images())
    gm = fxwidth.trace(model, (images(),))
    assert largest_difference(deep_tensors(gm(images())), deep_tensors(expected)) == 0
    before = sum(parameter.numel() for parameter in gm.parameters())
    replay = resized(gm, [images(), None], monkeypatch)
    assert sum(parameter.numel() for parameter in gm.parameters()) < 0.45 * before
    assert_as_prescribed(gm, replay, [images()])
    answer = gm(images(3, 40))
    assert [set(found) for found in answer] == [{"boxes", "labels", "scores"}] * 3
    assert sum(len(found["boxes"]) for found in answer) > 0
    losses = gm.train()(images(), targets())
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in gm.parameters() if parameter.requires_grad)
    detector.cache_clear()


def test_detectors_are_folded_from_data_and_saved(tmp_path: Any) -> None:
    gm = fxwidth.trace(detector("faster_rcnn"), (images(),))
    data = [(images(3, 40), targets(3)), (images(1), targets(1))]
    fxwidth.resize(gm, {"roi_heads.box_head.fc6": 9, "backbone.0": 5}, data=data)
    record = gm.meta["fxwidth_history"][-1]
    # Batches of three images and of one, where two were traced: what is seen of so few is drawn toward noise.
    assert record["evidence"] == "data and noise"
    assert not record["not_refitted"]
    fxwidth.save(gm, tmp_path / "detector.pt")
    again = fxwidth.load(tmp_path / "detector.pt", trusted=True)
    assert largest_difference(deep_tensors(again(images())), deep_tensors(gm(images()))) == 0
    assert fxwidth.analyze(again)["roi_heads.box_head.fc6"].width == 9
    detector.cache_clear()


def test_the_stepwise_oracle_is_not_blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong map of one channel group shows, though the boxes found may be the same."""
    gm = fxwidth.trace(detector("retina_net"), (images(),))
    wg = fxwidth.analyze(gm)
    maps = IndexMaps(wg.analysis.space, removals(wg.free, 0.5))
    gather = Places.gather

    def reversed_biases(self: Places, tensor: Tensor, axes: Any) -> Tensor:
        gathered = gather(self, tensor, axes)
        return gathered.flip(0) if tensor.dim() == 1 else gathered

    monkeypatch.setattr("fxwidth.analysis.replay_places.Places.gather", reversed_biases)
    difference, place = stepwise_difference(wg.analysis, maps, [images(), None])
    assert difference > 1e-3
    assert "at node model" in place


# -- the front ends behind it ---------------------------------------------------------------------------------------


def test_a_failed_export_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    model = OnValue().eval()
    arguments = arguments_of(model, call_of(torch.randn(2, WIDTH)))
    with pytest.raises(Exception, match="Could not guard on data-dependent expression"):
        exported_graph(model, arguments, torch.device("cpu"))
    assert capfd.readouterr() == ("", "")


class Keeps(nn.Module):
    """Keeps an activation for whoever looks at it later."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        self.last = torch.relu(self.up(x))
        return self.down(self.last)


def test_a_model_that_keeps_an_activation_keeps_it_after_a_resize() -> None:
    """A graph would forget it, so the model is called as it is."""
    gm = traced(Keeps(), rows())
    assert not hasattr(gm.model, "last")
    fxwidth.resize(gm, {"up": 4})
    gm(rows(7))
    assert gm.model.last.shape == (7, 4)
