"""Copies of channels as tables: the same function, with widths of their own on both sides."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxwidth
from fxwidth import FxwidthError
from fxwidth.recording.channel_copies import NOTHING, copied_channels
from fxwidth.tracing.analyze import analyze_module
from tests.oracles.judges import assert_replays, assert_rewrites, randomise
from tests.untying.networks import KINDS, NARROW, WIDE, Joined, images

by_kind = pytest.mark.parametrize("kind", KINDS)


def joined(kind: str = "repeat, cut") -> Joined:
    return randomise(Joined(KINDS[kind][0]).double())


def untied(model: nn.Module, x: Tensor) -> torch.fx.GraphModule:
    return fxwidth.untie_copies(fxwidth.trace(model, x))


def tables(gm: torch.fx.GraphModule) -> list[list[int]]:
    return [list(node.args[1]) for node in gm.graph.nodes if node.target is copied_channels]


def widths(gm: torch.fx.GraphModule) -> dict[str, int]:
    return {group.name: group.width for group in fxwidth.analyze(gm).free}


def unread_nodes(gm: torch.fx.GraphModule) -> set[str]:
    return {node.name for node in gm.graph.nodes if not node.users and node.op != "output"}


def difference(one: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((one(x) - other(x)).abs().max())


# -- which places are rewritten, and that nothing else changes ---------------------------------------------------------


@by_kind
def test_every_kind_becomes_one_table_that_computes_the_same(kind):
    model = joined(kind)
    gm = fxwidth.trace(model, images())
    assert widths(gm) != {"a": NARROW, "b": WIDE}
    parameters = dict(gm.named_parameters())
    assert fxwidth.untie_copies(gm) is gm
    assert tables(gm) == [KINDS[kind][1]]
    assert widths(gm) == {"a": NARROW, "b": WIDE}
    assert all(parameters[name] is parameter for name, parameter in gm.named_parameters())
    for mode in (True, False):
        for batch in (1, 3, 4):
            assert difference(gm.train(mode), model.train(mode), images(batch, seed=batch)) < 1e-12


@by_kind
def test_nothing_is_left_of_what_made_the_copies(kind):
    gm = fxwidth.trace(joined(kind), images())
    unread = unread_nodes(gm)
    assert unread_nodes(fxwidth.untie_copies(gm)) == unread


def test_copies_in_an_exported_graph():
    model = joined("numbers modulo").eval()
    exported = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    gm = fxwidth.untie_copies(fxwidth.trace(exported, images()))
    assert tables(gm) == [KINDS["numbers modulo"][1]]
    assert difference(gm, model, images(4)) < 1e-12


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.tensor([5, 1, 2, 3, 4, 0, 1, 0, 3, 3]))

    def forward(self, x):
        return x[:, self.table]


def test_a_buffer_of_whole_numbers_is_a_table():
    model = randomise(Joined(Table()).double())
    gm = untied(model, images())
    assert tables(gm) == [[5, 1, 2, 3, 4, 0, 1, 0, 3, 3]]
    assert difference(gm, model, images(4)) < 1e-12


class Chain(nn.Module):
    """Streams of 3, 6, 12 and 12 channels, each the last one's tile and more; the middle ones are read twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 3)
        self.layers = nn.ModuleList([nn.Linear(3, 6), nn.Linear(6, 12), nn.Linear(12, 12)])
        self.head = nn.Linear(12, 2)

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        for layer in self.layers:
            copies = layer.out_features // layer.in_features
            x = torch.tanh(layer(x) + x.repeat(1, copies)[:, : layer.out_features])
        return self.head(x)


def test_all_streams_of_a_chain_of_copies_have_their_own_widths():
    model, x = randomise(Chain().double()), torch.randn(3, 4, dtype=torch.float64)
    gm = fxwidth.trace(model, x)
    assert widths(gm) == {"stem": 3, "layers.0#0": 2, "layers.1#0": 2} or len(widths(gm)) < 4
    fxwidth.untie_copies(gm)
    assert widths(gm) == {"stem": 3, "layers.0": 6, "layers.1": 12, "layers.2": 12}
    assert difference(gm, model, torch.randn(5, 4, dtype=torch.float64)) < 1e-12
    assert_replays(analyze_module(gm), [x])


