"""What the backend compiles is what `evolve` makes of the model, with the model's weights of now, or is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth import FxwidthError, FxwidthWarning
from tests.compilation.networks import Broken, Normed, TwoInputs, convolutional, evaluated, images
from tests.zoo.nets import trained_like


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


# Neither draws inputs nor looks at data: for what does not depend on how channels are chosen.
QUICK: dict[str, Any] = {"selection": "magnitude", "fold": False}


def shrinking(model: nn.Module, **options: Any) -> tuple[Callable[..., Any], Any]:
    backend = fxwidth.compile_backend(inner="eager", **{"params": 0.5, **options})
    return torch.compile(model, backend=backend), backend


def shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return sorted(tuple(parameter.shape) for parameter in module.parameters())


CASES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "convolutional": lambda: (evaluated(), images()),
    "normed": lambda: (trained_like(Normed()), torch.randn(5, 6, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("with_data", [False, True])
def test_it_is_what_evolve_makes_at_all_batch_sizes(name: str, with_data: bool) -> None:
    model, x = CASES[name]()
    options = {"data": [torch.randn(2000, *x.shape[1:], dtype=x.dtype)]} if with_data else {}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evolved = fxwidth.evolve(copy.deepcopy(model), x, params=0.5, **options)
    compiled, backend = shrinking(model, **options)
    torch.testing.assert_close(compiled(x), evolved(x), rtol=1e-9, atol=1e-9)
    (part,) = backend._parts
    assert shapes(part.shrunk) == shapes(evolved)
    for batch in (3, 7, 2):  # of which dynamo makes graphs of their own
        other = torch.randn(batch, *x.shape[1:], dtype=x.dtype)
        torch.testing.assert_close(compiled(other), evolved(other), rtol=1e-9, atol=1e-9)
    assert len(backend._parts) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_repr_tells_what_has_been_shrunk() -> None:
    compiled, backend = shrinking(evaluated(), **QUICK)
    assert repr(backend) == "<compile_backend by 'eager': nothing captured yet>"
    compiled(images())
    assert repr(backend).startswith("<compile_backend by 'eager': 1,205 -> ")


def test_all_sizes_may_be_symbols() -> None:
    model, x = evaluated(), images()
    evolved = fxwidth.evolve(copy.deepcopy(model), x, params=0.5, **QUICK)
    backend = fxwidth.compile_backend(inner="eager", params=0.5, **QUICK)
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for batch, size in ((4, 8), (3, 9)):
        x = torch.randn(batch, 3, size, size, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), evolved(x), rtol=1e-9, atol=1e-9)


def test_a_graph_that_breaks_is_shrunk_in_parts_to_the_same_share() -> None:
    model = trained_like(Broken())
    compiled, backend = shrinking(model, **QUICK)
    x = torch.randn(5, 6, dtype=torch.float64)
    hidden = fxwidth.evolve(copy.deepcopy(model.first), x, params=0.5, **QUICK)(x)
    wanted = fxwidth.evolve(copy.deepcopy(model.second), hidden, params=0.5, **QUICK)(hidden)
    torch.testing.assert_close(compiled(x), wanted, rtol=1e-9, atol=1e-9)
    assert len(backend._parts) == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"params": 150}, "params=150 is a budget of the whole model"),
        ({"data": [torch.randn(9, 6).double()]}, "data= are inputs of the whole model"),
    ],
)  # fmt: skip
def test_what_is_for_a_whole_model_is_refused_for_a_second_part(options: Any, told: str) -> None:
    compiled, _ = shrinking(trained_like(Broken()), **options)
    with pytest.raises(FxwidthError, match=told):
        compiled(torch.randn(5, 6, dtype=torch.float64))


def test_other_ops_at_another_size_are_shrunk_by_themselves_with_a_warning() -> None:
    class Branching(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if len(x) < 4 else x.tanh())

    model = trained_like(Branching(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)))
    compiled, _ = shrinking(model, **QUICK)
    plain = nn.Sequential(*copy.deepcopy(list(model)))
    evolved = fxwidth.evolve(plain, torch.randn(3, 6, dtype=torch.float64), params=0.5, **QUICK)
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(compiled(x), evolved(x), rtol=1e-9, atol=1e-9)
    x = torch.randn(5, 6, dtype=torch.float64)
    with pytest.warns(FxwidthWarning, match="captured a part of the model anew, by other ops"):
        found = compiled(x)
    torch.testing.assert_close(found, evolved(x.tanh()), rtol=1e-9, atol=1e-9)


def test_parts_without_free_groups_pass_through_with_a_warning() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    x = torch.randn(5, 4)
    with pytest.warns(FxwidthWarning, match="has no group whose width may change, and is compiled as it is: 2 ops"):
        found = shrinking(model)[0](x)
    assert torch.equal(found, model(x))
    model[0].weight.mul_(2)  # nothing of it is kept
    with pytest.warns(FxwidthWarning, match="holds no parameters, and is compiled as it is"):
        assert torch.equal(shrinking(nn.ReLU())[0](x), x.relu())


def test_gradients_are_refused() -> None:
    model, x = evaluated(), images()
    compiled, _ = shrinking(model, **QUICK)
    wanted = compiled(x)
    with torch.enable_grad(), pytest.raises(FxwidthError, match=r"for inference, but gradients are on and parameters"):
        compiled(x)
    with torch.inference_mode():
        assert torch.equal(compiled(x), wanted)
    model.requires_grad_(False)
    with torch.enable_grad():
        assert torch.equal(compiled(x), wanted)
        with pytest.raises(FxwidthError, match="an input requires"):
            compiled(images().requires_grad_())
        model.requires_grad_(True)
        with pytest.raises(FxwidthError, match="parameters require"):
            compiled(x)


def test_writes_are_refused() -> None:
    model, x = evaluated().train(), images()
    compiled, _ = shrinking(model, **QUICK)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FxwidthError, match=r"writes to its buffer .*as batch norms do in training.*model.eval\(\)"):
        compiled(x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.eval()
    assert compiled(x).shape == (4, 5)

    class Writing(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.add_(1))

    compiled, _ = shrinking(Writing(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    with pytest.raises(FxwidthError, match="writes to input"):
        compiled(torch.ones(2, 4))


def _write(model: nn.Sequential) -> None:
    model[3].weight.mul_(2)


def _write_by_data(model: nn.Sequential) -> None:
    model[3].weight.data.mul_(2)


def _load(model: nn.Sequential) -> None:
    model.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()})


def _assign(model: nn.Sequential) -> None:
    model[3].weight = nn.Parameter(model[3].weight + 1)


def _give_data(model: nn.Sequential) -> None:
    model[3].weight.data = model[3].weight + 1


def _write_statistics(model: nn.Sequential) -> None:
    model[1].running_var.mul_(2)


_SLOW = [pytest.param(change, marks=pytest.mark.slow) for change in (_write, _load, _give_data)]


@pytest.mark.parametrize("change", [_write_by_data, _write_statistics, *_SLOW])
def test_weights_that_have_changed_are_refused_until_all_is_compiled_anew(change: Callable[..., None]) -> None:
    model, x = evaluated(), images()
    compiled, backend = shrinking(model, **QUICK)
    before = compiled(x)
    change(model)
    with pytest.raises(FxwidthError, match=r"since the model was shrunk .*torch.compiler.reset\(\)"):
        compiled(x)
    torch.compiler.reset()
    after = compiled(x)
    assert not torch.allclose(after, before)
    wanted = fxwidth.evolve(copy.deepcopy(model), x, params=0.5, **QUICK)(x)
    torch.testing.assert_close(after, wanted, rtol=1e-9, atol=1e-9)
    assert len(backend._parts) == 1


@pytest.mark.parametrize("options", [QUICK, {}])
def test_a_weight_that_was_replaced_is_gone_by(options: dict[str, Any]) -> None:
    model, x = evaluated(), images()
    compiled, backend = shrinking(model, **options)
    before = compiled(x)
    _assign(model)
    after = compiled(x)
    assert not torch.allclose(after, before)
    wanted = fxwidth.evolve(copy.deepcopy(model), x, params=0.5, **options)(x)
    torch.testing.assert_close(after, wanted, rtol=1e-9, atol=1e-9)
    assert len(backend._parts) == 1


def test_each_model_of_a_class_is_shrunk_by_itself() -> None:
    """Dynamo has one graph for all of them, and passes it the weights."""
    models = [Normed(), Normed(), Normed()]
    for number, model in enumerate(models):
        torch.manual_seed(number)
        trained_like(model)
    x = torch.randn(5, 6, dtype=torch.float64)
    backend = fxwidth.compile_backend(params=0.5, inner="eager")
    compiled = [torch.compile(model, backend=backend) for model in models]
    wanted = [fxwidth.evolve(copy.deepcopy(model), x, params=0.5) for model in models]
    for _ in range(2):
        for one, other in zip(compiled, wanted, strict=True):
            torch.testing.assert_close(one(x), other(x), rtol=1e-9, atol=1e-9)
    assert len(backend._parts) == 3
    with torch.no_grad():
        next(models[1].parameters()).mul_(2)
    for one, other in ((compiled[0], wanted[0]), (compiled[2], wanted[2])):
        torch.testing.assert_close(one(x), other(x), rtol=1e-9, atol=1e-9)
    with pytest.raises(FxwidthError, match="has been written to since"):
        compiled[1](x)


class Layered(nn.Module):
    """Layers that the tests choose from."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Sequential(nn.Linear(16, 16), nn.ReLU()), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layers make of x, [n, 4]."""
        return self.c(self.b(self.a(x).relu()))  # type: ignore[no-any-return]


