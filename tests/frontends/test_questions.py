"""What a model asks while it is exported is answered as when it runs: is it traced, is the batch one."""

from __future__ import annotations

import warnings
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.compiler import is_compiling as imported_by_name

import fxwidth
from fxwidth import FxwidthError
from fxwidth.frontends.eager_answers import answering_as_in_eager_mode
from fxwidth.runtime.global_state import GlobalState
from fxwidth.runtime.tracing_questions import questions
from fxwidth.verification.replay_oracle import largest_difference
from tests.oracles.judges import ROUNDING, randomise
from tests.zoo.networks_of_effects import HIDDEN, Effect, rows

FX = torch.fx._symbolic_trace


class Asking(Effect):
    """Asks a question; one about the batch can be followed by the exporter alone."""

    def __init__(self, question: Callable[[Tensor], Any], exported: bool = True) -> None:
        super().__init__()
        self._question = question
        self._exported = exported

    def between(self, h: Tensor) -> Tensor:
        if self._exported and h.shape[0] > 10**9:
            raise ValueError
        answer = self._question(h)
        return h * ((3 if answer else 1) if isinstance(answer, bool) else answer)


def made(*args: Any) -> nn.Module:
    return randomise(Asking(*args)).double().eval()


# -- is it traced ----------------------------------------------------------------------------------------------------

QUESTIONS: dict[str, Callable[[], bool]] = {
    "compiling": torch.compiler.is_compiling,
    "compiling, by name": imported_by_name,
    "compiling by dynamo": torch.compiler.is_dynamo_compiling,
    "compiling, as dynamo says": torch._dynamo.is_compiling,
    "exporting": torch.compiler.is_exporting,
    "traced by fx": FX.is_fx_symbolic_tracing,
    "traced by fx, or exporting": FX.is_fx_tracing,
    "traced by TorchScript": torch.jit.is_tracing,
    "scripted": torch.jit.is_scripting,
    "exported to ONNX": torch.onnx.is_in_onnx_export,
}


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_traced_model_is_told_that_it_is_not(question: str, exported: bool) -> None:
    model = made(lambda _: QUESTIONS[question](), exported)
    gm = fxwidth.trace(model, rows())
    assert ("Exported" in type(gm).__name__) == exported
    for batch in (4, 7):
        assert largest_difference([gm(rows(batch))], [model(rows(batch))]) < ROUNDING


def test_the_answers_are_torchs_own_afterwards() -> None:
    functions = [torch.compiler.is_compiling, torch.compiler.is_exporting, FX.is_fx_tracing]
    before = [(function.__code__, function.__kwdefaults__) for function in functions]
    with pytest.raises(ZeroDivisionError), answering_as_in_eager_mode():
        _fail_unless(torch.compiler.is_compiling.__code__ is not before[0][0])
    assert [(function.__code__, function.__kwdefaults__) for function in functions] == before


