"""Pipelines: an order that works or what is missing, the passes of others among ours, and one transaction over all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager
from torch.optim import Optimizer

import fxwidth
from fxwidth import FxwidthError
from fxwidth.passes import (
    AnalyzeWidths,
    ChangeBasis,
    CleanUp,
    Condition,
    FactorizeLinear,
    FoldBatchNorm,
    GrowWidths,
    Pipeline,
    PlanWidths,
    RecalibrateBatchNorm,
    ReportWidths,
    ResizeWidths,
    ShrinkWidths,
    UntieCopies,
    VerifyWidths,
    WidthPass,
)
from tests.oracles.interruptions import Work, assert_undone, counted, differences
from tests.passes.networks import small, small_graph


def _names(steps: Any) -> list[str]:
    return [getattr(step, "__name__", type(step).__name__) for step in steps]


def foreign(gm: fx.GraphModule) -> None:
    """A step of somebody else's."""


PLAN, RESIZE, VERIFY, FOLD, REPORT = (
    PlanWidths(params=0.5),
    ResizeWidths(),
    VerifyWidths(),
    FoldBatchNorm(),
    ReportWidths(),
)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([PLAN, RESIZE, VERIFY, REPORT], [PLAN, RESIZE, VERIFY, REPORT]),
        ([RESIZE, PLAN], [PLAN, RESIZE]),
        ([VERIFY, RESIZE, PLAN], [PLAN, RESIZE, VERIFY]),
        # Folding would spoil the plan.
        ([PLAN, FOLD, RESIZE], [PLAN, RESIZE, FOLD]),
        ([RESIZE, FOLD, PLAN], [FOLD, PLAN, RESIZE]),
        # What says nothing keeps its place.
        ([RESIZE, foreign, PLAN], [PLAN, foreign, RESIZE]),
        ([foreign, RESIZE, PLAN], [foreign, PLAN, RESIZE]),
        # It may leave a plan itself.
        ([foreign, RESIZE], [foreign, RESIZE]),
        ([PLAN, RESIZE, PLAN, RESIZE, VERIFY], [PLAN, RESIZE, PLAN, RESIZE, VERIFY]),
    ],
)
def test_the_given_order_is_kept_where_it_works_else_the_first_that_does(given: list[Any], wanted: list[Any]) -> None:
    _, gm, _ = small_graph()
    assert list(Pipeline(*given).order(gm)) == wanted


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            [ResizeWidths()],
            "ResizeWidths needs that a plan is left in gm.meta, which nothing in the pipeline gives; run ",
        ),
        ([VerifyWidths()], "VerifyWidths needs that what it was before its last resize is noted, which nothing"),
        ([GrowWidths(), VerifyWidths()], "GrowWidths needs that a plan is left"),
        # One resize after the other, by one plan.
        ([PLAN, RESIZE, ResizeWidths()], "in no order can all of PlanWidths, ResizeWidths, ResizeWidths run"),
        ([VERIFY, FOLD, VERIFY], "VerifyWidths needs"),
    ],
)
def test_what_is_missing_is_told_before_anything_is_run(steps: list[Any], message: str) -> None:
    model, gm, _ = small_graph()
    work = Work(lambda: Pipeline(*steps)(gm), [gm, model])
    before = work.state()
    with pytest.raises(FxwidthError, match=message):
        work.run()
    assert not differences(before, work.state())


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (ResizeWidths(), "ResizeWidths needs that a plan is left in gm.meta; run PlanWidths before it"),
        (VerifyWidths(), "VerifyWidths needs that what it was before its last resize is noted; run ResizeWidths, Shri"),
    ],
)
def test_alone_and_in_a_pass_manager_a_pass_says_what_is_missing(one: WidthPass, message: str) -> None:
    _, gm, _ = small_graph()
    with pytest.raises(FxwidthError, match=message):
        one(gm)
    with pytest.raises(Exception, match=type(one).__name__) as caught:
        PassManager([AnalyzeWidths(), one])(gm)
    assert isinstance(caught.value.__cause__, FxwidthError)
    with pytest.raises(FxwidthError, match=r"but received Linear; call fxwidth\.trace"):
        Pipeline(one)(nn.Linear(2, 3))  # type: ignore[arg-type]
    with pytest.raises(FxwidthError, match=f"{type(one).__name__} takes a torch"):
        one(nn.Linear(2, 3))  # type: ignore[arg-type]


