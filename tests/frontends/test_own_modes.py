"""`train()` and `eval()` of a graph lead to the modes that those of its model lead to, whatever these do."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxwidth
from fxwidth import FxwidthWarning
from fxwidth.tracing import front_end_attempts
from fxwidth.verification.replay_oracle import largest_difference
from tests.oracles.judges import randomise
from tests.oracles.untouched import differences, snapshot

EXACT = 1e-12


class Plain(nn.Module):
    """Two layers around a batch norm and a dropout that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def hidden(self, x: Tensor) -> Tensor:
        return self.norm(self.up(x)).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.hidden(x))


class Frozen(Plain):
    """A batch norm that its own `train` leaves in evaluation."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.norm.eval()
        return self


class FrozenInCall(Plain):
    """A batch norm that each call puts in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        self.norm.eval()
        return super().forward(x)


class PutOver(Plain):
    """A method put over that of the class, by which a submodule stays in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.body.train = lambda mode=True: self.body  # type: ignore[method-assign]
        for part in self.body.modules():
            part.training = False

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.body(self.hidden(x)))

    def __deepcopy__(self, memo: dict[int, Any]) -> PutOver:
        twin = PutOver().to(self.up.weight.dtype)
        twin.load_state_dict(self.state_dict())
        for part, own in zip(twin.modules(), self.modules(), strict=True):
            part.training = own.training
        return twin


class FrozenLayer(nn.Module):
    """A layer of one's own that has no dropout in training, and whose parts stay frozen too."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def train(self, mode: bool = True) -> FrozenLayer:
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.norm(self.mix(x)), 0.5, self.training)


