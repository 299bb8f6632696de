"""New channels are finite wherever old ones are: else zero times what they hold is not zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload

import fxwidth
from fxwidth.growth.ranges import _POINTS, result_range
from fxwidth.growth.recipes import Recipe
from fxwidth.recording.tape import OpCall, bind
from fxwidth.rules.registry import broadcast_all, rule_for
from fxwidth.verification.replay_oracle import largest_difference

INPUTS, WIDTH, OUT = 6, 8, 3
SCALES = (0.0, 0.01, 0.1, 1.0, 3.0)
# Of the weights and the biases of the first layer: for ops that take all numbers, positive ones, those above one.
STARTS = ((0.7, -1.0, 1.0), (0.05, 0.3, 0.7), (0.05, 1.5, 3.0))
NUMBERS = (2, -1, 0.5)


class Applied(nn.Module):
    """A function between two layers."""

    def __init__(self, function: Callable[[Tensor], Tensor], start: tuple[float, float, float]) -> None:
        super().__init__()
        self.into, self.out, self.function = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, OUT), function
        scale, low, high = start
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.into.weight.copy_(scale * torch.randn(WIDTH, INPUTS, generator=generator))
            self.into.bias.copy_(low + (high - low) * torch.rand(WIDTH, generator=generator))
            self.out.weight.copy_(torch.randn(OUT, WIDTH, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        made = self.function(self.into(x))
        if made.is_complex():
            made = torch.view_as_real(made).sum(-1)
        return self.out(made.to(x.dtype))


def grown(function: Callable[[Tensor], Tensor], start: tuple[float, float, float]) -> str | None:
    """Grow a layer in front of a function; return why that was refused, the recipe, or None if no input is finite."""
    model = Applied(function, start).double().eval()
    x = torch.randn(12, INPUTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        outputs = {scale: model(scale * x) for scale in SCALES}
    finite = [scale for scale, output in outputs.items() if output.isfinite().all()]
    if not finite:
        return None
    gm = fxwidth.trace(model, x)
    groups = [group for group in fxwidth.analyze(gm).free if group.width == WIDTH]
    if not groups:
        return "pinned"
    if groups[0].inexact_growth is not None:
        return groups[0].inexact_growth
    recipe = groups[0].growth.recipe.name
    fxwidth.resize(gm, {groups[0].name: WIDTH + 2})
    with torch.no_grad():
        for scale in finite:
            difference = largest_difference([gm(scale * x)], [outputs[scale]])
            assert difference < 1e-9, f"inputs of scale {scale}, {recipe}: outputs differ by {difference}"
    return recipe


def _values(kind: str) -> tuple[Any, ...]:
    return {"number": NUMBERS, "float": (0.5,), "int": (1,), "bool": (False,), "Scalar": NUMBERS}.get(kind, ())


def calls_of(func: OpOverload) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield calls of an op on an activation, with whatever else it needs."""
    required = [own for own in func._schema.arguments if not own.has_default_value()]
    kinds = [str(own.type) for own in required]
    if not kinds or kinds[0] != "Tensor" or any(kind != "Tensor" and not _values(kind) for kind in kinds):
        return
    for number in range(3):
        for beside in (lambda h: h.sin() + 1, lambda h: h, lambda h: h[:, :1].detach() * 0 + 0.5):

            def call(h: Tensor, number: int = number, beside: Callable[[Tensor], Tensor] = beside) -> Tensor:
                args = [
                    h,
                    *(
                        beside(h) if kind == "Tensor" else _values(kind)[number % len(_values(kind))]
                        for kind in kinds[1:]
                    ),
                ]
                positional = [arg for arg, own in zip(args, required, strict=True) if not own.kwarg_only]
                named = {own.name: arg for arg, own in zip(args, required, strict=True) if own.kwarg_only}
                result = func(*positional, **named)
                return result if len(func._schema.returns) == 1 else result[0]

            yield call
            if "Tensor" not in kinds[1:]:
                break
        if not set(kinds) & {"number", "Scalar"}:
            return


def pointwise_ops() -> list[OpOverload]:
    """Return the ops of ATen that act on each element alone."""
    found = []
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        for overload in getattr(packet, "overloads", list)():
            func = getattr(packet, overload)
            gives_tensors = all(str(own.type) == "Tensor" for own in func._schema.returns)
            is_plain = (
                gives_tensors and not func._schema.is_mutable and torch.Tag.nondeterministic_seeded not in func.tags
            )
            is_numeric = overload in ("default", "Tensor", "Tensor_Scalar", "Scalar", "Tensor_Tensor")
            if is_plain and is_numeric and name != "empty_like" and rule_for(func) is broadcast_all:
                found.append(func)
    return found


