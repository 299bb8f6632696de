"""Every optimizer there is: carried over a resize, or refused before anything has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

import fxwidth
from fxwidth.resizing import optimizer_state
from tests.oracles.interruptions import differences, state_of

CASES: dict[str, list[dict[str, Any]]] = {
    "Adadelta": [{}, {"maximize": True, "foreach": True}],
    "Adafactor": [{}, {"maximize": True}],
    "Adagrad": [{}, {"lr_decay": 0.1, "initial_accumulator_value": 0.1}, {"fused": True}],
    "Adam": [{}, {"amsgrad": True}, {"fused": True}, {"foreach": True, "maximize": True}, {"weight_decay": 0.1}],
    "AdamW": [{}, {"amsgrad": True}, {"fused": True}, {"foreach": True}],
    "Adamax": [{}, {"foreach": True}],
    "ASGD": [{"t0": 1.0}, {"foreach": True}],
    "Muon": [{}, {"nesterov": False}],
    "NAdam": [{}, {"decoupled_weight_decay": True, "weight_decay": 0.1}],
    "RAdam": [{}, {"foreach": True}],
    "RMSprop": [{}, {"momentum": 0.5, "centered": True}],
    "Rprop": [{}, {"foreach": True}],
    "SGD": [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "fused": True}],
    "SparseAdam": [{}],
}
REFUSED = {"LBFGS"}
ALL = [(name, options) for name, several in CASES.items() for options in several]


def test_there_is_a_case_for_every_optimizer() -> None:
    kinds = {name for name, kind in vars(torch.optim).items() if isinstance(kind, type) and issubclass(kind, Optimizer)}
    assert kinds - {"Optimizer"} == set(CASES) | REFUSED


class Looked(nn.Module):
    """An embedding, whose gradient can be sparse, and a linear layer that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Embedding(7, 8, sparse=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


class Dense(nn.Module):
    """Two layers without biases, since there are optimizers for matrices alone."""

    def __init__(self, out: int = 3) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8, bias=False), nn.Linear(8, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


def trained(name: str, options: Mapping[str, Any]) -> tuple[fx.GraphModule, Optimizer, Tensor]:
    torch.manual_seed(0)
    sparse = name == "SparseAdam"
    model = (Looked() if sparse else Dense()).double()
    x = torch.arange(14).view(2, 7) % 7 if sparse else torch.randn(5, 6, dtype=torch.float64)
    gm = fxwidth.trace(model, x)
    parameters = [gm.get_parameter("up.weight")] if sparse else list(gm.parameters())
    optimizer = getattr(torch.optim, name)(parameters, **options)
    for _ in range(4):
        optimizer.zero_grad()
        gm(x).square().mean().backward()
        optimizer.step()
    return gm, optimizer, x


def kept_channels(old: Tensor, new: Tensor) -> list[int]:
    """Return which columns of an old weight those of a new one are."""
    return [next(i for i in range(old.shape[1]) if torch.equal(old[:, i], column)) for column in new.T]


@pytest.mark.parametrize(("name", "options"), ALL)
@pytest.mark.parametrize("width", [5, 11])
def test_the_state_of_what_stays_is_the_old_one(name: str, options: dict[str, Any], width: int) -> None:
    gm, optimizer, _ = trained(name, options)
    dims = {"up.weight": 1 if name == "SparseAdam" else 0, "down.weight": 1}
    old = {path: copy.deepcopy(optimizer.state.get(gm.get_parameter(path), {})) for path in dims}
    (group,) = fxwidth.analyze(gm).free
    weight = gm.down.weight.detach().clone()
    fxwidth.resize(gm, {group.name: width}, optimizer=optimizer, fold=False, selection="magnitude")
    common = min(8, width)
    kept = torch.tensor(kept_channels(weight, gm.down.weight.detach()[:, :common]))
    for path, dim in dims.items():
        state = optimizer.state.get(gm.get_parameter(path), {})
        assert state.keys() == old[path].keys()
        for key, value in state.items():
            before = old[path][key]
            follows = isinstance(value, Tensor) and value.dim() == 2 and before.shape[dim] == 8
            if not follows:
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(before)), key
                continue
            assert torch.equal(value.narrow(dim, 0, common), before.index_select(dim, kept)), key
            new = value.narrow(dim, common, width - common)
            if bool((before > 0).all()):
                # It divides, as if by the smaller gradients of new channels, or is a length of steps.
                power = {"step_size": 0.0, "acc_delta": 0.0, "exp_inf": 0.5, "row_var": 0.5, "col_var": 0.5}.get(
                    key, 1.0
                )
                share = 0.1**power
                assert bool((new >= before.min() * share * (1 - 1e-12)).all()), key
                assert bool((new <= before.max() * share * (1 + 1e-12)).all()), key
            else:
                parameter = gm.get_parameter(path).detach().narrow(dim, common, width - common)
                assert torch.equal(new, parameter if key == "ax" else torch.zeros_like(new)), key