class Nested(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(FrozenLayer(), nn.BatchNorm1d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.layers(self.hidden(x)))


class Exported(Frozen):
    """A branch on a value that symbolic tracing cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if y.sum(0).shape[0] > 1 and bool(x.shape[0] > 0) else -y


class WithoutGradients(Frozen):
    """A frozen part that runs without gradients, which symbolic tracing cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = self.hidden(x)
        return self.down(hidden)


class Thawed(Plain):
    """The same without a method of its own."""

    forward = WithoutGradients.forward


class AlwaysRandom(Plain):
    """Monte Carlo dropout: each call puts it in training."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        self.drop.train()
        return self.down(self.drop(self.hidden(x)))


class InEval(Plain):
    """An `eval` of its own, which leaves its batch norm in training."""

    def eval(self) -> InEval:
        super().eval()
        self.norm.train()
        return self


def refused(*_: Any, **__: Any) -> Any:
    """Stand for a front end that cannot follow a model."""
    raise RuntimeError("symbolic tracing is not asked")


MODELS = [Plain, Frozen, FrozenInCall, PutOver, Nested, Exported, WithoutGradients, Thawed, AlwaysRandom, InEval]


def rows(count: int = 6) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def switched(module: nn.Module, mode: bool) -> nn.Module:
    return module.train() if mode else module.eval()


def runs(module: nn.Module, mode: bool) -> list[Tensor]:
    """Return what a module, a copy of which is put in a mode, makes of rows in two calls, and its statistics then."""
    module = switched(copy.deepcopy(module), mode)
    return results(module)


def results(module: nn.Module) -> list[Tensor]:
    torch.manual_seed(5)
    with torch.no_grad():
        answers = [module(rows()), module(rows(9))]
    return [*answers, *(buffer.double() for name, buffer in module.named_buffers() if "fxwidth" not in name)]


def model_of(kind: type[nn.Module], mode: bool) -> nn.Module:
    torch.manual_seed(0)
    return switched(randomise(kind()).double(), mode)


by_model = pytest.mark.parametrize("kind", MODELS)
by_mode = pytest.mark.parametrize("mode", [False, True], ids=["from eval", "from train"])


def constructed(kind: type[nn.Module]) -> nn.Module:
    """Return a model of which nobody has called `train()` or `eval()`."""
    torch.manual_seed(0)
    return randomise(kind()).double()


def set_by_hand(kind: type[nn.Module], mode: bool) -> nn.Module:
    """Return a model in a mode, with its batch norm and the innermost parts of its layers in the other one."""
    model = model_of(kind, mode)
    for part in model.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.Dropout)):
            part.training = not mode
    return model


STATES: dict[str, Callable[[type[nn.Module]], nn.Module]] = {
    "as constructed": constructed,
    "from eval": lambda kind: model_of(kind, False),
    "from train": lambda kind: model_of(kind, True),
    "from eval, by hand": lambda kind: set_by_hand(kind, False),
    "from train, by hand": lambda kind: set_by_hand(kind, True),
}


# Those that symbolic tracing can follow are exported too, in the states that a graph without parts can forget.
CASES = [(kind, state, False) for kind in MODELS for state in STATES]
ODD = [state for state in STATES if not state.endswith(("eval", "train"))]
CASES += [(kind, state, True) for kind in MODELS for state in ODD if kind not in (Exported, WithoutGradients, Thawed)]


@pytest.mark.parametrize(("kind", "state", "exported"), CASES)
def test_the_graph_has_the_modes_of_its_model(
    kind: type[nn.Module], state: str, exported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if exported:
        monkeypatch.setattr(front_end_attempts, "symbolic_graph", refused)
    model = STATES[state](kind)
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gm = fxwidth.trace(model, rows())
    assert not list(differences(before, snapshot(model)))
    # As it is, before anybody changes its mode; and after one and two changes.
    assert largest_difference(results(copy.deepcopy(gm)), results(copy.deepcopy(model))) < EXACT
    for now in (True, False, True):
        assert largest_difference(runs(gm, now), runs(model, now)) < EXACT, now


@by_model
def test_modes_survive_copies_pickling_and_resizes(kind: type[nn.Module]) -> None:
    model = model_of(kind, False)
    gm = fxwidth.trace(copy.deepcopy(model), rows())
    stored = io.BytesIO()
    torch.save(gm, stored)
    stored.seek(0)
    for other in (copy.deepcopy(gm), torch.load(stored, weights_only=False)):
        assert largest_difference(runs(other, True), runs(model, True)) < EXACT
        assert largest_difference(runs(other, False), runs(model, False)) < EXACT
    grown = {group.name: group.width + 3 for group in fxwidth.analyze(gm).free if group.inexact_growth is None}
    assert grown
    fxwidth.resize(gm, grown)
    for now in (True, False) if kind is not AlwaysRandom else ():
        assert largest_difference(runs(gm, now)[:1], runs(model, now)[:1]) < EXACT


def test_a_model_that_stays_behind_keeps_its_own_frozen_part() -> None:
    class Written(Frozen):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.hidden(x).view(-1, 8))

    model = model_of(Written, False)
    twin = copy.deepcopy(model)
    gm = fxwidth.trace(model, rows())
    fxwidth.resize(gm, {"up": 5})
    assert fxwidth.report(gm).resizes[-1]["original"] == "untouched"
    gm.train()
    assert not gm.norm.training
    assert gm.norm is not model.norm
    model.norm.train()
    gm.eval()
    assert model.norm.training
    assert largest_difference(runs(model, True), runs(twin, True)) < EXACT


class FrozenBlock(nn.Module):
    """A layer of torch that stays in evaluation, where it drops nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)

    def train(self, mode: bool = True) -> FrozenBlock:
        super().train(mode)
        self.block.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.block(self.up(x)[:, None]))