@pytest.mark.parametrize("flag", ["compiling", "exporting"])
def test_torch_itself_is_told_what_is_so(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    question: Callable[[], bool] = getattr(torch.compiler, f"is_{flag}")
    code_of_torch: dict[str, Any] = {"__name__": "torch.nn.functional"}
    exec("def asked(question): return question()", code_of_torch)
    for truth in (False, True):
        monkeypatch.setattr(torch.compiler, f"_is_{flag}_flag", truth)
        assert question() is truth
        with answering_as_in_eager_mode():
            assert code_of_torch["asked"](question) is truth
            assert question() is False


def test_the_answers_are_torchs_own_after_an_interruption() -> None:
    state, answers = GlobalState(), answering_as_in_eager_mode()
    before = [(question.__code__, question.__kwdefaults__) for question in questions()]
    answers.__enter__()
    assert questions()[0].__code__ is not before[0][0]
    state.put_back()
    assert [(question.__code__, question.__kwdefaults__) for question in questions()] == before
    answers.__exit__(None, None, None)


def _fail_unless(changed: bool) -> None:
    assert changed
    raise ZeroDivisionError


class Ungrouped(Effect):
    """Goes another way when it is exported, since a kernel of its own knows no stand-ins."""

    def __init__(self, factor: float = 1.0, draws: bool = False, counts: int = 1) -> None:
        super().__init__()
        self._factor = factor
        self._draws = draws
        self._counts = counts
        self.register_buffer("calls", torch.zeros(1))

    def between(self, h: Tensor) -> Tensor:
        self.calls.add_(self._counts if torch.compiler.is_exporting() else 1)
        if torch.compiler.is_exporting():
            return h * self._factor + (torch.rand_like(h) if self._draws and self.training else 0)
        # As a kernel without a form for stand-ins would refuse.
        if isinstance(h, FakeTensor) or type(h) is not Tensor:
            raise RuntimeError("no kernel")
        return h * 1.0


def ungrouped(**options: Any) -> nn.Module:
    return randomise(Ungrouped(**options)).double().eval()


def test_another_way_in_exporting_is_taken_where_its_own_cannot_be_and_told() -> None:
    model = ungrouped()
    with pytest.warns(
        fxwidth.FxwidthWarning, match=r"does when it is exported: tests\.frontends\.test_questions asks"
    ) as told:
        gm = fxwidth.trace(model, rows())
    assert told[0].filename == __file__
    for mode in (False, True):
        model.train(mode)
        gm.train(mode)
        for batch in (4, 7):
            assert largest_difference([gm(rows(batch))], [model(rows(batch))]) < ROUNDING
    assert fxwidth.analyze(gm).free


@pytest.mark.parametrize("options", [{"factor": 1.001}, {"draws": True}, {"counts": 2}])
def test_another_way_in_exporting_that_gives_something_else_is_not_taken(options: dict[str, Any]) -> None:
    with pytest.raises(FxwidthError, match="gives other results when it is exported"):
        fxwidth.trace(ungrouped(**options).train(), rows())


# -- is the batch one ------------------------------------------------------------------------------------------------

OF_ONE: dict[str, Callable[[Tensor], Any]] = {
    "more than one": lambda h: h.shape[0] > 1,
    "one": lambda h: h.size(0) == 1,
    "among": lambda h: h.size(0) in (1, 1001),
    "shape": lambda h: h.shape == (1, HIDDEN),
    "truth": lambda h: h.shape[0] - 1,
    "no truth": lambda h: not (h.shape[0] - 1),
    "elements": lambda h: h.numel() > HIDDEN,
    "of another tensor": lambda h: torch.cat([h, h]).shape[0] > 2,
    "a number": lambda h: int(h.shape[0] == 1),
}
FOR_ALL: dict[str, Callable[[Tensor], Any]] = {
    "at least": lambda h: max(2, h.shape[0]),
    "no question": lambda h: h.view(h.shape[0], -1).dim(),
    "never": lambda h: bool(h.shape[0] > 0),
    # torch itself asks whether it can view the one as the other, which it can where sizes are one.
    "in a product of torch": lambda h: torch.einsum("ni,mi->nm", h, h).mean(1, keepdim=True),
    "in a sum of torch": lambda h: torch.stack([h, h]).mean(0),
}


@pytest.mark.parametrize("start", [1, 3])
@pytest.mark.parametrize("question", OF_ONE)
def test_a_batch_of_one_is_followed_or_refused(question: str, start: int) -> None:
    model = made(lambda h: bool(OF_ONE[question](h)))
    gm = fxwidth.trace(model, rows(start))
    for batch in (2, 5):
        assert largest_difference([gm(rows(batch))], [model(rows(batch))]) < ROUNDING
    if start == 1:
        assert largest_difference([gm(rows(1))], [model(rows(1))]) < ROUNDING
    else:
        with pytest.raises(FxwidthError, match=r"holds only for inputs with leaves\[0\]\.size\(\)\[0\] != 1"):
            gm(rows(1))


@pytest.mark.parametrize("start", [1, 3])
@pytest.mark.parametrize("question", FOR_ALL)
def test_what_one_answers_as_others_do_is_not_refused(question: str, start: int) -> None:
    model = made(FOR_ALL[question])
    gm = fxwidth.trace(model, rows(start))
    for batch in (1, 2, 5):
        assert largest_difference([gm(rows(batch))], [model(rows(batch))]) < ROUNDING


class AsksInTraining(Effect):
    def between(self, h: Tensor) -> Tensor:
        if h.shape[0] > 10**9:
            raise ValueError
        return h - h.mean(0) if self.training and h.shape[0] > 1 else h


@pytest.mark.parametrize("mode", [False, True])
def test_one_is_refused_in_the_mode_that_treats_it_otherwise(mode: bool) -> None:
    model = randomise(AsksInTraining()).double().train(mode)
    gm = fxwidth.trace(model, rows(3))
    for now, batch in ((False, 1), (False, 4), (True, 4), (True, 7)):
        assert largest_difference([gm.train(now)(rows(batch))], [model.train(now)(rows(batch))]) < ROUNDING
    with pytest.raises(FxwidthError, match="holds only for inputs with"):
        gm.train()(rows(1))
    fxwidth.resize(gm, {"up": 4})
    assert gm.eval()(rows(1)).shape == (1, 3)
    with pytest.raises(FxwidthError, match="holds only for inputs with"):
        gm.train()(rows(1))


# -- what is no difference -------------------------------------------------------------------------------------------


class MakesAClass(Effect):
    """Returns an object of a class that each call makes anew."""

    def forward(self, x: Tensor) -> Any:
        pair = namedtuple("pair", "value rest")
        return [pair(self.down(torch.relu(self.up(x))), None), {"kind": "a"}]


class Ghost(nn.BatchNorm1d):
    """Normalises a batch two samples at a time when it is trained."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return torch.cat([super(Ghost, self).forward(part) for part in x.split(2)])
        return super().forward(x)


def test_objects_of_classes_made_in_each_call_differ_in_no_mode() -> None:
    model = randomise(MakesAClass()).double()
    for mode in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gm = fxwidth.trace(model.train(mode), rows())
        (answer, rest), (expected, _) = gm(rows(7)), model(rows(7))
        assert largest_difference([answer.value], [expected.value]) < ROUNDING
        assert (type(answer)._fields, answer.rest, rest) == (("value", "rest"), None, {"kind": "a"})


@pytest.mark.parametrize("mode", [False, True])
def test_a_norm_of_parts_of_the_batch_is_followed_in_both_modes(mode: bool) -> None:
    model = randomise(nn.Sequential(nn.Linear(6, HIDDEN), Ghost(HIDDEN), nn.Linear(HIDDEN, 3))).double().train(mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gm = fxwidth.trace(model, rows(4))
    for batch in (1, 4, 7):
        assert largest_difference([gm.eval()(rows(batch))], [model.eval()(rows(batch))]) < ROUNDING
    assert largest_difference([gm.train()(rows(4))], [model.train()(rows(4))]) < ROUNDING


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["graph", "code", "meta", "recompile", "print_readable"])
@pytest.mark.parametrize("kind", ["module", "parameter", "buffer"])
def test_names_that_graphs_have_are_refused_with_a_remedy_that_works(name: str, kind: str) -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            held = getattr(self, name)
            return held(x) if kind == "module" else x * held

    model = Named()
    if kind == "module":
        model.add_module(name, nn.Linear(6, 3))
    elif kind == "parameter":
        model.register_parameter(name, nn.Parameter(torch.randn(6)))
    else:
        model.register_buffer(name, torch.randn(6))
    with pytest.raises(FxwidthError, match=rf"holds '{name}', .*; rename it, or trace a module that holds the model"):
        fxwidth.trace(model.double(), rows())
    gm = fxwidth.trace(nn.Sequential(model), rows())
    assert largest_difference([gm(rows(7))], [model(rows(7))]) == 0
    assert gm.state_dict().keys() == nn.Sequential(model).state_dict().keys()