OPS = pointwise_ops()


@pytest.mark.parametrize("all_calls", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 8))])
def test_ops_that_grow_are_finite_where_they_were(part: int, all_calls: bool) -> None:
    answers: dict[str, set[str]] = {}
    for func in OPS[part::8]:
        for call in calls_of(func):
            if str(func) in answers and not all_calls:
                break
            for start in STARTS:
                try:
                    answer = grown(call, start)
                except (RuntimeError, TypeError, NotImplementedError):
                    break  # no kernel for these operands
                if answer is not None:
                    answers.setdefault(str(func), set()).add(answer if answer in Recipe.__members__ else "refused")
                    break
    assert len(answers) > 10
    assert sum("FREE" in kinds or "ZERO" in kinds for kinds in answers.values()) > len(answers) // 2


GROWING: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "logarithm": (torch.log, "MEAN"),
    "root": (torch.sqrt, "MEAN"),
    "inverse root": (torch.rsqrt, "MEAN"),
    "arc cosine": (torch.acos, "MEAN"),
    "own swish": (lambda h: h / (1 + torch.exp(-h)), "FREE"),
    "own softplus": (lambda h: torch.log(1 + torch.exp(h)), "FREE"),
    "soft sign": (lambda h: h / (1 + h.abs()), "FREE"),
    "root of a square and a number": (lambda h: h * torch.rsqrt(h.square() + 1e-5), "FREE"),
    "logarithm of a sigmoid": (lambda h: h.sigmoid().log(), "FREE"),
    "clamped": (lambda h: h.clamp(min=1e-6).log(), "FREE"),
    "normalised over the batch": (lambda h: (h - h.mean(0)) * (h.var(0, correction=0) + 1e-5).rsqrt(), "FREE"),
    "power": (lambda h: h.pow(2) + h**3, "FREE"),
    "rectified root": (lambda h: h.relu().sqrt(), "FREE"),
}
REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "reciprocal": torch.reciprocal,
    "divisor": lambda h: 1 / h,
    "by itself": lambda h: h / h,
    "negative power": lambda h: h**-1,
    "logarithm of a rectified": lambda h: h.relu().log(),
    "normalised by a root that may be zero": lambda h: h / h.square().sqrt(),
}


@pytest.mark.parametrize("name", GROWING)
def test_what_is_provably_finite_grows(name: str) -> None:
    function, recipe = GROWING[name]
    assert recipe in (grown(function, STARTS[1]), grown(function, STARTS[0]))


@pytest.mark.parametrize("name", REFUSED)
def test_what_may_not_be_finite_is_refused(name: str) -> None:
    assert "it may have no finite result for new channels" in str(grown(REFUSED[name], STARTS[1]))


FUNCTIONS = [
    *(torch.exp, torch.sigmoid, F.softplus, torch.relu, torch.sqrt, torch.log1p, torch.abs, torch.square),
    *(torch.reciprocal, torch.tanh, torch.cos, F.hardsigmoid, F.relu6, lambda h: h + 2, lambda h: 3 - h),
    *(lambda h: h * -2, lambda h: h * h, lambda h: h / 2, lambda h: 1 / h, lambda h: h.clamp(-1, 2)),
    *(lambda h: h**2, lambda h: h**0.5, lambda h: 2**h),
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("inside", [(-8.0, 8.0), (0.0, 3.7), (0.3, 2.0), (-2.0, -0.3)])
def test_results_lie_where_they_are_said_to(function: Callable[[Tensor], Tensor], inside: tuple[float, float]) -> None:
    seen: list[tuple[OpOverload, Any]] = []

    class Seeing(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append((func, bind(func, args, kwargs or {})))
            return func(*args, **(kwargs or {}))

    points = torch.tensor([point for point in _POINTS if inside[0] <= point <= inside[1]], dtype=torch.float64)
    with Seeing():
        result = function(points)
    func, arguments = seen[0]
    call = OpCall(0, func, arguments, None, "")
    low, high = result_range(call, lambda value: inside if isinstance(value, Tensor) else (float(value), float(value)))
    finite = result[result.isfinite()] if len(seen) == 1 else result[:0]
    assert bool(((finite >= low - 1e-12) & (finite <= high + 1e-12)).all())
