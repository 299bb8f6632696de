"""Options are typed and told in one place, and a wrong one is refused before anything is looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import fxwidth
from fxwidth import FxwidthError
from fxwidth.option_keywords import EvolveKeywords, PlanKeywords, ResizeKeywords
from fxwidth.options import PlanOptions, ResizeOptions
from fxwidth.passes import GrowWidths, PlanWidths, ResizeWidths, ShrinkWidths
from tests.zoo.nets import conv, images, trained_like

# What each public function takes: keywords and defaults, as they are written in calls of users.
PLAN = {
    "budget": None, "params": None, "flops": None, "activation_memory": None, "latency": None,
    "data": None, "loss": None, "selection": "greedy", "shrink_energy": 0.05,
    "grow_energy": 0.5, "grow_step": 0, "ratio": None, "min_width": 1, "max_width": None, "align": 1,
    "same_width": None, "only": None, "keep": None, "within": None, "exact": True, "rotate": True, "for_module": None,
}  # fmt: skip
RESIZE = {
    "optimizer": None, "data": None, "selection": "greedy", "recalibrate": None, "rotate": True, "fold": True,
    "exact": True, "directions": "orthogonal", "loss": None, "reader_step": False, "also": (),
}  # fmt: skip
EVOLVER: dict[str, Any] = {
    "every": 200, "start": 0, "rounds": None, "overshoot": 1.0, "breath": 1.25, "breaths": None, "stop": None,
    "patience": None, "cooldown": 2, "policy": None, "process_group": None, "shard": None,
}  # fmt: skip
NOT_OF_A_GRAPH = ("optimizer", "for_module", "also")
TAKES: dict[Callable[..., Any], dict[str, Any]] = {
    fxwidth.plan: PLAN | {"progress": True},
    fxwidth.frontier: PLAN | {"progress": True, "evaluate": None},
    fxwidth.resize: RESIZE | {"process_group": None, "shard": None, "progress": True},
    fxwidth.evolve: PLAN | RESIZE | {"process_group": None, "shard": None, "output": "graph", "progress": True},
    fxwidth.Evolver: PLAN | RESIZE | EVOLVER,
    fxwidth.compile_backend: {n: v for n, v in (PLAN | RESIZE).items() if n not in NOT_OF_A_GRAPH}
    | {"inner": "inductor"},
    PlanWidths: PLAN,
    ResizeWidths: RESIZE,
    ShrinkWidths: RESIZE,
    GrowWidths: RESIZE,
}
POSITIONAL: dict[Callable[..., Any], dict[str, Any]] = {
    fxwidth.plan: {"width_graph": Parameter.empty},
    fxwidth.frontier: {"width_graph": Parameter.empty},
    fxwidth.resize: {"gm": Parameter.empty, "plan": Parameter.empty},
    fxwidth.evolve: {"model": Parameter.empty, "example_inputs": None, "example_kwargs": None},
    fxwidth.Evolver: {"gm": Parameter.empty, "optimizer": None},
    fxwidth.compile_backend: {},
    PlanWidths: {},
    ResizeWidths: {"plan": None},
    ShrinkWidths: {"plan": None},
    GrowWidths: {"plan": None},
}


@pytest.mark.parametrize("function", TAKES, ids=lambda function: function.__name__)
def test_signatures_name_every_option_with_its_default(function: Callable[..., Any]) -> None:
    parameters = signature(function).parameters.values()
    own = {one.name: one.default for one in parameters if one.kind is Parameter.POSITIONAL_OR_KEYWORD}
    assert own == POSITIONAL[function]
    assert list(own) == list(POSITIONAL[function])
    by_keyword = {one.name: one.default for one in parameters if one.kind is Parameter.KEYWORD_ONLY}
    assert by_keyword == {name: default for name, default in TAKES[function].items() if name not in own}
    assert len(own) + len(by_keyword) == len(parameters)


@pytest.mark.parametrize(
    ("options", "keywords", "apart"),
    [(PlanOptions, PlanKeywords, set()), (ResizeOptions, ResizeKeywords, {"optimizer"})],
)
def test_what_type_checkers_are_told_is_what_is_taken(options: type, keywords: type, apart: set[str]) -> None:
    own = get_type_hints(options)
    assert get_type_hints(keywords) == {name: own[name] for name in own if name not in apart}
    assert get_type_hints(keywords).items() <= get_type_hints(EvolveKeywords).items()
    assert all(field.default is not MISSING for field in fields(options))


@pytest.mark.parametrize(("function", "options"), [(fxwidth.plan, PlanOptions), (fxwidth.resize, ResizeOptions)])
def test_every_option_is_told(function: Callable[..., Any], options: type) -> None:
    for field in fields(options):
        assert f"\n        {field.name}: " in (function.__doc__ or ""), field.name


MISSPELT = """
import fxwidth
from fxwidth.passes import PlanWidths, ResizeWidths
from torch import fx, nn
def use(gm: fx.GraphModule, graph: fxwidth.WidthGraph) -> None:
    fxwidth.plan(graph, params=0.5, min_width=2)
    fxwidth.evolve(gm, params=0.5, fold=False, rotate=False).graph.lint()
    fxwidth.evolve(nn.Linear(2, 3), output="module").in_features
    fxwidth.resize(gm, {"a": 3, "b": [0, 1]}, recalibrate=True)
    fxwidth.resize(gm, fxwidth.plan(graph), selection=lambda group, graph: [1.0] * group.width)
    fxwidth.plan(graph, min_widht=2)
    fxwidth.plan(graph, min_width="2")
    fxwidth.resize(gm, {"a": 3}, folds=False)
    fxwidth.resize(gm, {"a": "3"})
    fxwidth.evolve(gm, paramss=0.5)
    fxwidth.evolve(gm, output="modules")
    fxwidth.Evolver(gm, recalibrates=True)
    PlanWidths(aling=2)
    ResizeWidths(exakt=True)
    fxwidth.resize(gm, {"a": 3}, selection=lambda group: [1.0])