UNTOUCHED = {
    "zeros around images": lambda x: F.pad(x, (1, 1, 1, 1))[..., 1:-1, :-2].sum(1, keepdim=True),
    "arithmetic between": lambda x: torch.cat([x * 1, (x[:, :4] + 0.0)], 1),
    "a pointwise op that keeps positions": lambda x: torch.cat([x.abs(), x.relu()[:, :4]], 1),
    "positions in an image": lambda x: x.repeat_interleave(2, 3)[..., ::2].sum(1, keepdim=True),
    "samples": lambda x: torch.cat([x, x])[: x.shape[0]].sum(1, keepdim=True),
    "without gradient": lambda x: torch.cat([x.detach(), x.detach()[:, :4]], 1),
    "another precision": lambda x: torch.cat([x.float(), x.float()[:, :4]], 1),
    "whole numbers": lambda x: torch.cat([(4 * x).long(), (4 * x).long()[:, :4]], 1),
    "the same bits as whole numbers": lambda x: x.view(torch.int64).repeat(1, 2, 1, 1)[:, :10].remainder(7),
    "ones beside": lambda x: F.pad(x, (0, 0, 0, 0, 0, 4), value=1.0),
    "one channel that is shown often": lambda x: x.sum(1, keepdim=True).expand(-1, WIDE, -1, -1),
    "chosen by values": lambda x: x[:, x.mean((0, 2, 3)).argsort()[[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]]],
}


@pytest.mark.parametrize("kind", UNTOUCHED)
def test_what_is_no_copy_of_channels_stays(kind):
    model = randomise(Joined(UNTOUCHED[kind]).double())
    gm = fxwidth.trace(model, images())
    code, graph = gm.code, gm.graph
    fxwidth.untie_copies(gm)
    assert gm.code == code
    assert gm.graph is graph


def test_parts_of_channels_that_are_read_once_stay():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 12), nn.Linear(6, 2)

        def forward(self, x):
            gate, value = self.a(x).chunk(2, 1)
            return self.b(torch.cat([value[:, 3:], value[:, :3]], 1) * gate.sigmoid())

    gm = fxwidth.trace(Gated(), torch.randn(2, 4))
    code = gm.code
    assert fxwidth.untie_copies(gm).code == code


class WrittenBetween(nn.Module):
    """The copies are made before the channels are written to, and cut after it."""

    def __init__(self, between: bool):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 12), nn.Linear(12, 2)
        self.between = between

    def forward(self, x):
        y = self.a(x)
        if not self.between:
            y = torch.relu_(y)
        copies = y.repeat(1, 2)
        if self.between:
            y = torch.relu_(y)
        return self.c(self.b(y) + copies[:, :12])


@pytest.mark.parametrize("between", [True, False])
def test_what_is_written_to_in_place_is_copied_when_it_was(between):
    model, x = randomise(WrittenBetween(between).double()), torch.randn(3, 4, dtype=torch.float64)
    gm = untied(model, x)
    assert difference(gm, model, torch.randn(5, 4, dtype=torch.float64)) < 1e-12
    # The copies as they were made, where the cut comes too late for the two to be one.
    assert tables(gm) == [[*range(6), *range(6)]]


def test_a_view_through_which_writing_is_seen_stays():
    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c = nn.Linear(4, 6), nn.Linear(12, 2)

        def forward(self, x):
            y = self.a(x)
            view = y[:, :, None].expand(-1, -1, 2)[:, :, :2]
            y.mul_(2.0)
            return self.c(view.reshape(-1, 12))

    model, x = randomise(Seen().double()), torch.randn(3, 4, dtype=torch.float64)
    gm = untied(model, x)
    assert difference(gm, model, x) < 1e-12