def test_a_pipeline_does_what_its_passes_do_one_by_one() -> None:
    model, gm, x = small_graph()
    other = fxwidth.trace(copy.deepcopy(model), x)
    result = Pipeline(PlanWidths(params=0.6, data=[x]), ResizeWidths(data=[x]), VerifyWidths())(gm)
    assert result.modified
    assert result.graph_module is gm
    fxwidth.resize(other, fxwidth.plan(fxwidth.analyze(other), params=0.6, data=[x]), data=[x])
    assert all(torch.equal(one, two) for one, two in zip(gm.parameters(), other.parameters(), strict=True))
    assert not Pipeline(AnalyzeWidths(), ReportWidths())(gm).modified


@pytest.mark.parametrize("steps", [(), (3,), (PlanWidths,)])
def test_what_is_no_pass_is_refused(steps: tuple[Any, ...]) -> None:
    with pytest.raises(FxwidthError, match="Pipeline takes passes and functions of a graph, but received"):
        Pipeline(*steps)


class OwnBase(PassBase):
    """A pass of torch that knows nothing of ours."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        plan = graph_module.meta["fxwidth_plan"]
        graph_module.meta["fxwidth_plan"] = {name: max(1, width // 2) for name, width in plan.items()}
        return PassResult(graph_module, False)


class Own(WidthPass):
    """A pass of the user's by our rules."""

    needs = (Condition("it has a linear layer", "add one", lambda gm: "Linear" in str(gm)),)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        return PassResult(graph_module, False)


class Claims(WidthPass):
    """One that does not give what it says."""

    gives = (Condition("it is on the moon", "fly it there", lambda gm: False),)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph_module.meta["claimed"] = True
        return PassResult(graph_module, False)


class Returns(WidthPass):
    """One that returns something else."""

    def call(self, graph_module: fx.GraphModule) -> Any:
        return 3


def test_passes_of_others_stand_among_ours() -> None:
    _, gm, _ = small_graph()
    _, other, _ = small_graph()
    wanted = Pipeline(PlanWidths(params=0.6), ResizeWidths())(other).graph_module
    Pipeline(Own(), PlanWidths(params=0.6), OwnBase(), ResizeWidths(), VerifyWidths())(gm)
    for name in ("0", "2"):
        assert gm.get_submodule(name).weight.shape[0] <= max(1, wanted.get_submodule(name).weight.shape[0])
    nested = Pipeline(PlanWidths(params=0.9), Pipeline(OwnBase(), ResizeWidths()))
    assert nested(gm).modified


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (Claims(), "after Claims it does not hold that it is on the moon, which it says that it gives"),
        (Returns(), r"the call of Returns returned int; return PassResult\(graph_module, modified\)"),
        (lambda gm: 3, "<lambda> returned int; a step returns a PassResult, a torch.fx.GraphModule, or None"),
    ],
)
def test_what_passes_of_others_do_wrong_is_told_and_taken_back(one: Any, message: str) -> None:
    model, gm, _ = small_graph()
    work = Work(lambda: Pipeline(PlanWidths(params=0.5), ResizeWidths(), one)(gm), [gm, model])
    before = work.state()
    with pytest.raises(FxwidthError, match=message):
        work.run()
    assert not differences(before, work.state())


def test_a_pass_may_return_another_graph() -> None:
    model, gm, x = small_graph()
    before = copy.deepcopy(model.state_dict())

    def copied(module: fx.GraphModule) -> fx.GraphModule:
        return copy.deepcopy(module)

    result = Pipeline(copied, PlanWidths(params=0.5), ResizeWidths())(gm)
    assert result.modified
    assert result.graph_module is not gm
    assert all(torch.equal(tensor, before[name]) for name, tensor in gm.state_dict().items())
    assert sum(p.numel() for p in result.graph_module.parameters()) < sum(p.numel() for p in gm.parameters())
    assert result.graph_module(x).shape == gm(x).shape


