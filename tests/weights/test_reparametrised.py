"""Weight norm and spectral norm, as parametrisations and as hooks: what is resized is the weight that is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrizations

import fxwidth
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.growth.recipes import Fill
from fxwidth.verification.replay_oracle import largest_difference
from fxwidth.weights.reparametrised import normed_weights, weight_values
from tests.oracles.growth import check_all, check_refusals, recipes, set_apart, width_graph
from tests.oracles.judges import analysed, as_one_node, assert_replays, assert_rewrites

Norm = Callable[[nn.Module], nn.Module]
EXACT = 1e-10

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")


def _hook(name: str, **options: Any) -> Norm:
    return lambda module: getattr(nn.utils, name)(module, **options)


NORMS: dict[str, Norm] = {
    "weight norm of rows": parametrizations.weight_norm,
    "weight norm of columns": lambda module: parametrizations.weight_norm(module, dim=1),
    "weight norm of all": lambda module: parametrizations.weight_norm(module, dim=None),
    "spectral norm": parametrizations.spectral_norm,
    "spectral norm of columns": lambda module: parametrizations.spectral_norm(module, dim=1),
    "weight norm by a hook": _hook("weight_norm"),
    "weight norm of columns by a hook": _hook("weight_norm", dim=1),
    "weight norm of all by a hook": _hook("weight_norm", dim=None),
    "spectral norm by a hook": _hook("spectral_norm"),
}
HOOKS = [name for name in NORMS if "hook" in name]


class Normed(nn.Module):
    """Two normed layers between plain ones."""

    def __init__(self, norm: Norm, layer: Callable[[int, int], nn.Module], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.second = layer(10, 16), norm(layer(16, 12))
        self.third, self.head = norm(layer(12, 14)), layer(14, 3)
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second, self.third):
            x = torch.relu(layer(x))
        return self.head(x)


LAYERS: dict[str, tuple[Callable[[int, int], nn.Module], tuple[int, ...]]] = {
    "linear": (nn.Linear, (32, 10)),
    "convolution": (lambda into, out: nn.Conv1d(into, out, 3, padding=1), (16, 10, 7)),
    "transposed": (lambda into, out: nn.ConvTranspose1d(into, out, 3, padding=1), (16, 10, 7)),
}
by_norm = pytest.mark.parametrize("norm", NORMS)
by_layer = pytest.mark.parametrize("layer", LAYERS)


def build(norm: str, layer: str = "linear") -> Normed:
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    return set_apart(Normed(NORMS[norm], make, shape))


def first_group(gm: nn.Module) -> str:
    """Return the group of the channels that the first normed layer reads."""
    return next(group.name for group in fxwidth.analyze(gm).free if group.width == 16)


def example(model: Normed) -> Tensor:
    return torch.randn(model.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@by_layer
@by_norm
def test_removals_replay_and_rewrite(norm, layer):
    model = build(norm, layer).float()
    inputs = [example(model).float()]
    analysis = analysed(model, inputs)
    assert len(WidthGraph(analysis).free) == 3
    assert_replays(analysis, inputs)
    gm = assert_rewrites(build(norm, layer).float(), inputs)
    assert not gm.meta["fxwidth_history"][-1]["lowered"]
    layer = gm.second
    sizes = [
        getattr(layer, name)
        for name in ("in_features", "out_features", "in_channels", "out_channels")
        if hasattr(layer, name)
    ]
    assert sizes == [8, 6]
    gm.train()(inputs[0].double()).square().mean().backward()
    assert all(parameter.grad is not None for parameter in gm.parameters())


@by_layer
@by_norm
def test_growth_is_exact_in_both_modes(norm, layer):
    model = build(norm, layer)
    x = example(model)
    wg = width_graph(model, x)
    assert set(recipes(wg).values()) == {"FREE"}
    check_all(wg, x)
    check_refusals(wg, x)
    gm = fxwidth.trace(build(norm, layer), x)
    fxwidth.resize(gm, {group.name: group.width + 3 for group in fxwidth.analyze(gm).free})
    assert largest_difference([gm(x)], [model.eval()(x)]) < EXACT
    # In training a spectral norm goes on looking for its vectors, among the new entries too.
    model.train(), gm.train()
    for _ in range(3):
        expected, actual = model(x), gm(x)
        assert largest_difference([actual], [expected]) < EXACT


@by_norm
def test_grown_channels_learn(norm):
    model = build(norm)
    gm = fxwidth.trace(model, example(model))
    plan = {group.name: group.width + 3 for group in fxwidth.analyze(gm).free}
    fxwidth.resize(gm, plan)
    before = {name: group.width for name, group in ((g.name, g) for g in fxwidth.analyze(gm).free)}
    optimizer = torch.optim.SGD(gm.train().parameters(), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        (gm(example(model)) - 1).square().mean().backward()
        optimizer.step()
    wg = fxwidth.analyze(gm.eval())
    assert before == {group.name: group.width for group in wg.free}
    x = example(model)
    trained = gm(x)
    with torch.no_grad():
        # Without what they write the new channels would be missed.
        for layer in (gm.first, gm.second, gm.third):
            layer.bias[-3:] = -1e3
    assert largest_difference([gm(x)], [trained]) > 1e-6


@by_layer
@by_norm
def test_dead_channels_go_without_a_trace(norm, layer):
    """A norm over a weight does not notice that entries are gone which met nothing but zeros."""
    model = build(norm, layer).eval()
    x = example(model)
    with torch.no_grad():
        model.first.bias[[0, 5, 9]] = -1e3
    before = model(x)
    gm = fxwidth.trace(model, x)
    fxwidth.resize(gm, {first_group(gm): 13}, data=[x])
    assert largest_difference([gm(x)], [before]) < EXACT
    layer = gm.second
    assert layer.weight.shape[1 if not isinstance(layer, nn.ConvTranspose1d) else 0] == 13


@by_norm
def test_twins_are_folded(norm):
    """Two channels that say the same become one, through a norm of the weight that reads them."""
    model = build(norm).eval()
    x = example(model)
    with torch.no_grad():
        for tensor in (model.first.weight, model.first.bias):
            tensor[8:] = tensor[:8]
    before = model(x)
    gm = fxwidth.trace(model, x)
    used = weight_values(fxwidth.analyze(gm).analysis, next(iter(normed_weights(fxwidth.analyze(gm).analysis))))
    assert used.shape == (12, 16)
    fxwidth.resize(gm, {first_group(gm): 8})
    assert largest_difference([gm(x)], [before]) < 1e-9
    assert largest_difference([gm(torch.randn(5, 10, dtype=torch.float64))], [gm(x)[:5]]) > 1e-3


@by_norm
def test_what_stays_keeps_every_digit(norm):
    model = build(norm).float()
    x = example(model).float()
    gm = fxwidth.trace(model, x)
    before = {name: tensor.clone() for name, tensor in gm.named_parameters()}
    wide = {group.name: group.width + 2 for group in fxwidth.analyze(gm).free}
    fxwidth.resize(gm, wide)
    for name, tensor in gm.named_parameters():
        old = before[name]
        kept = tensor[tuple(slice(0, size) for size in old.shape)] if old.dim() else tensor
        if "original0" in name or "_g" in name:
            assert torch.allclose(kept, old, rtol=1e-6)
        else:
            assert torch.equal(kept, old), name


def test_lengths_of_zero_and_columns_that_are_gone():
    """Neither a slice of length zero, nor one whose direction is dropped, becomes a division by zero."""
    model = build("weight norm of rows").eval()
    x = example(model)
    with torch.no_grad():
        length, direction = (
            model.second.parametrizations.weight.original0,
            model.second.parametrizations.weight.original1,
        )
        length[2] = 0
        length[3] = -2
        direction[4, :13] = 0
        model.first.bias[13:] = -1e3
    before = model(x)
    gm = fxwidth.trace(model, x)
    fxwidth.resize(gm, {first_group(gm): 13}, data=[x])
    after = gm(x)
    assert after.isfinite().all()
    assert largest_difference([after], [before]) < EXACT
    assert gm.second.parametrizations.weight.original0[2] == 0
    assert gm.second.parametrizations.weight.original0[3] < 0


def test_half_precision():
    model = build("weight norm of rows").to(torch.bfloat16).eval()
    x = example(model).to(torch.bfloat16)
    before = model(x)
    gm = fxwidth.trace(model, x)
    fxwidth.resize(gm, {group.name: group.width + 5 for group in fxwidth.analyze(gm).free})
    assert largest_difference([gm(x)], [before]) < 0.02
    assert {tensor.dtype for tensor in gm.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("norm", HOOKS)
def test_a_weight_that_a_hook_computes_stays_real(norm):
    model = build(norm)
    expected = model.eval()(example(model))
    weight = model.second.weight
    gm = fxwidth.trace(model, example(model))
    assert model.second.weight is weight
    fxwidth.resize(gm, {first_group(gm): 9})
    assert not any(isinstance(value, FakeTensor) for part in gm.modules() for value in vars(part).values())
    assert gm(example(model)).shape == expected.shape
    assert gm.second.weight.shape == (12, 9)


class Remembering(nn.Module):
    """Keeps tensors in places of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)
        self.table: dict[int, Tensor] = {}
        self.seen: list[Tensor] = []
        self.register_buffer("last", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if 4 not in self.table:
            self.table[4] = torch.arange(6.0)
        self.seen.append(y)
        self.last = y.detach().mean(0)
        self.newest = y
        return y + self.table[4]


def test_a_run_under_fake_tensors_leaves_no_trace():
    gm = as_one_node(Remembering())
    x = torch.randn(3, 4)
    fxwidth.analyze(fxwidth.trace(gm, x), x)
    assert (gm.model.table, gm.model.seen) == ({}, [])
    assert torch.equal(gm.model.last, torch.zeros(1))
    assert not hasattr(gm.model, "newest")
    assert gm(x).isfinite().all()
    assert list(gm.model.table) == [4]


def test_a_wrong_length_is_seen(monkeypatch):
    """Planted fault: lengths as they were, over directions of fewer entries."""
    monkeypatch.setattr("fxwidth.resizing.parameters.with_solved_lengths", lambda *_: {})
    model = build("weight norm of rows").eval()
    x = example(model)
    with torch.no_grad():
        model.first.bias[[0, 5, 9]] = -1e3
    before = model(x)
    gm = fxwidth.trace(model, x)
    fxwidth.resize(gm, {first_group(gm): 13}, data=[x])
    assert largest_difference([gm(x)], [before]) > 1e-3


def test_a_spectral_norm_that_saw_new_rows_would_change_in_training(monkeypatch):
    """Planted fault: rows that are free although the norm is over them."""
    monkeypatch.setattr("fxwidth.growth.call_view.CallView.need_zero_weight", lambda *_: None)
    model = build("spectral norm")
    x = example(model)
    gm = fxwidth.trace(build("spectral norm"), x)
    name = next(group.name for group in fxwidth.analyze(gm).free if group.width == 12)
    assert Fill.DIRECTIONS in fxwidth.analyze(gm)[name].growth.fills.values()
    fxwidth.resize(gm, {name: 15})
    assert largest_difference([gm(x)], [model.eval()(x)]) < EXACT
    model.train(), gm.train()
    for _ in range(5):
        expected, actual = model(x), gm(x)
    assert largest_difference([actual], [expected]) > 1e-6