@pytest.mark.parametrize(("name", "options"), ALL)
@pytest.mark.parametrize("width", [5, 11])
def test_the_next_step_is_finite_and_moves(name: str, options: dict[str, Any], width: int) -> None:
    gm, optimizer, x = trained(name, options)
    (group,) = fxwidth.analyze(gm).free
    fxwidth.resize(gm, {group.name: width}, optimizer=optimizer)
    optimizer.zero_grad()
    gm(x).square().mean().backward()
    held = [parameter for own in optimizer.param_groups for parameter in own["params"]]
    assert {id(parameter) for parameter in held} <= {id(parameter) for parameter in gm.parameters()}
    for parameter in held:
        noise = torch.rand(parameter.shape, dtype=parameter.dtype) + 0.5
        assert parameter.grad is not None
        parameter.grad = noise.to_sparse(1) if parameter.grad.is_sparse else noise
    before = [parameter.detach().clone() for parameter in held]
    # Twice: where a gradient changes its sign, resilient backpropagation waits for a step.
    optimizer.step()
    for parameter in held:
        assert bool(parameter.isfinite().all())
    optimizer.step()
    for parameter, old in zip(held, before, strict=True):
        step = (parameter.detach() - old).abs()
        assert bool(step.isfinite().all())
        assert bool((step > 0).all())
        assert float(step.max()) < 100 * float(step.median())


def refused(gm: fx.GraphModule, optimizer: Any, *told: str) -> None:
    """Assert that an optimizer is refused in certain words, and that nothing has changed."""
    held = optimizer if isinstance(optimizer, Optimizer) else None
    (group,) = fxwidth.analyze(gm).free
    before = state_of(gm, optimizer=held)
    with pytest.raises(fxwidth.FxwidthError) as error:
        fxwidth.resize(gm, {group.name: 4}, optimizer=optimizer)
    assert all(text in str(error.value) for text in told), str(error.value)
    assert not differences(before, state_of(gm, optimizer=held))