def test_a_frozen_layer_stays_so_when_it_is_taken_apart() -> None:
    gm = fxwidth.trace(model_of(FrozenBlock, False), rows())
    heads = next(group for group in fxwidth.analyze(gm).free if group.name.endswith("in_proj_weight#1"))
    fxwidth.resize(gm, {heads.name: heads.width // 2})
    assert any("dropout" in name and name not in dict(FrozenBlock().named_modules()) for name, _ in gm.named_modules())
    expected = runs(gm, False)
    assert largest_difference(runs(gm, True), expected) < EXACT


def test_parts_that_somebody_froze_by_hand_thaw_as_those_of_the_model() -> None:
    for kind in (Plain, FrozenInCall):
        model = model_of(kind, True)
        model.norm.eval()
        gm = fxwidth.trace(copy.deepcopy(model), rows())
        assert not gm.norm.training
        assert largest_difference(runs(gm, True), runs(model, True)) < EXACT


class Around(nn.Module):
    """A graph and a layer behind it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.head = body, nn.Linear(3, 2).double()
        self.training = body.training

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@by_mode
@pytest.mark.parametrize(("kind", "exported"), [(Plain, False), (Plain, True), (Thawed, True)])
def test_a_graph_inside_of_a_larger_model_leaves_the_modes_it_was_found_in(
    kind: type[nn.Module], exported: bool, mode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if exported:
        monkeypatch.setattr(front_end_attempts, "symbolic_graph", refused)
    plain = Around(set_by_hand(kind, mode))
    around = Around(fxwidth.trace(copy.deepcopy(plain.body), rows()))
    before = snapshot(around)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FxwidthWarning)
        gm = fxwidth.trace(around, rows())
    assert not list(differences(before, snapshot(around)))
    found = [copy.deepcopy(module) for module in (gm, around, plain)]
    outcomes = [list(map(results, found))]
    outcomes += [[runs(module, now) for module in (gm, around, plain)] for now in (False, True)]
    for traced, graph, model in outcomes:
        assert largest_difference(traced, model) < EXACT
        assert largest_difference(graph, model) < EXACT
    assert largest_difference(outcomes[0][0], outcomes[1 + mode][0]) > EXACT


# -- methods that do more ---------------------------------------------------------------------------------------------


class Merging(nn.Linear):
    """A low-rank part that is added to the weight in evaluation."""

    def __init__(self) -> None:
        super().__init__(6, 8)
        self.a, self.b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(8, 2))
        self.merged = False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (self.b @ self.a) * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.a.T @ self.b.T


class Low(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.up = Merging()


class Thawing(Plain):
    """Trains its last layer in training mode alone."""

    def train(self, mode: bool = True) -> Thawing:
        self.down.weight.requires_grad_(mode)
        return super().train(mode)


class Counting(Plain):
    """Counts the changes of its mode."""

    changes = 0

    def train(self, mode: bool = True) -> Counting:
        self.changes += 1
        return super().train(mode)


class Failing(Plain):
    def train(self, mode: bool = True) -> Failing:
        if not mode:
            raise ValueError("it is not ready")
        return super().train(mode)


class FrozenAndLow(Frozen):
    """A method that sets modes, around a part whose own does more."""

    def __init__(self) -> None:
        super().__init__()
        self.up = Merging()


@by_mode
@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (FrozenAndLow, r"of Merging, 'up' of the model, do more than set modes: they change the values of 'up.weight'"),
        (Low, r"of Merging, 'up' of the model, do more than set modes: they change the values of 'up.weight'\."),
        (Thawing, r"of Thawing do more than set modes: they change whether 'down.weight' is trained\."),
        (Counting, r"of Counting do more than set modes: they change the attribute 'changes'\."),
        (Failing, r"of Failing do more than set modes: they fail \(ValueError: it is not ready\)\."),
    ],
)
def test_methods_that_do_more_than_set_modes_are_told(kind: type[nn.Module], told: str, mode: bool) -> None:
    torch.manual_seed(0)
    model = randomise(kind()).double()
    if kind is not Failing:
        switched(model, mode)
    before = snapshot(model)
    with pytest.warns(FxwidthWarning, match=told):
        gm = fxwidth.trace(model, rows())
    assert not list(differences(before, snapshot(model)))
    assert largest_difference(results(copy.deepcopy(gm)), results(copy.deepcopy(model))) < EXACT


def test_a_model_that_could_not_change_its_mode_any_more_stays_as_it_is() -> None:
    model = model_of(Low, False)
    twin = copy.deepcopy(model)
    with pytest.warns(FxwidthWarning, match="Merging"):
        gm = fxwidth.trace(model, rows())
    fxwidth.resize(gm, {"up": 5})
    assert fxwidth.report(gm).resizes[-1]["original"] == "untouched"
    for mode in (True, False):
        assert largest_difference(runs(model, mode), runs(twin, mode)) < EXACT


class Averaging(nn.Module):
    """A slow copy that follows in training, by other memory put into it."""

    def __init__(self) -> None:
        super().__init__()
        self.fast = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.slow = copy.deepcopy(self.fast).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            for own, other in zip(self.fast.parameters(), self.slow.parameters(), strict=True):
                other.data = other.data * 0.9 + own.data * 0.1
        return self.fast(x) * self.slow(x)


def test_a_model_that_could_not_be_trained_any_more_stays_as_it_is() -> None:
    model = model_of(Averaging, False)
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gm = fxwidth.trace(model, rows())
    fxwidth.resize(gm, {"fast.0": 5})
    assert fxwidth.report(gm).resizes[-1]["original"] == "untouched"
    for mode in (True, False):
        assert largest_difference(runs(model, mode), runs(twin, mode)) < EXACT
