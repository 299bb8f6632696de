"""A traced graph is called as the model is and answers as the model does, before a resize and after it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxwidth
from fxwidth import FxwidthError, FxwidthWarning
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.frontends.call_signature import call_of
from fxwidth.frontends.placeholder_calls import bound_to_placeholders, call_with
from fxwidth.runtime.pytree_differences import difference
from fxwidth.runtime.pytrees import deep_tensors, flatten, map_leaves
from fxwidth.verification.replay_oracle import largest_difference, reference_outputs
from tests.oracles.judges import removals
from tests.zoo.networks_of_calls import (
    CASES,
    HIDDEN,
    WIDTH,
    Cache,
    Case,
    DictToDict,
    Masked,
    Modes,
    OnBatchSize,
    OtherPathInTraining,
    Regions,
    ToCache,
    _x,
)

EXACT = 1e-12
FRONT_ENDS = {"symbolic": False, "export": True}
by_case = pytest.mark.parametrize("name", CASES)
by_front_end = pytest.mark.parametrize("exported", FRONT_ENDS.values(), ids=FRONT_ENDS.keys())


def invoked(function: Any, case: Case) -> Any:
    call = call_of(copy.deepcopy(case.args), case.kwargs)
    assert call is not None
    with torch.no_grad():
        return function(*call.args, **call.kwargs)


def called(gm: fx.GraphModule, values: Any) -> Any:
    call = call_with(gm, values)
    return gm(*call.args, **call.kwargs)


def is_exported(gm: fx.GraphModule) -> bool:
    return type(gm).__name__ == "Exported"


def traced(case: Case, exported: bool) -> tuple[nn.Module, fx.GraphModule]:
    torch.manual_seed(0)
    model = case.build(exported).double().eval()
    gm = fxwidth.trace(model, copy.deepcopy(case.args), case.kwargs)
    assert is_exported(gm) == exported
    return model, gm


@by_front_end
@by_case
def test_the_graph_answers_as_the_model_does(name: str, exported: bool) -> None:
    case = CASES[name]
    model, gm = traced(case, exported)
    expected, actual = invoked(model, case), invoked(gm, case)
    assert type(actual) is type(expected)
    assert difference(flatten(expected)[1], flatten(actual)[1]) is None
    assert largest_difference(deep_tensors(actual), deep_tensors(expected)) < EXACT


@by_front_end
@by_case
def test_a_resized_graph_matches_the_replay_oracle(name: str, exported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    _, gm = traced(case, exported)
    wg = fxwidth.analyze(gm)
    assert len(wg.free) == case.free
    removed = removals(wg.free, 0.5)
    kept = {group.name: removed[group.factor] for group in wg.free}
    call = call_of(copy.deepcopy(case.args), case.kwargs)
    assert call is not None
    values = bound_to_placeholders(gm, call)
    if name == "batch of one":
        values = [map_leaves(lambda tensor: tensor.repeat(2, 1), value) for value in values]
    expected = reference_outputs(wg.analysis, IndexMaps(wg.analysis.space, removed), values)
    fxwidth.resize(gm, {group: channels.tolist() for group, channels in kept.items()}, fold=False)
    answer = called(gm, values)
    assert largest_difference(deep_tensors(answer), expected) < EXACT
    # Another batch size.
    larger = map_leaves(lambda tensor: torch.cat([tensor, tensor[:1]]) if len(tensor) == 2 else tensor, tuple(values))
    assert len(deep_tensors(called(gm, larger))[0]) == 3


@by_front_end
def test_a_cache_follows_the_channels_it_holds(exported: bool) -> None:
    _, gm = traced(CASES["cache"], exported)
    fxwidth.resize(gm, {"up": 4})
    first, second = (gm(_x(2, WIDTH))["cache"] for _ in range(2))
    assert isinstance(first, Cache)
    assert [tuple(key.shape) for key in first.keys] == [(2, 4)]
    assert first.keys is not second.keys


@by_front_end
def test_other_calls_are_refused(exported: bool) -> None:
    _, gm = traced(CASES["one tensor"], exported)
    x = _x(2, WIDTH)
    assert torch.equal(gm(x, None, scale=2.0), gm(x=x))
    with pytest.raises(
        FxwidthError, match=r"argument 'mask' is a tensor, not None.* Trace the model with example_inputs"
    ):
        gm(x, _x(2))
    with pytest.raises(FxwidthError, match=r"argument 'scale' is 3.0, not 2.0"):
        gm(x, scale=3.0)
    _, gm = traced(CASES["dict in a tuple"], exported)
    with pytest.raises(FxwidthError, match=r"argument 'batch' has other keys or another length"):
        gm({"image": x})


@by_front_end
def test_an_argument_that_was_given_is_not_left_out(exported: bool) -> None:
    _, gm = traced(CASES["two by position"], exported)
    for left_out in ((_x(3, WIDTH),), (_x(3, WIDTH), None)):
        with pytest.raises(FxwidthError, match=r"argument 'mask' is None, not a tensor .* Trace the model with"):
            gm(*left_out)


def test_an_exported_graph_refuses_other_shapes() -> None:
    _, gm = traced(CASES["one tensor"], True)
    with pytest.raises(FxwidthError, match=r"shape \(2, 7\) was given where the graph was traced with \(any, 6\)"):
        gm(_x(2, 7))


def test_an_exported_graph_refuses_what_the_model_treats_otherwise() -> None:
    model = OnBatchSize(True).double()
    gm = fxwidth.trace(model, _x(2, WIDTH))
    assert torch.equal(gm(_x(4, WIDTH)), model(_x(4, WIDTH)))
    with pytest.raises(FxwidthError, match=r"the graph holds only for inputs with .*% 2"):
        gm(_x(3, WIDTH))


def test_numbers_that_are_given_stay_inputs() -> None:
    model = Masked(False).double()
    gm = fxwidth.trace(model, _x(2, WIDTH), {"scale": 3.0})
    assert torch.equal(gm(_x(2, WIDTH), scale=5.0), model(_x(2, WIDTH), scale=5.0))


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ({"x": 1}, {"x": 1}, "example_inputs is a dict, which means arguments by name, and so does example_kwargs"),
        ({3: 1}, None, "the names of arguments are strings, but received .*wrap a dict that is itself an argument"),
        ({"y": 1}, None, r"the model takes 4 inputs \(x, mask, scale, flag\), but example_inputs has 1 \(y\): missing"),
        ((1, 2, 3), None, r"the model takes 4 inputs .* has 3: too many positional arguments; pass a tensor, a tuple"),
    ],
)
def test_unclear_examples_are_refused(args: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(FxwidthError, match=message):
        fxwidth.trace(Masked(False), args, kwargs)


def test_graphs_of_torch_export_take_calls_by_name() -> None:
    x, mask = _x(2, WIDTH), _x(2)
    gm = torch.export.export(Masked(True).double(), (x,), {"mask": mask}).module()
    assert len(fxwidth.analyze(gm, (x,), {"mask": mask}).free) == 1
    with pytest.raises(FxwidthError, match=r"the model takes 2 inputs \(x, mask\), but example_inputs has 1"):
        fxwidth.analyze(gm, x)


@by_front_end
def test_data_may_be_dicts_lists_and_batches_with_targets(exported: bool) -> None:
    batch = {"image": _x(4, WIDTH), "shift": _x(1, WIDTH)}
    gm = fxwidth.trace(LogitsOf(exported).double().eval(), (batch,))
    for data in ([batch], [(batch, torch.zeros(4))]):
        fxwidth.resize(gm, {"net.up": fxwidth.analyze(gm)["net.up"].width - 1}, data=data)
        assert gm.meta["fxwidth_history"][-1]["evidence"] == "data and noise"
    evolver = fxwidth.Evolver(gm, every=1)
    evolver.step(batch, torch.zeros(4))
    assert evolver.history


class LogitsOf(nn.Module):
    def __init__(self, exported: bool) -> None:
        super().__init__()
        self.net = DictToDict(exported)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net.down(self.net.hidden(batch["image"] + batch["shift"]))


# -- modes ---------------------------------------------------------------------------------------------------------


def same_in_both_modes(model: nn.Module, gm: fx.GraphModule) -> list[float]:
    """Return the differences in eval and train mode, the same random numbers drawn."""
    result = []
    for mode in (False, True):
        twin = copy.deepcopy(model).train(mode)
        gm.train(mode)
        torch.manual_seed(5)
        expected = twin(_x(4, WIDTH))
        torch.manual_seed(5)
        result.append(largest_difference([gm(_x(4, WIDTH))], [expected]))
    return result


@by_front_end
@pytest.mark.parametrize("mode", [False, True], ids=["from eval", "from train"])
def test_one_graph_for_both_modes(mode: bool, exported: bool) -> None:
    model = Modes(exported).double().train(mode)
    gm = fxwidth.trace(copy.deepcopy(model), _x(4, WIDTH))
    assert gm.training == mode
    assert is_exported(gm) == exported
    assert max(same_in_both_modes(model, gm)) < EXACT
    fxwidth.resize(gm, {"up": 7})
    gm.train()
    assert not torch.equal(gm(_x(4, WIDTH)), gm(_x(4, WIDTH)))
    gm.eval()
    assert torch.equal(gm(_x(4, WIDTH)), gm(_x(4, WIDTH)))


def test_the_batches_of_a_batch_norm_are_counted_in_training_alone() -> None:
    gm = fxwidth.trace(Modes(True).double(), _x(4, WIDTH))
    counter = gm.get_buffer("norm.num_batches_tracked")
    gm.eval()(_x(4, WIDTH))
    assert counter == 0
    gm.train()(_x(4, WIDTH))
    assert counter == 1


def test_frozen_batch_norms_stay_frozen() -> None:
    model = Modes(True).double().train()
    model.norm.eval()
    gm = fxwidth.trace(model, _x(4, WIDTH))
    before = gm.get_buffer("norm.running_mean").clone()
    gm(_x(4, WIDTH))
    assert torch.equal(gm.get_buffer("norm.running_mean"), before)


@by_front_end
def test_where_the_modes_are_two_networks_the_present_one_is_traced(exported: bool) -> None:
    model = OtherPathInTraining(exported).double()
    told = "OtherPathInTraining does not do in train.. and eval.. all that the model does there: in training it runs"
    with pytest.warns(FxwidthWarning, match=told):
        evaluated = fxwidth.trace(copy.deepcopy(model).eval(), _x(4, WIDTH))
    difference_in_eval, difference_in_training = same_in_both_modes(model, evaluated)
    assert difference_in_eval < EXACT < difference_in_training
    evaluated.train()
    assert not torch.equal(evaluated(_x(4, WIDTH)), evaluated(_x(4, WIDTH))), "its dropout follows"
    with pytest.warns(FxwidthWarning, match=told):
        trained = fxwidth.trace(copy.deepcopy(model).train(), _x(4, WIDTH))
    assert same_in_both_modes(model, trained)[1] < EXACT


# -- what exported graphs hold besides ------------------------------------------------------------------------------


def test_regions_do_what_they_did() -> None:
    model = Regions(True)
    gm = fxwidth.trace(model, _x(4, WIDTH).float())
    assert is_exported(gm)
    x = _x(4, WIDTH).float()
    gradients = []
    for module in (model, gm):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            answer = module(x)
        answer.float().sum().backward()
        gradients.append([answer, *(parameter.grad.clone() for parameter in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    fxwidth.resize(gm, {fxwidth.analyze(gm).free[0].name: HIDDEN - 3})
    assert gm.get_parameter("up.weight").shape == (HIDDEN - 3, WIDTH)
    assert gm(x).shape == (4, 3)


def test_parameters_and_buffers_are_the_models_own() -> None:
    model = Modes(True)
    gm = fxwidth.trace(model, _x(4, WIDTH).float())
    own = dict([*model.named_parameters(), *model.named_buffers()])
    assert {name for name, tensor in [*gm.named_parameters(), *gm.named_buffers()] if own.get(name) is tensor} == set(
        own
    )
    assert set(gm.state_dict()) == set(own)


def test_exported_graphs_can_be_saved_and_loaded(tmp_path: Any) -> None:
    case = CASES["cache"]
    _, gm = traced(case, True)
    fxwidth.resize(gm, {"up": 4})
    fxwidth.save(gm, tmp_path / "whole.pt")
    fxwidth.save(gm, tmp_path / "tensors.safetensors")
    fresh = ToCache(True).double().eval()
    for again in (
        fxwidth.load(tmp_path / "whole.pt", trusted=True),
        fxwidth.load(tmp_path / "tensors.safetensors", fresh, case.args, case.kwargs),
    ):
        assert largest_difference(deep_tensors(invoked(again, case)), deep_tensors(invoked(gm, case))) < EXACT
        assert isinstance(again(case.args)["cache"], Cache)
        assert fxwidth.analyze(again)["up"].width == 4


def test_meta_models_are_exported() -> None:
    with torch.device("meta"):
        model = Masked(True)
    gm = fxwidth.trace(model, torch.empty(2, WIDTH))
    fxwidth.resize(gm, {"up": 4})
    assert gm.get_parameter("up.weight").shape == (4, WIDTH)
    assert gm.get_parameter("up.weight").is_meta


@by_front_end
def test_how_an_input_lies_in_memory_does_not_matter(exported: bool) -> None:
    case = CASES["one tensor"]
    model = case.build(exported).double().eval()
    wide = _x(3, 2 * WIDTH)
    gm = fxwidth.trace(model, wide[::2, :WIDTH])
    assert is_exported(gm) == exported
    with torch.no_grad():
        for given in (wide[::2, :WIDTH], wide[:2, :WIDTH].contiguous(), _x(WIDTH, 2).T):
            assert largest_difference(deep_tensors(gm(given)), deep_tensors(model(given))) < EXACT


@by_front_end
@pytest.mark.parametrize("name", CASES)
def test_a_graph_can_be_traced_once_more(name: str, exported: bool) -> None:
    """By the stock tracer, which looks into all modules but those of torch."""
    case = CASES[name]
    _, gm = traced(case, exported)
    again = fx.symbolic_trace(gm)
    calls = [[node.target for node in one.graph.nodes if node.op == "call_module"] for one in (gm, again)]
    assert [path for path in calls[1] if path.startswith("fxwidth_")] == [
        path for path in calls[0] if path.startswith("fxwidth_")
    ]
    assert largest_difference(deep_tensors(invoked(again, case)), deep_tensors(invoked(gm, case))) < EXACT
