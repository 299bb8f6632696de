"""A graph does in `train()` and `eval()` what its model does there, in whichever mode it was traced, or trace warns."""

from __future__ import annotations

import copy
import io
import random
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxwidth
from fxwidth import FxwidthError, FxwidthWarning
from fxwidth.frontends.train_eval_merge import InTraining
from fxwidth.verification.replay_oracle import largest_difference
from tests.oracles.judges import randomise
from tests.zoo.networks_of_modes import (
    FRONT_ENDS,
    HIDDEN,
    LAYER_DROPS,
    LAYERS,
    WIDTH,
    Around,
    Checked,
    Exchanged,
    NeedsTargets,
    OwnNoise,
    WithHead,
    by_forward,
)

EXACT = 1e-12
by_layer = pytest.mark.parametrize("layer", LAYERS)
by_front_end = pytest.mark.parametrize("front_end", FRONT_ENDS)
by_mode = pytest.mark.parametrize("mode", [False, True], ids=["from eval", "from train"])


def rows(count: int = 6) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def model_of(layer: nn.Module, front_end: str, mode: bool) -> Around:
    torch.manual_seed(0)
    return randomise(FRONT_ENDS[front_end](layer)).double().train(mode)


def answer(module: nn.Module, mode: bool, seed: int, count: int = 6) -> Tensor:
    """Return what a module makes of some rows in a mode, its buffers left as they are."""
    module = copy.deepcopy(module).train(mode)
    torch.manual_seed(seed)
    random.seed(seed)
    with torch.no_grad():
        return module(rows(count))


def is_random(module: nn.Module, mode: bool) -> bool:
    return len({tuple(answer(module, mode, seed).flatten().tolist()) for seed in range(4)}) > 1


def assert_follows(gm: fx.GraphModule, model: nn.Module) -> None:
    for mode in (False, True, False):
        for count in (6, 9):
            difference = largest_difference([answer(gm, mode, 5, count)], [answer(model, mode, 5, count)])
            assert difference < EXACT, f"in {'training' if mode else 'evaluation'}, with {count} rows"
        assert is_random(gm, mode) == is_random(model, mode)