def test_it_is_done_once():
    gm = untied(joined(), images())
    code, notes = gm.code, dict(gm.meta)
    assert fxwidth.untie_copies(gm).code == code
    assert gm.meta["fxwidth_untied"] == notes["fxwidth_untied"] == [0]


# -- resizes -----------------------------------------------------------------------------------------------------------


@by_kind
def test_resizes_do_what_the_tape_does_without_the_channels(kind):
    gm = untied(joined(kind), images())
    assert_replays(analyze_module(copy.deepcopy(gm)), [images()])
    assert_rewrites(gm, [images()], 0.6)


@pytest.mark.parametrize("seed", range(4))
@by_kind
def test_any_channels_may_stay_on_either_side(kind, seed):
    """Against the network written out by hand, with copies by explicit numbers."""
    generator = torch.Generator().manual_seed(seed)
    model = joined(kind).eval()
    a, b = (torch.randperm(n, generator=generator)[:k].sort().values.tolist() for n, k in ((NARROW, 3), (WIDE, 6)))
    gm, x = untied(copy.deepcopy(model), images()), images(4, seed=9)
    fxwidth.resize(gm, {"a": a, "b": b}, fold=False)
    with torch.no_grad():
        y = torch.tanh(model.norm(model.a(x)))
        masked = torch.zeros_like(y)
        masked[:, a] = y[:, a]
        sources = KINDS[kind][1]
        shown = [masked[:, s] if s != NOTHING else torch.zeros_like(y[:, 0]) for s in (sources[j] for j in b)]
        z = torch.relu(F.conv2d(masked, model.b.weight[b], model.b.bias[b], padding=1) + torch.stack(shown, 1))
        expected = F.conv2d(z, model.c.weight[:, b], model.c.bias).mean((2, 3))
        assert float((gm.eval()(x) - expected).abs().max()) < 1e-12
    assert tables(gm) == [[a.index(sources[j]) if sources[j] in a else NOTHING for j in b]]


@by_kind
def test_growth_is_exact_and_new_channels_read_nothing(kind):
    model = joined(kind)
    gm = untied(copy.deepcopy(model), images())
    fxwidth.resize(gm, {"a": NARROW + 2, "b": WIDE + 3})
    assert tables(gm) == [[*KINDS[kind][1], NOTHING, NOTHING, NOTHING]]
    for mode in (True, False):
        assert difference(gm.train(mode), model.train(mode), images(4, seed=3)) < 1e-12
    gm(images()).square().sum().backward()
    # New channels learn: those that nobody reads yet through their readers.
    assert float(gm.get_parameter("b.weight").grad[:, NARROW:].abs().max()) > 0
    assert float(gm.get_parameter("c.weight").grad[:, WIDE:].abs().max()) > 0


def test_one_side_may_shrink_while_the_other_grows_and_back_from_width_one():
    gm = untied(joined(), images())
    fxwidth.resize(gm, {"a": 1, "b": 13})
    assert widths(gm) == {"a": 1, "b": 13}
    before = copy.deepcopy(gm.eval())
    fxwidth.resize(gm, {"a": 4})
    assert difference(gm, before, images(4)) < 1e-12
    fxwidth.resize(gm, {"b": 1, "a": 2})
    assert gm(images(2)).shape == (2, 5)
    assert widths(gm) == {"a": 2, "b": 1}