def stepped(gm: nn.Module, x: Tensor) -> Optimizer:
    optimizer = torch.optim.Adam(gm.parameters())
    gm(x).square().mean().backward()
    optimizer.step()
    return optimizer


def everything(gm: fx.GraphModule) -> None:
    """Change all that there is, in every way."""
    with torch.no_grad():
        for parameter in gm.parameters():
            parameter.mul_(2)
            parameter.grad = None
        next(gm.parameters()).data = torch.zeros(3)
        for buffer in gm.buffers():
            buffer.add_(1)
    next(iter(gm.parameters())).register_hook(lambda gradient: gradient)
    next(gm.parameters()).tag = 3  # type: ignore[attr-defined]
    gm.get_submodule("0").register_forward_hook(lambda *_: None)
    node = next(node for node in gm.graph.nodes if node.op == "call_module")
    node.meta["mine"] = 3
    with gm.graph.inserting_after(node):
        new = gm.graph.call_function(torch.neg, (node,))
    node.replace_all_uses_with(new)
    new.args = (node,)
    gm.recompile()
    gm.meta.get("kept", {})["inner"] = 5
    gm.meta["more"] = 1
    gm.add_module("extra", nn.Linear(2, 2))
    gm.train()


class PlantedError(Exception):
    """What a pass of somebody else's may end with."""


def failing(gm: fx.GraphModule) -> None:
    raise PlantedError


@pytest.mark.parametrize("error", [PlantedError, KeyboardInterrupt])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_whatever_ends_a_pipeline_leaves_everything_as_it_was(error: type[BaseException], place: int) -> None:
    model, gm, x = small_graph()
    optimizer = stepped(gm, x)
    average = torch.optim.swa_utils.AveragedModel(gm)
    gm.meta["kept"] = {"inner": 4}

    def ended(module: fx.GraphModule) -> None:
        raise error

    steps: list[Any] = [
        PlanWidths(params=0.6),
        ResizeWidths(optimizer=optimizer, data=[x], also=[average]),
        ReportWidths(),
    ]
    steps[place:place] = [everything, ended]
    work = Work(lambda: Pipeline(*steps)(gm), [gm, model, average], optimizer)
    before = work.state()
    with pytest.raises(error):
        work.run()
    assert not differences(before, work.state())
    assert not model.training


@pytest.mark.parametrize("error", [PlantedError, pytest.param(KeyboardInterrupt, marks=pytest.mark.slow)])
def test_what_only_a_resize_inside_of_a_step_knew_is_taken_back_too(error: type[BaseException]) -> None:
    model, gm, x = small_graph()
    optimizer, teacher = stepped(gm, x), copy.deepcopy(gm)
    other = fxwidth.trace(model, x)

    def resizes(module: fx.GraphModule) -> None:
        fxwidth.resize(module, {"0": 9}, optimizer=optimizer, also=[teacher], data=[x])
        fxwidth.resize(teacher, {"2": 5})

    def fails(module: fx.GraphModule) -> None:
        raise error

    work = Work(lambda: Pipeline(AnalyzeWidths(), Pipeline(resizes), fails)(gm), [gm, model, teacher, other], optimizer)
    before = work.state()
    with pytest.raises(error):
        work.run()
    assert not differences(before, work.state())


def test_an_error_says_in_which_step_it_was() -> None:
    _, gm, _ = small_graph()
    with pytest.raises(PlantedError) as caught:
        Pipeline(AnalyzeWidths(), failing)(gm)
    assert caught.value.__notes__ == ["This was step 2 of 2 in a fxwidth.passes.Pipeline, failing."]


def _with_optimizer(make: Callable[[Optimizer, Tensor], list[Any]]) -> Callable[[], Work]:
    def work() -> Work:
        model, gm, x = small_graph()
        optimizer = stepped(gm, x)
        steps = make(optimizer, x)
        return Work(lambda: Pipeline(*steps)(gm), [gm, model], optimizer)

    work.__name__ = make.__name__
    return work


