"""Costs against what the resized models show when they run."""

from __future__ import annotations

import random
import re

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

import fxwidth
from fxwidth.axes.polynomials import Polynomial
from fxwidth.costs.activation_memory import activation_polynomial
from fxwidth.costs.counts import flop_polynomial, parameter_count
from fxwidth.errors import FxwidthError
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.resizing.resize import resize_analyzed
from fxwidth.rules.registry import RULES, rule
from tests.zoo import models as zoo
from tests.zoo.nets import NETS, build, conv, images, tokens, width_graph

# Resizing these groups runs attention in other ops, of which training keeps more.
LOWERED = {"vit": "in_proj|class_token", "rms_transformer": "[qv]#1"}


# torch 2.11 counts the fused attention of GPUs, but not that of the CPU.
flop_registry.setdefault(
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    flop_registry[torch.ops.aten._scaled_dot_product_flash_attention],
)


def flops_of(module: nn.Module, *inputs: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops()


def kept_bytes(module: nn.Module, *inputs: Tensor) -> int:
    """Return the bytes of all distinct memory that autograd saves in training mode."""
    own = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    was_training = module.training
    module.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = module(*inputs)
    module.train(was_training)
    del result
    return sum(tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in own)


def random_widths(graph: WidthGraph, seed: int, but: str = "") -> dict[str, int]:
    generator = random.Random(seed)
    return {
        group.name: generator.randint(1, group.width)
        for group in graph.free
        if not (but and re.search(but, group.name))
    }


def value(polynomial: Polynomial, graph: WidthGraph, widths: dict[str, int]) -> float:
    return polynomial({graph[name].factor: width for name, width in widths.items()})


@pytest.mark.parametrize("name", list(zoo.SMALL))
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_costs_are_those_of_the_resized_model(name: str, seed: int | None) -> None:
    model, x = zoo.build(name)
    gm = fxwidth.trace(model, x)
    graph = fxwidth.analyze(gm)
    widths = {} if seed is None else random_widths(graph, seed)
    params = parameter_count(graph, {graph[n].factor: width for n, width in widths.items()})
    flops = value(flop_polynomial(graph), graph, widths)
    resize_analyzed(graph, widths, blind=True)
    assert params == sum(p.numel() for p in gm.parameters())
    assert flops == flops_of(gm, x)


@pytest.mark.parametrize("name", list(zoo.SMALL))
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_activation_memory_is_what_training_the_resized_model_keeps(name: str, seed: int | None) -> None:
    # Of the statistics of fused attention in float64, torch 2.11 tells a wrong dtype beforehand.
    model, x = zoo.build(name, torch.float32 if name in LOWERED else torch.float64)
    gm = fxwidth.trace(model, x)
    graph = fxwidth.analyze(gm)
    widths = {} if seed is None else random_widths(graph, seed, LOWERED.get(name, ""))
    predicted = value(activation_polynomial(graph), graph, widths)
    before = [p.detach().clone() for p in gm.parameters()]
    resize_analyzed(graph, widths, blind=True)
    assert predicted == kept_bytes(gm, x)
    if seed is None:
        assert all(torch.equal(new, old) for new, old in zip(gm.parameters(), before, strict=True))
        assert not gm.training


@pytest.mark.parametrize("name", list(NETS))
def test_costs_of_small_networks(name: str) -> None:
    graph, x = build(name)
    gm = graph.analysis.module
    widths = random_widths(graph, 3)
    flops = value(flop_polynomial(graph), graph, widths)
    memory = value(activation_polynomial(graph), graph, widths)
    resize_analyzed(graph, widths, blind=True)
    assert flops == flops_of(gm, x[:4].clone())
    if "attention" not in name:
        assert memory == kept_bytes(gm, x[:4].clone())


def test_the_analysis_is_not_changed_by_looking_at_training() -> None:
    graph, _ = build("conv")
    before = [(g.name, g.width, g.pinned, g.mixed, repr(graph.analysis.space.normalise(((g.factor,),))))
              for g in graph.groups]  # fmt: skip
    links = len(graph.analysis.space.links)
    activation_polynomial(graph)
    after = [(g.name, g.width, g.pinned, g.mixed, repr(graph.analysis.space.normalise(((g.factor,),))))
             for g in graph.groups]  # fmt: skip
    assert after == before
    assert len(graph.analysis.space.links) == links


class Dropping(nn.Module):
    """Masks and batch statistics exist in training mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(16, 12), nn.BatchNorm1d(6), nn.Linear(12, 3)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(self.norm(self.a(x).relu())))


def test_training_mode_counts() -> None:
    graph = width_graph(Dropping().double().eval(), tokens())
    predicted = value(activation_polynomial(graph), graph, {"a": 7})
    resize_analyzed(graph, {"a": 7}, blind=True)
    module = graph.analysis.module
    assert predicted == kept_bytes(module, tokens(4))
    # The input, and for each of 24 places 7 channels of relu's result, the norm's, the mask and what it leaves.
    statistics = 2 * 6 * 8
    assert predicted == 4 * 6 * 16 * 8 + 3 * 24 * 7 * 8 + statistics


def test_frozen_parameters_keep_less() -> None:
    graph, x = build("conv")
    everything = activation_polynomial(graph)({})
    model = conv().double().eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("8"))
    frozen = width_graph(model, x)
    kept = activation_polynomial(frozen)({})
    assert kept == kept_bytes(frozen.analysis.module, x[:4].clone())
    assert kept < everything / 10
    for parameter in frozen.analysis.module.parameters():
        parameter.requires_grad_(False)
    nothing = WidthGraph(frozen.analysis)
    with pytest.raises(FxwidthError) as error:
        activation_polynomial(nothing)
    assert str(error.value) == (
        "training keeps no activations: no parameter of this graph requires a gradient. "
        "Call requires_grad_() on what is to be trained, or leave activation_memory out of the budget."
    )


def test_a_model_that_only_evaluates_has_no_activation_memory() -> None:
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.norm(self.a(x[:1])))

    graph = width_graph(Strict().eval(), torch.randn(4, 4))
    with pytest.raises(
        FxwidthError,
        match="does not run in training mode, so what training keeps is not known: Expected more than 1 value",
    ):
        activation_polynomial(graph)


def test_fused_attention_in_a_graph_is_counted_as_two_products() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 24), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.qkv(x)
            q, k, v = (x.chunk(3, -1)[i].unflatten(-1, (2, 4)).transpose(1, 2) for i in range(3))
            y = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=0.5)[0]
            return self.out(y.transpose(1, 2).flatten(2))

    graph = width_graph(Fused().eval(), tokens().float())
    gm = graph.analysis.module
    assert len(graph.free) == 2
    widths = {group.name: 1 if group.width == 2 else 3 for group in graph.free}
    predicted = value(flop_polynomial(graph), graph, widths)
    memory = value(activation_polynomial(graph), graph, widths)
    resize_analyzed(graph, widths, blind=True)
    x = tokens(4).float()
    assert predicted == flops_of(gm, x)
    assert memory == kept_bytes(gm, x)


@torch.library.custom_op("fxwidth_tests::mix", mutates_args=())
def mix(left: Tensor, right: Tensor) -> Tensor:
    return left @ right


@mix.register_fake
def _(left: Tensor, right: Tensor) -> Tensor:
    return left @ right


@register_flop_formula(torch.ops.fxwidth_tests.mix)
def _mix_flops(left: tuple[int, ...], right: tuple[int, ...], *, out_shape: object = None) -> int:
    return 2 * left[0] * left[1] * right[1] + 7 * right[1] + 11


@pytest.mark.parametrize("has_rule", [False, True])
def test_the_formula_of_a_custom_op_counts(has_rule: bool) -> None:
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.w, self.b = nn.Linear(4, 6), nn.Parameter(torch.randn(6, 5)), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.ops.fxwidth_tests.mix(self.a(x).relu(), self.w).relu())

    if has_rule:
        rule("fxwidth_tests::mix")(
            lambda c: (c.unify(c.axes("left")[1], c.axes("right")[0]), [[c.axes("left")[0], c.axes("right")[1]]])[1]
        )
    try:
        x = torch.randn(3, 4)
        graph = width_graph(Custom().eval(), x)
        widths = random_widths(graph, 0)
        assert len(widths) == (2 if has_rule else 0)
        predicted = value(flop_polynomial(graph), graph, widths)
        resize_analyzed(graph, widths, blind=True)
        assert predicted == flops_of(graph.analysis.module, x)
    finally:
        RULES.pop("fxwidth_tests::mix", None)


def test_polynomials() -> None:
    graph, _ = build("conv")
    a, b = graph["0"].factor, graph["2"].factor
    cost = Polynomial({(a, b): 3, (b,): 2, (): 5})
    assert cost({a: 2, b: 4}) == 24 + 8 + 5
    assert cost.replaced({b: a})({a: 3}) == 27 + 6 + 5
    assert Polynomial.sum([(2, cost), (-2, Polynomial({(): 5}))])({a: 2, b: 4}) == 64
    assert cost.neighbours(a) == {b}
    assert images(2).shape == (2, 1, 8, 8)


def test_widths_by_name_are_refused() -> None:
    graph = width_graph(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(2, 8))
    with pytest.raises(FxwidthError, match="takes widths by factor, but received '0'"):
        fxwidth.cost_polynomial(graph, "params")({"0": 4})  # type: ignore[dict-item]
