"""What a model does beside computing tensors, its graph does too: with gradients, memory, generators."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxwidth
from fxwidth import FxwidthError, FxwidthWarning
from fxwidth.runtime import unseen_effects
from fxwidth.runtime.trace_guards import UntraceableError
from fxwidth.runtime.unseen_effects import refuse_effects_of, watching_effects
from fxwidth.verification.replay_oracle import largest_difference
from tests.oracles.judges import ROUNDING, randomise
from tests.oracles.untouched import untouched
from tests.zoo.networks_of_effects import (
    CHECKPOINTED,
    EFFECTS,
    HIDDEN,
    CheckpointedInTraining,
    Effect,
    HookBesideSize,
    HookInTraining,
    HookOnGradient,
    WithoutGradients,
    rows,
)

by_effect = pytest.mark.parametrize("name", EFFECTS)
by_mode = pytest.mark.parametrize("mode", [False, True], ids=["from eval", "from train"])


def made(name: str, mode: bool = False) -> nn.Module:
    return randomise(EFFECTS[name]()).double().train(mode)


def behaviour(module: nn.Module, mode: bool, batch: int, *, of_parameters: bool = True) -> list[Tensor]:
    """Return what a module answers and learns from some rows, the state it leaves, and the next random number."""
    module = copy.deepcopy(module).train(mode)
    torch.manual_seed(0)
    x = rows(batch).requires_grad_()
    answer = module(x)
    answer.square().sum().backward()
    names = [name for name, _ in module.named_parameters()]
    parameters = {name.removeprefix("model."): module.get_parameter(name) for name in names}
    buffers = {name.removeprefix("model."): value for name, value in module.named_buffers()}
    found = [answer.detach(), x.grad, torch.rand(1)]
    if of_parameters:
        gradients = [parameters[name].grad for name in sorted(parameters)]
        found += [torch.zeros(0) if gradient is None else gradient for gradient in gradients]
        found += [buffers[name].double() for name in sorted(buffers)]
    return [*found, module(x).detach()]


@by_mode
@by_effect
def test_the_graph_answers_and_learns_as_the_model_does(name: str, mode: bool) -> None:
    model = made(name, mode)
    with untouched(model):
        gm = fxwidth.trace(model, rows())
    for now in (False, True):
        for batch in (4, 7):
            expected, actual = (behaviour(module, now, batch) for module in (model, gm))
            assert largest_difference(actual, expected) < ROUNDING, (now, batch)


@by_effect
def test_what_is_done_is_done_at_other_widths(name: str) -> None:
    """Exact growth changes neither answers nor the gradients of inputs."""
    gm = fxwidth.trace(made(name), rows())
    groups = [group for group in fxwidth.analyze(gm).free if group.inexact_growth is None]
    # Of other sizes other random numbers are drawn.
    if "seeded" in name or "forked" in name or "generator" in name:
        groups = []
    before = [behaviour(gm, False, batch, of_parameters=False) for batch in (4, 7)]
    fxwidth.resize(gm, {group.name: group.width + 3 for group in groups})
    for expected, batch in zip(before, (4, 7), strict=True):
        assert largest_difference(behaviour(gm, False, batch, of_parameters=False), expected) < ROUNDING


def kept_for_backward(module: nn.Module) -> int:
    numbers = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal numbers
        numbers += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(rows(32).requires_grad_())
    return numbers


@by_mode
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpoints_keep_as_little_in_the_graph(name: str, mode: bool) -> None:
    gm, model = fxwidth.trace(made(name, mode), rows()), made(name)
    for now in (True, False):
        assert kept_for_backward(gm.train(now)) <= kept_for_backward(model.train(now))
    (group,) = (group for group in fxwidth.analyze(gm).groups if group.width == 32)
    before = kept_for_backward(gm.train())
    fxwidth.resize(gm, {group.name: 8})
    assert kept_for_backward(gm) <= before


def test_a_model_that_is_checkpointed_in_training_alone_is_told_of() -> None:
    """It could be called as a whole, but its parts would be out of reach."""
    model = randomise(CheckpointedInTraining()).double()
    with pytest.warns(FxwidthWarning, match="checkpoint chooses what is kept for the backward pass"):
        fxwidth.trace(model.eval(), rows())
    assert kept_for_backward(fxwidth.trace(model.train(), rows())) == kept_for_backward(model)


# -- what is called as it is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "does"), [(HookBesideSize, "asks whether gradients are computed"), (WithoutGradients, "asks whether")]
)
def test_a_part_that_does_more_is_not_taken_apart(make: type[Effect], does: str) -> None:
    wg = fxwidth.analyze(fxwidth.trace(randomise(make()).double(), rows()))
    assert "so that it cannot be taken apart" in str(wg["up#0"].pinned)
    assert f"and it {does}" in str(wg["up#0"].pinned)


def test_a_part_that_does_more_in_training_is_not_taken_apart() -> None:
    model = randomise(HookInTraining()).double().train()
    gm = fxwidth.trace(model, rows())
    wg = fxwidth.analyze(gm)
    assert not wg.free
    assert "it asks whether gradients are computed" in str(wg["up#0"].pinned)


class NeedsGradients(Effect):
    """Computes a gradient wherever gradients are on, and fails where they are not."""

    def between(self, h: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(h.square().sum(), h, create_graph=True)
        return h + slope


def test_gradients_that_need_gradients_are_refused_with_the_remedy() -> None:
    told = r"computes gradients in its forward pass, which fails here.*by torch\.enable_grad\(\)"
    with pytest.raises(FxwidthError, match=told):
        fxwidth.trace(randomise(NeedsGradients()).double(), rows())


@pytest.mark.parametrize("name", unseen_effects._OF_TENSORS)
def test_a_node_that_would_do_more_is_refused(name: str) -> None:
    graph = fx.Graph()
    tensor = graph.placeholder("x")
    for kind, target, args in (("call_method", name, (tensor,)), ("call_function", getattr, (tensor, name))):
        with pytest.raises(UntraceableError, match=f"^{name} {unseen_effects._OF_TENSORS[name]}, which a graph"):
            refuse_effects_of(kind, target, args)
    # A part, a tensor or an input that is called so does nothing.
    for kind in ("call_module", "get_attr", "placeholder"):
        refuse_effects_of(kind, name, ())


# -- the watch -------------------------------------------------------------------------------------------------------


def places() -> list[Any]:
    return [vars(owner).get(name) for owner, name in unseen_effects.PLACES]


@pytest.mark.parametrize("name", ["a hook on a gradient", "checkpointed", "seeded"])
def test_nothing_is_left_of_the_watch(name: str) -> None:
    before = places()
    fxwidth.resize(fxwidth.trace(made(name), rows()), {})
    with watching_effects(lambda *_: None, regions=True):
        assert all(one is not two for one, two in zip(places(), before, strict=True))
    assert all(one is two for one, two in zip(places(), before, strict=True))


def test_who_looks_on_and_torch_itself_are_not_told_of() -> None:
    seen: list[str] = []
    with watching_effects(lambda _, name: seen.append(name), regions=True):
        model = nn.Sequential(nn.Embedding(5, HIDDEN, max_norm=1.0), nn.MultiheadAttention(HIDDEN, 2))
        nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))(torch.randn(2, 3))
        model[1](*[model[0](torch.arange(4))] * 3)
        with fxwidth.runtime.random_states.same_randomness():
            torch.randn(3)
    assert not seen
    x = rows().float()
    with watching_effects(lambda _, name: seen.append(name), regions=True):
        HookOnGradient()(x)
    assert set(seen) == {"register_hook"}