"""


@pytest.mark.slow
def test_a_type_checker_sees_a_misspelt_option(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "use.py").write_text(MISSPELT.lstrip())
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file=", "use.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"MYPYPATH": str(root), "PATH": ""}, capture_output=True, text=True, check=False
    )
    found = {int(line.split(":")[1]) for line in done.stdout.splitlines() if " error: " in line}
    assert found == set(range(10, 20)), done.stdout


X = images(4)
WRONG: list[tuple[dict[str, Any], str, str]] = [
    # options, to which functions they belong, and what is said
    ({"min_widht": 3}, "plan", r"min_widht= is no option of fxwidth.plan; did you mean min_width=\? They are budget, "),
    (
        {"folds": True},
        "resize",
        r"folds= is no option of fxwidth.resize; did you mean fold=\? They are optimizer, data",
    ),
    ({"params": 101.0}, "plan", r"params=101.0 as a ratio of the present cost must lie in \(0, 100\]"),
    ({"budget": 0.5}, "plan", r"budget=0.5 must be a fxwidth.Budget, such as Budget\(params=0.5\)"),
    ({"budget": fxwidth.Budget(flops=0.5), "params": 0.5}, "plan", "params=0.5 is short for a budget; put it into"),
    ({"align": 0}, "plan", "align=0 must be an integer of at least 1"),
    ({"min_width": 9, "max_width": 4}, "plan", "no width lies between min_width=9 and max_width=4 with align=1"),
    ({"shrink_energy": "much"}, "plan", "shrink_energy='much' must lie in"),
    ({"grow_energy": 2}, "plan", "grow_energy=2 must lie in"),
    ({"grow_energy": 0.1}, "plan", "grow_energy=0.1 says where channels are added, but grow_step=0 adds none"),
    ({"grow_step": True}, "plan", "grow_step=True must be an integer of at least 0"),
    ({"only": 3}, "plan", "only= takes names or patterns of groups, or modules, but received 3"),
    ({"keep": ["0", 3]}, "plan", "keep= takes names or patterns of groups, or modules, but received 3"),
    ({"same_width": 3}, "plan", "same_width= takes patterns of groups, but received 3"),
    ({"same_width": [["0", 3]]}, "plan", "same_width= takes names or patterns of groups, but received 3"),
    ({"loss": F.mse_loss, "data": [X]}, "plan", "loss= weighs groups against each other under a budget"),
    ({"loss": F.mse_loss, "params": 0.5}, "plan", "loss= needs data= to be taken on"),
    ({"selection": "best"}, "plan resize", "selection='best' is none of 'greedy', .* nor a function"),
    ({"selection": ["greedy"]}, "plan resize", r"selection=\['greedy'\] is none of"),
    ({"data": 3}, "plan resize", "data is a int; pass an iterable of batches"),
    ({"exact": "no"}, "plan resize", "exact='no' must be True or False"),
    ({"rotate": None}, "plan resize", "rotate=None must be True or False"),
    ({"fold": 2}, "resize", "fold=2 must be True or False"),
    ({"recalibrate": "no"}, "resize", "recalibrate='no' must be True or False"),
    ({"loss": F.mse_loss}, "resize", r"loss= (would be ignored|weighs groups)"),
    ({"loss": F.mse_loss, "directions": "random", "data": [X]}, "resize", r"loss= (would be ignored|weighs groups)"),
    ({"directions": "tinny"}, "resize", "directions='tinny' is none of .*'tiny'"),
    ({"loss": 3, "directions": "tiny", "data": [X]}, "resize", "loss=3 must be a function"),
    ({"directions": "tiny", "data": [X]}, "resize", "directions='tiny' looks at the task and needs loss="),
    ({"reader_step": True, "data": [X]}, "resize", "reader_step=True looks at the task and needs loss="),
    ({"also": 3}, "resize", "also= takes a module, or a list of them, but received int"),
    ({"also": [torch.nn.Linear(2, 2)]}, "resize", "also= takes copies of the graph, but received Linear. Make it from"),
    ({"reader_step": "no"}, "resize", "reader_step='no' must be True or False"),
    ({"for_module": 3}, "plan", "for_module= takes a module of the class that was traced, but received 3"),
    ({"optimizer": "Adam"}, "resize", "optimizer= takes a torch.optim.Optimizer, or a list of them, but received str"),
]
ROUTES: dict[str, tuple[str, Callable[..., Any]]] = {
    "plan": ("plan", fxwidth.plan),
    "PlanWidths": ("plan", lambda _, **options: PlanWidths(**options)),
    "resize": ("resize", lambda gm, **options: fxwidth.resize(gm, {"0": 3}, **options)),
    "ResizeWidths": ("resize", lambda _, **options: ResizeWidths(**options)),
    "evolve": ("plan resize", fxwidth.evolve),
    "Evolver": ("plan resize", fxwidth.Evolver),
}


@pytest.mark.parametrize("route", ROUTES)
def test_a_wrong_option_is_refused_before_anything_is_looked_at(route: str) -> None:
    belongs, run = ROUTES[route]
    tried = [(options, words) for options, kinds, words in WRONG if set(kinds.split()) & set(belongs.split())]
    assert len(tried) > 7
    for options, words in tried:
        if route == "Evolver" and words.startswith("loss= needs data="):
            continue  # training gives them
        # What is no model at all would be told as such by whoever looked at it.
        with pytest.raises(FxwidthError, match=words):
            run(None, **options)


def test_without_data_the_statistics_cannot_be_measured() -> None:
    with pytest.raises(FxwidthError, match="recalibrate=True needs data= to run the network on"):
        fxwidth.resize(None, {"0": 3}, recalibrate=True)  # type: ignore[arg-type]
    with pytest.raises(FxwidthError, match="recalibrate=True needs data= to run the network on"):
        fxwidth.evolve(None, recalibrate=True)
    gm = fxwidth.trace(trained_like(conv()), X)
    # Training gives data, which are still to come.
    evolver = fxwidth.Evolver(gm, every=1, rounds=1, params=0.6, recalibrate=True)
    with pytest.raises(FxwidthError, match="recalibrate=True needs data= to run the network on"):
        evolver.step()
    evolver.step(X)
    assert fxwidth.report(gm).resizes[-1]["recalibrated"]


@pytest.mark.parametrize("route", [fxwidth.plan, lambda _, **options: PlanWidths(**options)])
@pytest.mark.parametrize(
    ("name", "value"), [("data", [X]), ("selection", "magnitude"), ("selection", lambda *_: X), ("rotate", False)]
)
def test_what_a_plan_by_itself_would_not_look_at_is_refused(route: Callable[..., Any], name: str, value: Any) -> None:
    graph = fxwidth.analyze(fxwidth.trace(trained_like(conv()), X))
    with pytest.raises(FxwidthError, match=rf"{name}= makes a difference under a budget alone; .* or give params= or"):
        route(graph, **{name: value})
    # A resize looks at it.
    assert fxwidth.evolve(trained_like(conv()), X, **{name: value if name != "selection" else "magnitude"})


def test_thresholds_beside_a_budget_are_refused() -> None:
    for name, value in (("shrink_energy", 0.1), ("grow_energy", 0.1), ("grow_step", 3)):
        for route in (fxwidth.plan, fxwidth.evolve, fxwidth.Evolver, lambda _, **options: PlanWidths(**options)):
            with pytest.raises(FxwidthError, match=rf"{name}= decides without a budget; .* or params= and budget=\."):
                route(None, params=0.5, **{name: value})  # type: ignore[operator]


def test_patterns_that_leave_no_group_are_refused() -> None:
    graph = fxwidth.analyze(fxwidth.trace(trained_like(conv()), X))
    pinned = next(group.name for group in graph.groups if group.pinned)
    for options, words in (({"only": "0", "keep": ["0"]}, "keep= names them too"), ({"only": pinned}, "is pinned: ")):
        with pytest.raises(FxwidthError, match=f"only=.* leaves no group that may change: .*{words}"):
            fxwidth.plan(graph, **options)  # type: ignore[arg-type]


def test_patterns_and_batches_may_come_from_iterators() -> None:
    wanted, gm = (fxwidth.trace(trained_like(conv()), X) for _ in range(2))
    fxwidth.evolve(wanted, params=0.8, only=["0", "2"], same_width=[["0", "2"]], data=[X])
    fxwidth.evolve(gm, params=0.8, only=iter(["0", "2"]), same_width=iter([iter(["0", "2"])]), data=iter([X]))
    assert all(torch.equal(a, b) for a, b in zip(gm.parameters(), wanted.parameters(), strict=True))


def test_batches_of_an_iterator_are_there_in_every_round() -> None:
    found = []
    for data in ([X], iter([X])):
        torch.manual_seed(0)
        gm = fxwidth.trace(trained_like(conv()), X)
        evolver = fxwidth.Evolver(gm, every=1, rounds=2, params=0.5, data=data)
        evolver.step()
        evolver.step()
        assert evolver.finished
        found.append(gm)
    assert all(torch.equal(a, b) for a, b in zip(*(gm.parameters() for gm in found), strict=True))


INTEGERS = {"params": 500, "grow_step": 3, "min_width": 2, "max_width": 9, "align": 2}
RATIOS = {"params": 0.5, "shrink_energy": 0.25, "grow_energy": 0.5}
KINDS_OF_INTEGERS = (np.int64, np.int32, np.uint8, np.array, torch.tensor)
KINDS_OF_RATIOS = (np.float64, np.float32, np.float16, np.array, torch.tensor)
KINDS_OF_BOOLS = (bool, np.bool_, torch.tensor)


def held(kind: Callable[..., Any], value: int) -> Any:
    return np.int16(value) if kind is np.uint8 and value > 255 else kind(value)


@pytest.mark.parametrize("kind", KINDS_OF_INTEGERS, ids=lambda kind: kind.__name__)
def test_integers_may_be_of_any_kind(kind: Callable[..., Any]) -> None:
    for name, value in INTEGERS.items():
        found = getattr(PlanOptions(**{name: held(kind, value)}), name)
        assert type(found) is int
        assert found == value
    budget = fxwidth.Budget(flops=held(kind, 400), costs={"weight_bits_of_options": held(kind, 300)})
    assert budget == fxwidth.Budget(flops=400, costs={"weight_bits_of_options": 300})
    assert {type(bound) for bound in budget.bounds.values()} == {int}
    gm = fxwidth.trace(trained_like(conv()), X)
    counts = {"every": held(kind, 2), "start": held(kind, 1), "rounds": held(kind, 1)}
    evolver = fxwidth.Evolver(gm, **counts, params=held(kind, fxwidth.evolution.evolver.parameter_count(gm) // 2))
    assert [evolver.step(X) is not None for _ in range(4)] == [False, False, True, False]
    assert json.loads(json.dumps(evolver.history)) == evolver.history


@pytest.mark.parametrize("kind", KINDS_OF_RATIOS, ids=lambda kind: kind.__name__)
def test_ratios_may_be_of_any_kind(kind: Callable[..., Any]) -> None:
    for name, value in RATIOS.items():
        found = getattr(PlanOptions(**{name: kind(value)}), name)
        assert type(found) is float
        assert found == value
    graph = fxwidth.analyze(fxwidth.trace(trained_like(conv()), X))
    plan = fxwidth.plan(graph, budget=fxwidth.Budget(params=kind(0.5), flops=kind(0.75)))
    assert plan == fxwidth.plan(graph, budget=fxwidth.Budget(params=0.5, flops=0.75))
    assert fxwidth.Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("kind", KINDS_OF_BOOLS, ids=lambda kind: kind.__name__)
def test_bools_are_no_numbers_of_any_kind(kind: Callable[..., Any]) -> None:
    for name in INTEGERS:
        with pytest.raises(FxwidthError, match=f"{name}=.* must be an int"):
            PlanOptions(**{name: kind(True)})
    for name in ("every", "start", "rounds"):
        with pytest.raises(FxwidthError, match=f"{name}= is .*, a whole number of at least"):
            fxwidth.Evolver(None, **{name: kind(True)})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [np.float64(2), np.array([2, 3]), torch.ones(2), "2", None])
def test_what_is_no_integer_is_refused(value: Any) -> None:
    for name in ("grow_step", "min_width", "align"):
        with pytest.raises(FxwidthError, match=f"{name}=.* must be an integer"):
            PlanOptions(**{name: value})
    with pytest.raises(FxwidthError, match="every= is 'epoch' or the number of steps between resizes, a whole number"):
        fxwidth.Evolver(None, every=value)  # type: ignore[arg-type]


@fxwidth.cost("weight_bits_of_options", "bits")
def weight_bits(width_graph: Any) -> Any:
    return fxwidth.cost_polynomial(width_graph, "params")