def test_optimizer_state_follows():
    torch.manual_seed(0)
    model = joined()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    gm = untied(model, images())

    def step() -> None:
        gm(images(8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    before = optimizer.state[gm.get_parameter("b.weight")]["exp_avg"].clone()
    fxwidth.resize(gm, {"a": [0, 2, 3, 5], "b": [1, 4, 5, 8]}, optimizer=optimizer, fold=False)
    after = optimizer.state[gm.get_parameter("b.weight")]["exp_avg"]
    assert torch.equal(after, before[[1, 4, 5, 8]][:, [0, 2, 3, 5]])
    fxwidth.resize(gm, {"a": 7, "b": 12}, optimizer=optimizer)
    step()
    assert {tuple(parameter.shape) for parameter in optimizer.state} >= {(12, 7, 3, 3), (7, 3, 3, 3)}


# -- what stands in for a channel that goes ----------------------------------------------------------------------------


def with_twins() -> Joined:
    """Channels 1 and 3 are nearly the same; those that stay read neither in `b`."""
    model = joined().eval()
    with torch.no_grad():
        for parameter in (model.a.weight, model.a.bias, model.norm.weight, model.norm.bias):
            parameter[3] = parameter[1]
        model.norm.running_mean[3], model.norm.running_var[3] = model.norm.running_mean[1], model.norm.running_var[1]
    return model


@pytest.mark.parametrize("data", [None, images(32, seed=5)])
def test_a_copy_whose_source_goes_reads_the_nearest_channel(data):
    model = with_twins()
    gm = untied(copy.deepcopy(model), images())
    fxwidth.resize(gm, {"a": [0, 1, 2, 4, 5]}, data=data)
    assert tables(gm) == [[0, 1, 2, 1, 3, 4, 0, 1, 2, 1]]
    # A twin loses nothing: it is copied by its other, and its readers take over.
    assert difference(gm, model, images(6, seed=7)) < 1e-3
    assert fxwidth.report(gm).resizes[-1]["copies"] == tables(gm)


def test_a_copy_reads_nothing_where_all_are_further_than_zero():
    model = joined().eval()
    with torch.no_grad():
        # Opposite signs: any other channel is further away than zero.
        model.norm.weight[:] = 0.05
        model.norm.bias[:] = -1.0
        model.norm.bias[3] = 1.0
    gm = untied(model, images())
    fxwidth.resize(gm, {"a": [0, 1, 2, 4, 5]}, data=images(32, seed=5))
    assert tables(gm)[0][3] == NOTHING


def test_the_nearest_channel_leaves_less_error_than_nothing():
    errors = []
    for fold in (True, False):
        total = 0.0
        for seed in range(5):
            model = randomise(Joined(KINDS["repeat, cut"][0]).double(), seed).eval()
            gm = untied(copy.deepcopy(model), images())
            fxwidth.resize(gm, {"a": 4}, data=images(64, seed=1), fold=fold)
            with torch.no_grad():
                total += float((gm(images(64, seed=2)) - model(images(64, seed=2))).square().mean())
        errors.append(total)
    assert errors[0] < errors[1]


def test_channels_that_only_copies_read_are_not_for_nothing():
    model = joined().eval()
    with torch.no_grad():
        model.b.weight[:, 2] = 0.0
        model.norm.bias[2] = 1.5
        model.b.weight[:, 4] *= 1e-3
        model.norm.weight[4] = 1e-3
        model.norm.bias[4] = 0.0
    gm = untied(model, images())
    fxwidth.resize(gm, {"a": 5}, data=images(32, seed=5))
    assert fxwidth.report(gm).resizes[-1]["kept"]["a"] == [0, 1, 2, 3, 5]


# -- words, files, errors ----------------------------------------------------------------------------------------------


def test_explain_tells_of_the_copy():
    gm = fxwidth.trace(joined(), images())
    assert "share" in fxwidth.analyze(gm).explain("a.weight:0", "b.weight:0")
    told = fxwidth.analyze(fxwidth.untie_copies(gm)).explain("b", "a")
    assert told == (
        "b.weight:0 and a.weight:0 share no channels.\n"
        "  a.weight:0 - b.weight:0: joined only by a copy of channels (fxwidth::copied_channels at node "
        "copied_channels), whose table follows both: each has a width of its own."
    )
    assert fxwidth.analyze(gm).explain("a", "c") == "a.weight:0 and c.weight:0 share no channels."


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("first", ["resize", "untie"])
def test_saved_and_loaded(tmp_path, suffix, first):
    gm = fxwidth.trace(joined(), images())
    if first == "resize":
        fxwidth.resize(gm, {"a#0": 3})
    fxwidth.untie_copies(gm)
    fxwidth.resize(gm, {"a": [1, 2, 4], "b": 7}, data=images(16))
    fxwidth.resize(gm, {"a": 5, "b": 4})
    path = tmp_path / f"untied{suffix}"
    fxwidth.save(gm, path)
    fresh = Joined(KINDS["repeat, cut"][0]).double()
    again = fxwidth.load(path, trusted=True) if suffix == ".pt" else fxwidth.load(path, fresh, images())
    assert tables(again) == tables(gm)
    assert difference(again.eval(), gm.eval(), images(4)) == 0.0
    fxwidth.resize(again, {"a": 3})


def test_untied_without_a_resize_is_loaded_untied(tmp_path):
    gm = untied(joined(), images())
    fxwidth.save(gm, tmp_path / "untied.safetensors")
    again = fxwidth.load(tmp_path / "untied.safetensors", Joined(KINDS["repeat, cut"][0]).double(), images())
    assert tables(again) == tables(gm)


def test_copied_pickled_and_compiled():
    gm = untied(joined(), images()).eval()
    fxwidth.resize(gm, {"a": [0, 2, 3], "b": 13})
    for again in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm)), torch.compile(gm, backend="aot_eager")):
        assert difference(again, gm, images(4)) < 1e-12
    torch._dynamo.reset()