def halved(gm: fx.GraphModule) -> fx.GraphModule:
    free = fxwidth.analyze(gm).free
    fxwidth.resize(gm, {group.name: max(group.least.width, group.width // 2) for group in free}, fold=False)
    return gm


# Where leaves stay whole a mode is theirs, whichever one was traced.
WAYS = [
    pytest.param(front_end, mode, marks=pytest.mark.slow if mode and front_end == "leaves" else ())
    for front_end in FRONT_ENDS
    for mode in (False, True)
]


@pytest.mark.parametrize(("front_end", "mode"), WAYS)
@by_layer
def test_a_graph_follows_both_modes(layer: str, front_end: str, mode: bool) -> None:
    model = model_of(LAYERS[layer](), front_end, mode)
    gm = fxwidth.trace(copy.deepcopy(model), rows())
    assert gm.training == mode
    assert_follows(gm, model)
    assert {name for name, _ in model.named_parameters()} <= {name for name, _ in gm.named_parameters()}
    halved(gm)
    for now in (False, True):
        assert is_random(gm, now) == is_random(model, now)


# Masks of rows are the same for all widths, so that training can be compared too.
@pytest.mark.parametrize("layer", ["drop path", "drop connect", "stochastic depth", "softmax in evaluation"])
@by_front_end
def test_growth_is_exact_in_both_modes(layer: str, front_end: str) -> None:
    model = model_of(LAYERS[layer](), front_end, False)
    gm = fxwidth.trace(copy.deepcopy(model), rows())
    growing = {g.name: g.width + 3 for g in fxwidth.analyze(gm).free if g.inexact_growth is None}
    assert growing or layer == "softmax in evaluation"
    fxwidth.resize(gm, growing)
    for mode in (False, True):
        assert largest_difference([answer(gm, mode, 5)], [answer(model, mode, 5)]) < EXACT


def test_noise_that_the_model_draws_itself() -> None:
    torch.manual_seed(0)
    model = OwnNoise(nn.Identity()).double()
    assert_follows(fxwidth.trace(copy.deepcopy(model), rows()), model)


def test_a_part_without_tensors_keeps_a_mode_of_its_own() -> None:
    model = model_of(LAYERS["drop path"](), "symbolic", True)
    gm = fxwidth.trace(model, rows()).train()
    gm.layer.eval()
    assert torch.equal(gm(rows()), gm(rows()))
    assert not [part for part in gm.modules() if isinstance(part, InTraining)]


@by_mode
@pytest.mark.parametrize("layer", LAYER_DROPS)
def test_a_part_that_drops_layers_is_kept_whole(layer: str, mode: bool) -> None:
    model = model_of(LAYER_DROPS[layer](), "symbolic", mode)
    gm = fxwidth.trace(copy.deepcopy(model), rows())
    assert_follows(gm, model)
    assert_trains_after_halving(gm)


def assert_trains_after_halving(gm: fx.GraphModule) -> None:
    halved(gm)
    assert not is_random(gm, False)
    assert is_random(gm, True)


@pytest.mark.parametrize("layer", LAYER_DROPS)
def test_an_exported_graph_that_drops_no_layers_says_so(layer: str) -> None:
    model = model_of(LAYER_DROPS[layer](), "export", False)
    with pytest.warns(FxwidthWarning, match=r"a random number decides what LayerDrop 'layer' runs, as layer drop does"):
        gm = fxwidth.trace(copy.deepcopy(model), rows())
    assert torch.equal(answer(gm, False, 0), answer(model, False, 0))
    model.layer.rate = 0.0
    assert largest_difference([answer(gm, True, 5)], [answer(model, True, 5)]) < EXACT or "Python" not in layer
    assert_trains_after_halving(gm)


@by_mode
@pytest.mark.parametrize(
    ("model", "told"),
    [
        (WithHead, r"in training it runs head where in evaluation it runs nothing more"),
        (NeedsTargets, r"in training it cannot be traced \(ValueError: targets are missing\)"),
    ],
)
def test_what_is_not_followed_is_told(model: type[nn.Module], told: str, mode: bool) -> None:
    network = model().double().train(mode)
    if mode and model is NeedsTargets:
        gm = fxwidth.trace(network, rows())
        assert torch.equal(answer(gm, False, 0), answer(network, False, 0)), "it is called as a whole"
        return
    with pytest.warns(FxwidthWarning, match=f"{model.__name__} does not do in train.. and eval.. all .*: {told}"):
        gm = fxwidth.trace(network, rows())
    gm.eval()
    assert str(gm(rows())) == str(gm(rows()))
    gm.train()
    assert str(gm(rows())) != str(gm(rows())), "its dropout follows"


# -- what training alone does is resized, pinned or refused ----------------------------------------------------------


@by_forward
def FixedMask(self: Any, x: Tensor) -> Tensor:  # noqa: N802 - a type
    return x * torch.bernoulli(torch.full((HIDDEN,), 0.5, dtype=x.dtype)) if self.training else x


@by_forward
def WrittenIn(self: Any, x: Tensor) -> Tensor:  # noqa: N802
    return x.view(-1, 3, 4).flip(0).reshape(-1, HIDDEN) if self.training else x


@by_forward
def OtherSize(self: Any, x: Tensor) -> Tensor:  # noqa: N802
    return x.mean(-1, keepdim=True) if self.training else x


@by_front_end
@pytest.mark.parametrize("layer", [FixedMask, WrittenIn, OtherSize])
def test_a_width_that_training_alone_needs_is_pinned(layer: Any, front_end: str) -> None:
    gm = fxwidth.trace(model_of(layer(), front_end, False), rows())
    width_graph = fxwidth.analyze(gm)
    assert not width_graph.free
    halved(gm)
    gm.train()(rows())


def test_what_stands_for_a_value_in_training_has_its_width() -> None:
    model = Exchanged().double()
    gm = fxwidth.trace(copy.deepcopy(model), rows())
    assert_follows(gm, model)
    halved(gm)
    assert gm.train()(rows()).shape == gm.eval()(rows()).shape


class Folding(nn.Module):
    """A part that is kept whole, with a size written into what it does in training."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and random.random() < 2:
            return self.mix(x.view(-1, 3, 4).flatten(1)) * 2
        return self.mix(x)


def test_a_size_written_into_the_training_of_a_part_is_refused() -> None:
    gm = fxwidth.trace(model_of(Folding(), "symbolic", False), rows())
    before = [tensor.clone() for tensor in gm.parameters()]
    with pytest.raises(FxwidthError, match=r"node 'layer' has a size written into what it does in training"):
        halved(gm)
    assert all(torch.equal(one, other) for one, other in zip(before, gm.parameters(), strict=True))


def test_what_runs_in_training_is_copied_and_pickled() -> None:
    gm = fxwidth.trace(model_of(LAYERS["drop connect"](), "export", False), rows())
    assert [part for part in gm.modules() if isinstance(part, InTraining)]
    stored = io.BytesIO()
    torch.save(halved(gm), stored)
    stored.seek(0)
    for other in (copy.deepcopy(gm), torch.load(stored, weights_only=False)):
        for mode in (False, True):
            assert torch.equal(answer(other, mode, 5), answer(gm, mode, 5))
    assert is_random(gm, True)


def test_tracing_draws_no_random_numbers() -> None:
    for front_end in ("symbolic", "export"):
        for layer in ("drop connect", "constant noise", "layers dropped at no rate"):
            model = model_of(LAYERS[layer](), front_end, True)
            torch.manual_seed(7)
            random.seed(7)
            fxwidth.trace(model, rows())
            drawn = torch.rand(3), random.random()
            torch.manual_seed(7)
            random.seed(7)
            assert torch.equal(torch.rand(3), drawn[0])
            assert random.random() == drawn[1]


def test_two_batch_norms_of_which_one_is_frozen() -> None:
    model = Checked(nn.Sequential(nn.BatchNorm1d(HIDDEN), nn.BatchNorm1d(HIDDEN))).double().train()
    model.layer[0].eval()
    gm = fxwidth.trace(copy.deepcopy(model), rows())
    gm(rows())
    assert gm.get_buffer("layer.1.num_batches_tracked") == 1
    assert not torch.equal(gm.get_buffer("layer.1.running_mean"), model.layer[1].running_mean)
    assert torch.equal(gm.get_buffer("layer.0.running_mean"), model.layer[0].running_mean)
    # That of the model thaws too, once somebody calls its train().
    model.load_state_dict(gm.state_dict())
    for trained in (gm.train(), model.train()):
        trained(rows())
    assert gm.get_buffer("layer.0.num_batches_tracked") == 1
    assert largest_difference([*gm.state_dict().values()], [*model.state_dict().values()]) < EXACT


class Untrainable(nn.Module):
    """Layers that an exporter follows in evaluation alone, where an average over all batches has no number to count."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 8)
        self.counted, self.bare = nn.BatchNorm1d(8), nn.BatchNorm1d(8, track_running_stats=False)
        self.instance = nn.InstanceNorm1d(8, track_running_stats=True)
        self.recurrent = nn.LSTM(8, 8, 2, dropout=0.5)
        self.average = nn.BatchNorm1d(8, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != WIDTH:
            raise ValueError
        y = self.bare(self.counted(self.up(x)))
        y = self.instance(y.unsqueeze(-1).expand(-1, -1, 3) * torch.arange(1, 4))
        return self.average(self.recurrent(y.transpose(1, 2).transpose(0, 1))[0].sum(0))


def test_norms_that_do_not_follow_a_mode_that_cannot_be_traced_are_told() -> None:
    torch.manual_seed(0)
    model = randomise(Untrainable()).double().eval()
    told = (
        r"in which only dropout and norms with running statistics follow the mode, but no batches are counted in "
        r"'counted', 'average', and the running statistics of 'average' with momentum=None, .* are not those of"
    )
    with pytest.warns(FxwidthWarning, match=told):
        gm = fxwidth.trace(copy.deepcopy(model), rows())
    for mode in (False, True, False, True):
        model.train(mode)
        gm.train(mode)
        outcomes = []
        for module in (gm, model):
            torch.manual_seed(1)
            outcomes.append([module(rows()).detach()])
        # In evaluation the last one goes by its running statistics.
        assert largest_difference(*outcomes) < EXACT or (not mode and model.average.num_batches_tracked > 0)
    others = {name: buffer for name, buffer in gm.named_buffers() if name in dict(model.named_buffers())}
    following = [name for name in others if "average" not in name and "num_batches" not in name]
    assert len(following) == 4
    expected = [model.get_buffer(name) for name in following]
    assert largest_difference([others[name] for name in following], expected) < EXACT
    assert float(gm.get_buffer("average.num_batches_tracked")) == 0 < float(model.average.num_batches_tracked)


class OnlyTrained(Untrainable):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != WIDTH or not self.training:
            raise ValueError
        return self.bare(self.up(x))


def test_norms_without_running_statistics_do_the_same_in_both_modes() -> None:
    torch.manual_seed(0)
    model = randomise(OnlyTrained()).double().train()
    with pytest.warns(FxwidthWarning, match="the graph is that of training"):
        gm = fxwidth.trace(model, rows())
    assert not any(module is model.bare for module in gm.modules())
    expected = model(rows())
    assert largest_difference([gm.eval()(rows())], [expected]) < EXACT
