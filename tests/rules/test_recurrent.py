"""Recurrent layers and cells: their hidden, projected and input sizes, the state they start from, what they keep."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxwidth
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.recording.graph_meta import HISTORY
from fxwidth.verification.replay_oracle import largest_difference, replay_difference
from tests.growth.test_interpreter import disagreements
from tests.oracles.growth import check_all, recipes, width_graph
from tests.oracles.judges import ROUNDING, analysed, assert_replays, assert_rewrites, random_maps, randomise
from tests.oracles.rules import check_permutations, coupled_without_need, make_probe
from tests.oracles.samples import ROWS, TOLD_BY_LATER_TORCH

WIDTH, HIDDEN, LENGTH = 16, 12, 5


class Recurrent(nn.Module):
    """A recurrent layer between linear ones, which may also make its first state and read its last one."""

    def __init__(self, kind: type[nn.RNNBase], given: bool = False, reads_cell: bool = False, **options: Any) -> None:
        super().__init__()
        self.into, self.layer = nn.Linear(10, WIDTH), kind(WIDTH, HIDDEN, **options)
        self.shown = options.get("proj_size") or HIDDEN
        self.directions = 2 if self.layer.bidirectional else 1
        self.states = self.layer.num_layers * self.directions
        if given:
            self.state = nn.Linear(10, self.states * self.shown)
            self.cell = nn.Linear(10, self.states * HIDDEN) if kind is nn.LSTM else None
        self.given, self.reads_cell = given, reads_cell
        self.head = nn.Linear(HIDDEN if reads_cell else self.shown * self.directions, 3)

    def first_state(self, x: Tensor) -> Any:
        start = x[:, 0] if self.layer.batch_first else x[0]
        parts = [part for part in (self.state, self.cell) if part is not None]
        made = [part(start).view(start.shape[0], self.states, -1).transpose(0, 1).contiguous() for part in parts]
        return made[0] if self.cell is None else tuple(made)

    def forward(self, x: Tensor) -> Tensor:
        out, last = self.layer(self.into(x), self.first_state(x) if self.given else None)
        return self.head(last[1][-1] if self.reads_cell else out)


LAYERS: dict[str, tuple[type[nn.RNNBase], dict[str, Any], int]] = {
    "lstm": (nn.LSTM, {}, 2),
    "gru": (nn.GRU, {}, 2),
    "rnn": (nn.RNN, {}, 2),
    "relu, no bias": (nn.RNN, {"nonlinearity": "relu", "bias": False}, 2),
    "lstm, both directions": (nn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True}, 2),
    "gru, both directions": (nn.GRU, {"num_layers": 2, "bidirectional": True, "dropout": 0.5, "batch_first": True}, 2),
    "rnn, three layers": (nn.RNN, {"num_layers": 3, "dropout": 0.5}, 2),
    "lstm, projected": (nn.LSTM, {"num_layers": 2, "proj_size": 5, "batch_first": True}, 3),
    "lstm, projected, both directions": (
        nn.LSTM,
        {"num_layers": 2, "proj_size": 5, "bidirectional": True, "given": True, "dropout": 0.4},
        3,
    ),
    "lstm, given state": (nn.LSTM, {"given": True}, 2),
    "gru, given state": (nn.GRU, {"given": True, "num_layers": 2, "batch_first": True}, 2),
    "lstm, last cell": (nn.LSTM, {"reads_cell": True, "proj_size": 5}, 3),
}
by_layer = pytest.mark.parametrize("name", LAYERS)


def build(name: str) -> Recurrent:
    kind, options, _ = LAYERS[name]
    return Recurrent(kind, **options)


def sequences(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4, LENGTH, 10)), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def assert_lists_agree(layer: nn.RNNBase) -> None:
    """Assert that the list of weights which a layer hands to its kernels holds its parameters."""
    names = layer._flat_weights_names
    assert all(own is getattr(layer, name) for own, name in zip(layer._flat_weights, names, strict=True))


@by_layer
def test_removals_replay(name):
    analysis = analysed(build(name), [sequences().float()])
    assert len(WidthGraph(analysis).free) == LAYERS[name][2]
    assert_replays(analysis, [sequences().float()])


@by_layer
def test_halved_layers_stay_layers(name):
    model = build(name)
    layer = model.layer
    gm = assert_rewrites(model, [sequences().float()])
    assert gm.layer is layer
    assert "layer" not in gm.meta[HISTORY][-1]["lowered"]
    assert (layer.input_size, layer.hidden_size) == (WIDTH // 2, HIDDEN // 2)
    assert layer.proj_size == (2 if LAYERS[name][1].get("proj_size") else 0)
    assert_lists_agree(layer)
    # Sequences of other lengths, other batches, training.
    x = sequences(3, LENGTH + 2, 10)
    assert gm(x).isfinite().all()
    optimizer = torch.optim.SGD(gm.train().parameters(), 0.1)
    before = [weight.clone() for weight in layer.parameters()]
    gm(x).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(one, other) for one, other in zip(before, layer.parameters(), strict=True))
    assert torch.equal(gm(x), gm(x)) is (layer.dropout == 0)
    assert_lists_agree(layer)


@by_layer
def test_growth_is_exact(name):
    wg = width_graph(build(name), sequences())
    assert set(recipes(wg).values()) == {"FREE"}
    check_all(wg, sequences())


class Branching(Recurrent):
    """What symbolic tracing cannot follow: `torch.export` makes one op of the layer."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 10:
            raise ValueError("the wrong width")
        return super().forward(x)