def test_the_traced_model_stays_as_it_is_and_goes_its_own_way():
    model = joined().eval()
    gm, before = untied(model, images()), model(images(4))
    fxwidth.resize(gm, {"a": 3})
    assert fxwidth.report(gm).resizes[-1]["original"] == "untouched"
    assert torch.equal(model(images(4)), before)


def test_a_group_of_width_one_is_refused():
    gm = fxwidth.trace(joined("repeat, cut"), images())
    fxwidth.resize(gm, {"a#0": 1})
    with pytest.raises(FxwidthError, match="'a#0' of width one"):
        fxwidth.untie_copies(gm)


def test_a_model_is_refused():
    with pytest.raises(FxwidthError, match="GraphModule is needed, but received Joined"):
        fxwidth.untie_copies(joined())


class Normed(nn.Module):
    """The sum with copies goes through a norm over all of its channels."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.a, self.b, self.norm, self.c = nn.Linear(4, 6), nn.Linear(6, 10), norm, nn.Linear(10, 3)

    def forward(self, x):
        y = torch.tanh(self.a(x))
        return self.c(self.norm(self.b(y) + y.repeat(1, 2)[:, :10]))


@pytest.mark.parametrize("norm", [nn.LayerNorm(10), nn.RMSNorm(10), nn.BatchNorm1d(10), nn.Softmax(1)])
def test_growth_before_a_norm_is_exact_or_refused(norm):
    model, x = randomise(Normed(copy.deepcopy(norm)).double()), torch.randn(5, 4, dtype=torch.float64)
    gm = untied(copy.deepcopy(model), x)
    for name in ("a", "b"):
        if fxwidth.analyze(gm)[name].inexact_growth is None:
            fxwidth.resize(gm, {name: widths(gm)[name] + 3})
            assert difference(gm.eval(), model.eval(), x) < 1e-10
        else:
            with pytest.raises(FxwidthError, match="would change the function"):
                fxwidth.resize(gm, {name: widths(gm)[name] + 3})
    assert widths(gm)["a"] == NARROW + 3


def test_a_number_beside_the_channels_of_a_single_sample_is_no_channel():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 10), nn.Linear(10, 3)

        def forward(self, x):
            y = self.a(x)
            return self.c(self.b(y) + F.pad(y, (0, 4), value=1.0))

    model, x = randomise(Single().double()), torch.randn(4, dtype=torch.float64)
    gm = untied(model, x)
    assert tables(gm) == []
    assert difference(gm, model, x) < 1e-12