def graph(out: int = 3) -> tuple[fx.GraphModule, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(5, 6)
    return fxwidth.trace(Dense(out), x), x


def test_what_is_no_optimizer_of_the_graph_is_refused() -> None:
    gm, x = graph()
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    foreign = torch.optim.AdamW(copy.deepcopy(gm).parameters())
    remedies = {
        "received StepLR; pass its .optimizer": scheduler,
        "received GradScaler; pass the one that trains gm": torch.amp.GradScaler("cpu"),
        "received dict; pass the one that trains gm": {"all": optimizer},
        "received str": [optimizer, "adam"],
        "AdamW with 2 parameters, none of which is in the graph": foreign,
    }
    for told, wrong in remedies.items():
        refused(gm, wrong, told)
        with pytest.raises(fxwidth.FxwidthError, match="optimizer= "):
            fxwidth.Evolver(gm, wrong)
        with pytest.raises(fxwidth.FxwidthError, match="optimizer= "):
            fxwidth.evolve(gm, x, params=0.5, optimizer=wrong)


def test_an_optimizer_of_a_part_is_enough() -> None:
    gm, x = graph()
    optimizer = torch.optim.Adam(gm.down.parameters())
    gm(x).square().mean().backward()
    optimizer.step()
    fxwidth.resize(gm, {"up": 4}, optimizer=optimizer)
    assert [id(parameter) for parameter in optimizer.param_groups[0]["params"]] == [id(gm.down.weight)]
    assert optimizer.state[gm.down.weight]["exp_avg"].shape == (3, 4)


class Sharpness(Optimizer):
    """Sharpness-aware minimisation: an optimizer around another, with state of its own."""

    def __init__(self, parameters: Any, **options: Any) -> None:
        super().__init__(parameters, {})
        self.base = torch.optim.Adam(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["old"] = parameter.detach().clone()
        self.base.step()


def test_an_optimizer_inside_of_another_follows_too() -> None:
    gm, x = graph()
    optimizer = Sharpness(gm.parameters())
    gm(x).square().mean().backward()
    optimizer.step()
    fxwidth.resize(gm, {"up": 4}, optimizer=optimizer)
    own = {id(parameter) for parameter in gm.parameters()}
    for one in (optimizer, optimizer.base):
        assert {id(parameter) for parameter in one.state} == own
        for parameter, state in one.state.items():
            assert all(value.shape == parameter.shape for value in state.values() if value.dim())


class Stateful(torch.optim.SGD):
    """An optimizer that keeps what it is told to, in its state or in an attribute."""

    def __init__(self, gm: nn.Module, state: Callable[[Tensor], Any]) -> None:
        super().__init__(gm.parameters(), lr=0.1)
        for parameter in gm.parameters():
            self.state[parameter]["extra"] = state(parameter.detach())


@pytest.mark.parametrize(
    ("state", "told"),
    [
        (lambda p: torch.eye(len(p)), ("'extra'", "of shape (8, 8)", "'up.weight' (8, 6)")),
        (lambda p: p.reshape(-1), ("of shape (48,)",)),
        (lambda p: torch.zeros(p.numel() // 4), ("of shape (12,)",)),
        (lambda p: [p.clone(), {"factor": torch.eye(p.shape[1])}], ("extra[1]['factor']", "of shape (6, 6)")),
        (lambda p: (torch.ones(p.shape[0]),), ("extra[0]",)),
        (lambda p: nn.Linear(3, 3).weight, ("of shape (3, 3)",)),
        (lambda p: type("Block", (), {})(), ()),
    ],
    ids=["factors", "flat", "blocks", "nested", "tuple", "other", "object"],
)
def test_state_of_an_unknown_form_is_refused(state: Callable[[Tensor], Any], told: tuple[str, ...]) -> None:
    gm, _ = graph()
    optimizer = Stateful(gm, state)
    if not told:
        for own in optimizer.state.values():
            own["extra"].scales = torch.ones(5)
    refused(gm, optimizer, "Stateful keeps state", "fxwidth.optimizer_state_rule", *told)


def test_a_square_factor_is_not_taken_for_state_of_a_square_parameter() -> None:
    gm, _ = graph(out=8)  # the second weight is [8, 8], and so is its factor
    refused(gm, Stateful(gm, lambda p: torch.eye(len(p))), "'up.weight'")


def test_parameters_in_an_attribute_are_refused() -> None:
    gm, _ = graph()
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    optimizer.buckets = {"cpu": [list(gm.parameters())]}
    refused(gm, optimizer, "SGD keeps parameter 'up.weight' in its attribute 'buckets'")


def test_state_in_lists_follows() -> None:
    gm, _ = graph()
    optimizer = Stateful(gm, lambda p: [p.clone(), {"scale": 2.0, "exp_avg_sq": p.abs() + 1}])
    weight = gm.up.weight.detach().clone()
    fxwidth.resize(gm, {"up": 10}, optimizer=optimizer)
    copied, inner = optimizer.state[gm.up.weight]["extra"]
    assert torch.equal(copied[:8], weight)
    assert not copied[8:].any()
    assert inner["scale"] == 2.0
    assert torch.allclose(inner["exp_avg_sq"][8:], 0.1 * (weight.abs() + 1).mean(0))


PAGE = (Path(__file__).parents[2] / "docs/guides/optimizer-state.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [4, 11])
def test_a_rule_as_in_the_documentation(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_state, "_RULES", {})
    defined: dict[str, Any] = {}
    first, second = (part.split("```", 1)[0] for part in PAGE.split("```python\n")[1:3])
    exec(first, defined)
    gm, x = graph()
    optimizer = defined["Shampoo"](gm.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        gm(x).square().mean().backward()
        optimizer.step()

    step()
    refused(gm, optimizer, "Shampoo keeps state 'left' for parameter 'up.weight'")
    exec(second, defined)
    before = tree_map_only(Tensor, torch.clone, dict(optimizer.state[gm.up.weight]))
    fxwidth.resize(gm, {"up": width}, optimizer=optimizer, fold=False)
    after = optimizer.state[gm.up.weight]["left"]
    if width > 8:
        assert torch.equal(after[:8, :8], before["left"])
        assert torch.equal(after[8:, 8:], torch.eye(width - 8))
    step()
    assert all(bool(parameter.isfinite().all()) for parameter in gm.parameters())


def test_a_rule_is_for_a_class_of_optimizers() -> None:
    with pytest.raises(fxwidth.FxwidthError, match=r"takes a class of torch\.optim\.Optimizer, but received"):
        fxwidth.optimizer_state_rule(nn.Linear)


def test_copies_of_parameters_in_an_attribute_are_refused() -> None:
    """As the slow weights of an optimizer that looks ahead."""
    gm, _ = graph()
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    optimizer.slow = [parameter.detach().clone() for parameter in gm.parameters()]
    refused(gm, optimizer, "SGD keeps a tensor of the shape of 'up.weight' in its attribute 'slow'")
