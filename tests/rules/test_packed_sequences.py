"""Recurrent layers over packed sequences: halved, run at other lengths, folded from data, saved."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence

import fxwidth
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.runtime.pytrees import deep_tensors
from fxwidth.verification.replay_oracle import largest_difference, reference_outputs
from tests.oracles.judges import ROUNDING, halved_exactly, randomise, removals
from tests.zoo.networks_of_packed_sequences import PACKED, Packs, TakesPacked, packed, sequences

by_name = pytest.mark.parametrize("name", PACKED)


def traced(name: str, batch: int = 4) -> tuple[nn.Module, fx.GraphModule]:
    return copy.deepcopy(_traced(name, batch))


@functools.cache
def _traced(name: str, batch: int) -> tuple[nn.Module, fx.GraphModule]:
    build, example, _ = PACKED[name]
    model = randomise(build()).double().eval()
    return model, fxwidth.trace(copy.deepcopy(model), example(batch))


@by_name
def test_the_graph_answers_as_the_model_does(name: str) -> None:
    model, gm = traced(name)
    for batch in (4, 7, 2):
        expected, actual = model(*PACKED[name][1](batch)), gm(*PACKED[name][1](batch))
        assert type(actual) is type(expected)
        assert largest_difference(deep_tensors(actual), deep_tensors(expected)) == 0


@by_name
def test_halved_layers_match_the_replay_oracle(name: str) -> None:
    _, gm = traced(name)
    _, twin = traced(name, 7)
    wg, other = fxwidth.analyze(gm), fxwidth.analyze(twin)
    assert len(wg.free) == PACKED[name][2], str(wg)
    # The same groups at another batch size, with other lengths in it.
    kept = removals(wg.free, 0.5)
    by_group = {group.name: kept[group.factor] for group in wg.free}
    inputs = {4: PACKED[name][1](4), 7: PACKED[name][1](7)}
    expected = {4: replayed(wg, by_group, inputs[4]), 7: replayed(other, by_group, inputs[7])}
    halved_exactly(gm, by_group)
    for mode in (False, True):
        gm.train(mode)
        for part in gm.modules():
            if isinstance(part, nn.RNNBase):
                part.dropout = 0.0
        for batch, values in inputs.items():
            assert largest_difference(deep_tensors(gm(*values)), expected[batch]) < ROUNDING
    loss = sum(tensor.sum() for tensor in deep_tensors(gm(*inputs[4])) if tensor.is_floating_point())
    loss.backward()
    assert all(parameter.grad is not None for parameter in gm.parameters())


def replayed(wg: WidthGraph, kept: dict[str, Any], values: tuple[Any, ...]) -> list[Tensor]:
    maps = IndexMaps(wg.analysis.space, {wg[name].factor: channels for name, channels in kept.items()})
    return reference_outputs(wg.analysis, maps, values)


def test_layers_are_resized_by_their_attributes() -> None:
    _, gm = traced("packs for an lstm")
    fxwidth.resize(gm, {group.name: 4 for group in fxwidth.analyze(gm).free})
    layer = gm.model.rnn
    assert (layer.input_size, layer.hidden_size, layer.weight_hh_l0.shape) == (4, 4, (16, 4))
    assert not gm.meta["fxwidth_history"][-1]["lowered"]


@pytest.mark.parametrize("name", ["packs for an lstm", "in a part", "takes packed for a gru"])
def test_growth_is_exact(name: str) -> None:
    model, gm = traced(name)
    for group in [group.name for group in fxwidth.analyze(gm).free]:
        fxwidth.resize(gm, {group: fxwidth.analyze(gm)[group].width + 3})
        assert largest_difference([gm(*PACKED[name][1](5))], [model(*PACKED[name][1](5))]) < ROUNDING


def test_channels_that_say_the_same_are_folded() -> None:
    """Half of the input channels repeat the others; without data it is noise of the given lengths that shows it."""
    for data in (None, [sequences(4), sequences(7), sequences(3)]):
        model, gm = traced("packs for a gru")
        with torch.no_grad():
            for part in (model.embed, gm.model.embed):
                part.weight[4:], part.bias[4:] = part.weight[:4], part.bias[:4]
        fxwidth.resize(gm, {"embed": 4}, data=data)
        assert largest_difference([gm(*sequences(5))], [model(*sequences(5))]) < 1e-6


def test_saved_and_loaded(tmp_path: Any) -> None:
    for name in ("packs for an lstm", "takes packed for a gru"):
        model, gm = traced(name)
        fxwidth.resize(gm, {group.name: 4 for group in fxwidth.analyze(gm).free})
        values = PACKED[name][1](5)
        fxwidth.save(gm, tmp_path / "model.pt")
        fxwidth.save(gm, tmp_path / "model.safetensors")
        for again in (
            fxwidth.load(tmp_path / "model.pt", trusted=True),
            fxwidth.load(tmp_path / "model.safetensors", model, PACKED[name][1](4)),
        ):
            assert torch.equal(again(*values), gm(*values))
            assert {group.width for group in fxwidth.analyze(again).free} == {4}


class WidthOfSteps(Packs):
    """Has the width of a step written in, behind what depends on lengths."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return super().forward(x, lengths) + self.embed(x).reshape(-1, 4, 2).softmax(2).sum()


class LooksAtLengths(Packs):
    """Reads the longest length, and does otherwise where it is small."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        if lengths.max() < 2:
            return self.head(self.embed(x).mean(1, keepdim=True).expand(-1, 10)[:, :10])
        return super().forward(x, lengths)


def test_what_other_lengths_may_lead_to_is_pinned() -> None:
    wg = fxwidth.analyze(fxwidth.trace(randomise(WidthOfSteps()).double().eval(), sequences(4)))
    assert [group.name for group in wg.free] == ["rnn.weight_ih_l0"]
    assert "a size is written into code that cannot be taken apart" in str(wg["embed#0"].pinned)
    wg = fxwidth.analyze(fxwidth.trace(randomise(LooksAtLengths()).double().eval(), sequences(4)))
    assert not wg.free
    assert "it is used after the code has branched on a value" in str(wg["rnn.weight_ih_l0"].pinned)


def test_packed_inputs_may_be_described() -> None:
    gm = fxwidth.trace(randomise(TakesPacked()).double().eval(), packed(4))
    assert isinstance(gm(*packed(9)), Tensor)
    with pytest.raises(fxwidth.FxwidthError, match="argument 'packed' is a tensor, not a PackedSequence as when"):
        gm(sequences(4)[0])
    (answer, last) = traced("returns packed")[1](*packed(6))
    assert isinstance(answer, PackedSequence)
    assert last.shape == (1, 6, 3)