def resizing(optimizer: Optimizer, x: Tensor) -> list[Any]:
    return [
        AnalyzeWidths(), PlanWidths(params=0.6, data=[x]), ResizeWidths(optimizer=optimizer, data=[x]), VerifyWidths(),
        GrowWidths({"0": 18}, optimizer=optimizer), ReportWidths(),
    ]  # fmt: skip


def rebuilding(optimizer: Optimizer, x: Tensor) -> list[Any]:
    return [
        FoldBatchNorm(optimizer), CleanUp(inference=True), FactorizeLinear(params=0.8, data=[x], optimizer=optimizer),
        PlanWidths(params=0.8), ShrinkWidths(optimizer=optimizer), UntieCopies(),
    ]  # fmt: skip


def changing_values(optimizer: Optimizer, x: Tensor) -> list[Any]:
    return [RecalibrateBatchNorm([x]), ChangeBasis([x]), foreign]


MAKES = [resizing, rebuilding, changing_values]
# Beyond that a run may be at its end already: what is remembered of ops makes one shorter than another.
QUICK, MANY = (0.45, 0.7, 0.88), [place / 60 for place in range(1, 54)]


@pytest.mark.parametrize(
    ("make", "places"),
    [*((make, QUICK) for make in MAKES), *(pytest.param(make, MANY, marks=pytest.mark.slow) for make in MAKES)],
    ids=lambda one: one.__name__ if callable(one) else str(len(one)),
)
def test_an_interruption_anywhere_leaves_everything_as_it_was(
    make: Callable[[Optimizer, Tensor], list[Any]], places: Sequence[float]
) -> None:
    prepare = _with_optimizer(make)
    prepare().run()  # what is remembered of ops for the next time makes it go by fewer calls
    calls = counted(prepare().run).count
    work = prepare()
    assert_undone(work, [int(calls * share) for share in places])
    # And while the last step ends.
    assert_undone(work, [1, 2, 3], "drop_notes_of_passes" if make is not changing_values else "rotated")
    before = work.state()
    work.run()
    assert differences(before, work.state())


def test_notes_of_passes_go_with_any_change_of_the_graph() -> None:
    from fxwidth.recording.graph_meta import OF_PASSES

    model, gm, x = small_graph()
    for change in (
        lambda: fxwidth.resize(gm, {"0": 9}),
        lambda: fxwidth.evolve(gm, params=0.9),
        lambda: FoldBatchNorm()(gm),
        lambda: FactorizeLinear(params=0.9, data=[x])(gm),
    ):
        for note in OF_PASSES:
            gm.meta[note] = {"0": 8}
        change()
        assert not set(OF_PASSES) & gm.meta.keys() - {"fxwidth_groups"}
        gm.meta.pop("fxwidth_groups", None)
    assert model is not None


def test_passes_in_training_mode_keep_it() -> None:
    gm = fxwidth.trace(small().train(), torch.randn(16, 8, dtype=torch.float64))
    Pipeline(AnalyzeWidths(), PlanWidths(params=0.6), ResizeWidths(), VerifyWidths(), CleanUp())(gm)
    assert gm.training
    assert all(part.training for part in gm.modules())


def test_a_pass_manager_is_a_step_and_its_optimizers_are_put_back_too() -> None:
    gm = fxwidth.trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4))
    optimizer = torch.optim.Adam(gm.parameters())
    manager = PassManager([PlanWidths(params=0.5, rotate=False), ResizeWidths(optimizer=optimizer)])
    held = [id(one) for one in optimizer.param_groups[0]["params"]]

    def fails(_: fx.GraphModule) -> None:
        raise ValueError("planted")

    with pytest.raises(ValueError, match="planted"):
        Pipeline(manager, fails)(gm)
    assert [id(one) for one in optimizer.param_groups[0]["params"]] == held
    assert Pipeline(manager)(gm).modified
    assert gm.get_parameter("0.weight").shape[0] < 8