class Cast(Layered):
    """The same, but for the last layer in another precision."""

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layers make of x, [n, 4]."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.b(self.a(x).relu())
        return self.c(x.float())  # type: ignore[no-any-return]


class Summed(Layered):
    """A model that computes with sizes."""

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layers make of x, [n, 4]."""
        return super().forward(x) * torch.sym_sum([x.shape[0], x.shape[1], 1])


@pytest.mark.parametrize("chosen", ["keep", "only"])
def test_layers_are_chosen_by_the_module_too(chosen: str) -> None:
    model, x = trained_like(Layered()), torch.randn(5, 6, dtype=torch.float64)
    for name, given in (("a", [model.a]), ("b.0", model.b)):
        torch.compiler.reset()
        compiled, backend = shrinking(model, params=0.8, **{chosen: given}, **QUICK)
        evolved = fxwidth.evolve(copy.deepcopy(model), x, params=0.8, **{chosen: [name]}, **QUICK)
        torch.testing.assert_close(compiled(x), evolved(x), rtol=1e-9, atol=1e-9)
        assert shapes(backend._parts[0].shrunk) == shapes(evolved)
    torch.compiler.reset()
    with pytest.raises(FxwidthError, match=f"{chosen}= was given a module, Linear, but none of its parameters are in"):
        shrinking(model, params=0.8, **{chosen: nn.Linear(2, 2)}, **QUICK)[0](x)


def test_a_loss_is_one_of_what_the_model_returns() -> None:
    model, x = trained_like(Layered()), torch.randn(64, 6, dtype=torch.float64)
    targets = torch.randint(0, 4, (64,))
    options: dict[str, Any] = {"data": [(x, targets)], "loss": nn.functional.cross_entropy}
    compiled, _ = shrinking(model, **options)
    evolved = fxwidth.evolve(copy.deepcopy(model), x, params=0.5, **options)
    torch.testing.assert_close(compiled(x), evolved(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [Cast, Summed])
def test_what_dynamo_writes_around_ops_is_gone_by(kind: type[Layered]) -> None:
    # By one share for all widths: plans go by noise, which is another in half precision.
    torch.manual_seed(0)
    model, x = kind(), torch.randn(5, 6)
    compiled = torch.compile(
        model, backend=fxwidth.compile_backend(ratio=0.5, inner="eager", **QUICK), dynamic=kind is Summed
    )
    model.eval()
    evolved = fxwidth.evolve(copy.deepcopy(model), x, ratio=0.5, **QUICK)
    wanted = evolved(x)
    if kind is Cast:  # which is kept whole where a model is traced by other ways than dynamo's
        plain = Layered().eval()
        plain.load_state_dict(model.state_dict())
        layers = fxwidth.evolve(plain, x, ratio=0.5, **QUICK).get_submodule
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = layers("b.0")(layers("a")(x).relu()).relu()
        wanted = layers("c")(h.float())
        assert not torch.is_autocast_enabled("cpu")
    answer = compiled(x)
    assert answer.dtype == wanted.dtype
    assert torch.equal(answer, wanted)


def test_an_error_of_the_data_comes_out_as_it_is_and_is_no_end() -> None:
    class Failing:
        fails = True

        def __iter__(self) -> Iterator[Tensor]:
            if self.fails:
                raise OSError("the disk is gone")
            yield torch.randn(64, 6, dtype=torch.float64)

    model, data, x = trained_like(Layered()), Failing(), torch.randn(5, 6, dtype=torch.float64)
    compiled, _ = shrinking(model, data=data)
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            compiled(x)
    data.fails = False
    assert compiled(x).shape == (5, 4)


def test_weights_are_taken_by_identity_and_shared_ones_stay_shared() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # Of one shape: an order that differs would not be seen by shapes.
            self.z, self.a, self.m = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in (self.m, self.a, self.m, self.z):
                x = layer(x).relu()
            return x

    model, x = trained_like(Shared()), torch.randn(5, 6, dtype=torch.float64)
    # Noise in the place of data is drawn in the order in which parameters are registered.
    data = [torch.randn(4000, 6, dtype=torch.float64)]
    compiled, backend = shrinking(model, params=0.8, data=data)
    evolved = fxwidth.evolve(copy.deepcopy(model), x, params=0.8, data=data)
    torch.testing.assert_close(compiled(x), evolved(x), rtol=1e-9, atol=1e-9)
    assert len(list(backend._parts[0].shrunk.parameters())) == 6


def test_data_of_several_inputs_go_by_name() -> None:
    model = trained_like(TwoInputs())
    x, y = (torch.randn(4000, 5, dtype=torch.float64) for _ in range(2))
    y = 3 * y
    compiled, _ = shrinking(model, data=[{"x": x, "y": y}])
    evolved = fxwidth.evolve(copy.deepcopy(model), (x, y), params=0.5, data=[{"x": x, "y": y}])
    torch.testing.assert_close(compiled(x, y), evolved(x, y), rtol=1e-9, atol=1e-9)
    torch.compiler.reset()
    with pytest.raises(FxwidthError, match="takes 2 inputs, whose order is not that of the model's arguments"):
        shrinking(model, data=[(x, y)])[0](x, y)


def test_functions_among_ops_are_refused() -> None:
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(torch.cond(x.sum() > 0, lambda x: x.relu(), lambda x: x.tanh(), (x,)))

    with pytest.raises(FxwidthError, match=r"'cond', which takes functions, such as the branches of torch.cond"):
        shrinking(Choosing(), **QUICK)[0](torch.ones(2, 4))


def test_a_number_that_is_no_size_is_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, times: int) -> Tensor:
            return self.b(self.a(x)) * times

    compiled, x = shrinking(Scaled(), **QUICK)[0], torch.ones(2, 4)
    compiled(x, 3)
    with pytest.raises(FxwidthError, match=r"a number that is no size of its inputs.*dynamic=False"):
        compiled(x, 4)


def test_a_number_that_becomes_a_constant_is_watched() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, times: float) -> Tensor:
            return self.b(self.a(x)) * times

    model, x = Scaled(), torch.ones(2, 4)
    compiled = torch.compile(model, backend=fxwidth.compile_backend(inner="eager", params=0.8, **QUICK), dynamic=True)
    once = compiled(x, 2.0)
    assert torch.equal(compiled(x, 2.0), once)
    with pytest.raises(FxwidthError, match=r"a number that the model computes with was 2.0 .*is 3.0 now"):
        compiled(x, 3.0)


def test_weights_of_inference_mode_and_a_target_out_of_reach_are_refused() -> None:
    x = torch.ones(2, 4)
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        with pytest.raises(FxwidthError, match="was made in inference mode"):
            shrinking(model)[0](x)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(FxwidthError, match=r"params=0.01|out of reach|at least"):
        shrinking(model, params=0.01)[0](x)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"inner": "inductr"}, "inner='inductr' is no backend"),
        ({"for_module": nn.Linear(2, 2)}, "for_module= holds widths"),
        ({"also": [fxwidth.trace(nn.Linear(2, 2), torch.ones(2, 2))]}, "also= resizes other graphs"),
        ({"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)}, "optimizer= trains the parameters"),
        ({"parms": 0.5}, "parms= is no option of fxwidth.plan; did you mean params="),
        ({"params": -1}, "params"),
        ({"data": 3}, "data is a int"),
    ],
)
def test_options_are_checked_at_once(options: Any, told: str) -> None:
    with pytest.raises(FxwidthError, match=told):
        fxwidth.compile_backend(**options)


@pytest.mark.slow
def test_inductor() -> None:
    model, x = convolutional().eval(), torch.randn(4, 3, 8, 8)
    evolved = fxwidth.evolve(copy.deepcopy(model), x, params=0.5)
    compiled = torch.compile(model, backend=fxwidth.compile_backend(params=0.5))
    for batch in (4, 3, 6):
        x = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(compiled(x), evolved(x), rtol=1e-4, atol=1e-5)