def layer_ops(gm: fx.GraphModule) -> list[str]:
    names = [node.target.name() for node in gm.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return [name for name in names if name.split("::")[1].startswith(("lstm", "gru", "rnn"))]


@by_layer
def test_exported_layers(name):
    kind, options, free = LAYERS[name]
    gm = fxwidth.trace(randomise(Branching(kind, **options).eval()).double(), sequences())
    (op,) = layer_ops(gm)
    wg = fxwidth.analyze(gm)
    assert len(wg.free) == free
    assert replay_difference(wg.analysis, random_maps(wg.analysis, 0.3), [sequences()]) < ROUNDING
    assert_rewrites(gm, [sequences()])
    # It is still one op, with smaller weights.
    assert layer_ops(gm) == [op]
    assert not gm.meta[HISTORY][-1]["lowered"]
    gm.train()(sequences()).square().mean().backward()
    assert all(weight.grad is not None for weight in gm.parameters())
    dropout = options.get("dropout", 0) if options.get("num_layers", 1) > 1 else 0
    assert torch.equal(gm(sequences()), gm(sequences())) is (dropout == 0)
    if options.get("batch_first"):
        assert gm.eval()(sequences(7, LENGTH, 10)).shape == (7, LENGTH, 3)


def test_an_analysis_leaves_the_list_of_weights_alone():
    model = build("lstm, projected").double()
    gm = fxwidth.trace(model, sequences())
    fxwidth.analyze(gm)
    assert_lists_agree(gm.layer)
    fxwidth.resize(gm, {"into": 9})
    assert_lists_agree(gm.layer)


def test_saved_and_loaded(tmp_path):
    model = build("lstm, both directions").double().eval()
    gm = fxwidth.trace(copy.deepcopy(model), sequences())
    fxwidth.resize(gm, {group.name: group.width // 2 for group in fxwidth.analyze(gm).free})
    fxwidth.save(gm, tmp_path / "model.safetensors")
    loaded = fxwidth.load(tmp_path / "model.safetensors", model, sequences())
    stored = io.BytesIO()
    torch.save(gm, stored)
    stored.seek(0)
    for other in (loaded, torch.load(stored, weights_only=False), copy.deepcopy(gm)):
        assert torch.equal(other(sequences()), gm(sequences()))
        assert_lists_agree(other.layer)
        state = {name: torch.zeros_like(value) for name, value in other.state_dict().items()}
        other.load_state_dict(state)
        assert not other(sequences()).any()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_units_that_say_the_same_go_without_a_trace(kind):
    """What a unit tells the others, itself and the next layer is taken over by its twin, in every step."""
    model = randomise(Recurrent(kind, num_layers=2, batch_first=True).eval()).double()
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
    with torch.no_grad():
        for weight in model.layer.parameters():
            rows = weight.view(gates, HIDDEN, -1)
            rows[:, HIDDEN // 2 :] = rows[:, : HIDDEN // 2]
    before = model(sequences())
    gm = fxwidth.trace(model, sequences())
    (group,) = [group.name for group in fxwidth.analyze(gm).free if group.width == HIDDEN]
    fxwidth.resize(gm, {group: HIDDEN // 2})
    assert gm.layer.hidden_size == HIDDEN // 2
    assert largest_difference([gm(sequences())], [before]) < ROUNDING


class Cells(nn.Module):
    """Cells called step by step, each with a first state of zeros or of its own."""

    def __init__(self, kind: Callable[..., nn.RNNCellBase], learned: bool = False) -> None:
        super().__init__()
        self.into, self.cell, self.head = nn.Linear(10, WIDTH), kind(WIDTH, HIDDEN), nn.Linear(HIDDEN, 3)
        self.start = nn.Parameter(torch.randn(1, HIDDEN)) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        state: Any = None
        if self.start is not None:
            state = self.start.expand(x.shape[0], HIDDEN)
            state = (state, state.cos()) if isinstance(self.cell, nn.LSTMCell) else state
        for i in range(LENGTH):
            state = self.cell(x[:, i], state)
        return self.head(state[0] if isinstance(self.cell, nn.LSTMCell) else state)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("kind", [nn.GRUCell, nn.RNNCell, nn.LSTMCell])
def test_cells(kind, learned):
    model = Cells(kind, learned)
    assert_replays(analysed(copy.deepcopy(model), [sequences().float()]), [sequences().float()])
    gm = assert_rewrites(copy.deepcopy(model), [sequences().float()])
    cells = [part for part in gm.modules() if isinstance(part, nn.RNNCellBase)]
    assert [(cell.input_size, cell.hidden_size) for cell in cells] == [(WIDTH // 2, HIDDEN // 2)]
    check_all(width_graph(copy.deepcopy(model), sequences()), sequences())


def test_a_projection_as_wide_as_the_layer_is_taken_apart():
    """The kernel tells a projected layer by its widths: where they agree the layer must become its gates."""
    model = randomise(Recurrent(nn.LSTM, proj_size=5, batch_first=True).eval()).double()
    gm = fxwidth.trace(model, sequences())
    analysis = fxwidth.analyze(gm).analysis
    assert replay_difference(analysis, random_maps(analysis, 0.5), [sequences()]) < ROUNDING
    names = [group.name for group in fxwidth.analyze(gm).free if group.width == HIDDEN]
    before = gm(sequences())
    fxwidth.resize(gm, dict.fromkeys(names, 5))
    assert list(gm.meta[HISTORY][-1]["lowered"]) == ["layer"]
    assert gm(sequences(7, LENGTH, 10)).shape == (7, LENGTH, 3)
    assert largest_difference([gm(sequences())], [before]) > 1e-3


# -- the cells that a GPU runs as one op, which the CPU lacks --


def fused_lstm_cell(
    one: Tensor, two: Tensor, cx: Tensor, b1: Tensor | None = None, b2: Tensor | None = None
) -> tuple[Tensor, ...]:
    gates = one + two + (0 if b1 is None or b2 is None else b1 + b2)
    i, f, g, o = gates.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cy = f * cx + i * g
    return o * cy.tanh(), cy, torch.cat([i, f, g, o], 1)


def fused_gru_cell(
    one: Tensor, two: Tensor, hx: Tensor, b1: Tensor | None = None, b2: Tensor | None = None
) -> tuple[Tensor, ...]:
    reset_1, update_1, new_1 = (one if b1 is None else one + b1).chunk(3, 1)
    reset_2, update_2, new_2 = (two if b2 is None else two + b2).chunk(3, 1)
    reset, update = (reset_1 + reset_2).sigmoid(), (update_1 + update_2).sigmoid()
    new = (new_1 + reset * new_2).tanh()
    return new + update * (hx - new), torch.cat([reset, update, new, hx, new_2], 1)


FUSED = {"_thnn_fused_lstm_cell": fused_lstm_cell, "_thnn_fused_gru_cell": fused_gru_cell}


@pytest.fixture
def fused_cells_on_the_cpu():
    with torch.library._scoped_library("aten", "IMPL") as library:
        for name, function in FUSED.items():
            library.impl(name, function, "CPU")
        yield


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_the_kernels_of_this_test_are_those_of_the_cells(kind):
    cell, x, h = kind(5, 4).double(), torch.randn(3, 5).double(), torch.randn(3, 4).double()
    one, two = x @ cell.weight_ih.T, h @ cell.weight_hh.T
    with torch.no_grad():
        if kind is nn.LSTMCell:
            expected = cell(x, (h, h.cos()))
            actual = fused_lstm_cell(one, two, h.cos(), cell.bias_ih, cell.bias_hh)[:2]
        else:
            expected, actual = [cell(x, h)], fused_gru_cell(one, two, h, cell.bias_ih, cell.bias_hh)[:1]
    assert largest_difference(list(actual), list(expected)) < ROUNDING


@pytest.mark.parametrize("name", sorted(FUSED.keys() - TOLD_BY_LATER_TORCH))
def test_fused_cells(name, fused_cells_on_the_cpu):
    rows = [replace(row, by_value=True) for row in ROWS if row.op == name]
    assert rows
    for row in rows:
        probe = make_probe(row)
        check_permutations(probe)
        assert coupled_without_need(probe) == []
        assert disagreements(row) == []
