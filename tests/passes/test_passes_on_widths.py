"""Passes that resize, verify, recalibrate, change bases and report."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import fxwidth
from fxwidth import FxwidthError
from fxwidth.passes import (
    ChangeBasis,
    GrowWidths,
    Pipeline,
    PlanWidths,
    RecalibrateBatchNorm,
    ReportWidths,
    ResizeWidths,
    ShrinkWidths,
    VerifyWidths,
)
from tests.passes.networks import images, largest, settled, small_graph


class Attention(nn.Module):
    """Attention whose heads have their sizes spelled out."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        """Return what x attends to in itself."""
        batch, length, _ = x.shape
        query, key, value = (one(x).view(batch, length, 4, 8).transpose(1, 2) for one in (self.q, self.k, self.v))
        answer = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        return self.o(answer.reshape(batch, length, -1))  # type: ignore[no-any-return]


class TestShrinkAndGrow:
    def test_each_does_its_part_of_a_plan_and_leaves_the_rest(self) -> None:
        _, gm, _ = small_graph()
        gm.meta["fxwidth_plan"] = {"0": 9, "2": 20}
        ShrinkWidths()(gm)
        assert gm.get_parameter("2.weight").shape == (12, 9)
        assert gm.meta["fxwidth_plan"] == {"2": 20}
        GrowWidths()(gm)
        assert gm.get_parameter("2.weight").shape == (20, 9)
        assert gm.meta["fxwidth_plan"] == {}

    def test_in_a_pipeline_they_verify_one_by_one(self) -> None:
        _, gm, x = small_graph()
        before = gm(x)

        def planned(module: torch.fx.GraphModule) -> None:
            module.meta["fxwidth_plan"] = {"0": 16, "2": 20}

        Pipeline(planned, ShrinkWidths(), VerifyWidths(), GrowWidths(), VerifyWidths())(gm)
        assert gm.get_parameter("2.weight").shape == (20, 16)
        assert largest(gm(x), before) < 1e-12

    @pytest.mark.parametrize(
        ("one", "message"),
        [
            (
                ShrinkWidths({"0": 20}),
                "ShrinkWidths was given a plan that brings group '0' from 16 to 20; leave it out",
            ),
            (GrowWidths({"0": [0, 1]}), "GrowWidths was given a plan that brings group '0' from 16 to 2"),
        ],
    )
    def test_what_is_not_its_part_of_a_plan_of_its_own_is_refused(self, one: ResizeWidths, message: str) -> None:
        _, gm, _ = small_graph()
        with pytest.raises(FxwidthError, match=message):
            one(gm)
        assert gm.get_parameter("0.weight").shape == (16, 8)

    @pytest.mark.parametrize("kind", [ResizeWidths, ShrinkWidths])
    def test_two_plans_are_one_too_many(self, kind: type[ResizeWidths]) -> None:
        _, gm, _ = small_graph()
        PlanWidths(params=0.5)(gm)
        with pytest.raises(FxwidthError, match=r"was given a plan for '0', and another one is left in gm.meta"):
            kind({"0": 9})(gm)
        assert "fxwidth_plan" in gm.meta


class Tied(nn.Module):
    """Convolutions with a shortcut, a layer norm and attention by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 8))
        self.norm, self.up, self.head = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x))
        x = (x + self.three(torch.relu(self.two(x)))).flatten(2).transpose(1, 2)
        return self.head(torch.relu(self.up(self.norm(x)))).mean(1)


class TestVerify:
    @pytest.mark.parametrize(
        ("options", "plans"),
        [
            ({}, [{"two": 5}, {"two": 5, "up": 20}, {"one": [0, 3, 4], "two": 3}]),
            pytest.param({}, [{"up": 20}, {"one": 6}, {"one": 7, "up": 6}], marks=pytest.mark.slow),
            ({"data": [images()]}, [{"two": [1, 2, 7]}]),
        ],
    )
    def test_resized_graphs_pass(self, options: dict[str, Any], plans: list[dict[str, Any]]) -> None:
        for plan in plans:
            gm = ResizeWidths(plan, exact=False)(fxwidth.trace(settled(Tied()), images())).graph_module
            found = VerifyWidths(**options)(gm).graph_module.meta["fxwidth_verified"]
            assert found["compared"] > 10
            assert found["by_ops"] < 1e-12
            # Zeros tell where channels were removed alone, and no norm counts them.
            assert (found["by_zeros"] is None) == ("up" in plan or "one" in plan)
            assert found["by_zeros"] is None or found["by_zeros"] < 1e-12

    @pytest.mark.parametrize("plan", [{"q#0": 2}, {"q#1": 4}, {"v#1": 4}, {"q#1": 4, "v#1": 2}])
    def test_attention_by_another_kernel_passes(self, plan: dict[str, int]) -> None:
        """Which kernel runs goes by the sizes of a head, and whether the answer is copied before a reshape by it."""
        torch.manual_seed(0)
        x = torch.randn(2, 5, 16, dtype=torch.float64)
        gm = ResizeWidths(plan)(fxwidth.trace(Attention().double(), x)).graph_module
        found = VerifyWidths()(gm).graph_module.meta["fxwidth_verified"]
        assert found["compared"] > 20
        assert found["by_ops"] < 1e-12
        assert found["by_zeros"] < 1e-12
        with torch.no_grad():
            gm.get_submodule("v").weight.mul_(2)  # type: ignore[operator, union-attr]
            gm.get_submodule("o").register_forward_hook(lambda _, __, out: out * 2)
        # What is called is what is seen: a doubled answer is another op.
        with pytest.raises(FxwidthError, match="VerifyWidths: an op of the resized graph differs"):
            VerifyWidths()(gm)

    def test_refitted_recalibrated_and_trained_graphs_pass(self) -> None:
        _, gm, x = small_graph()
        Pipeline(PlanWidths(params=0.6, data=[x]), ResizeWidths(data=[x]), RecalibrateBatchNorm([x]))(gm)
        with torch.no_grad():
            for parameter in gm.parameters():
                parameter.add_(torch.randn_like(parameter))
        assert VerifyWidths()(gm).graph_module.meta["fxwidth_verified"]["by_zeros"] < 1e-8
        # A copy is verified too, and one that nothing was resized in.
        VerifyWidths()(copy.deepcopy(gm))
        VerifyWidths()(ResizeWidths({})(gm).graph_module)

    def test_a_changed_literal_is_found(self) -> None:
        gm = ResizeWidths({"two": 5})(fxwidth.trace(settled(Tied()), images())).graph_module
        node = next(node for node in gm.graph.nodes if node.target == "flatten")
        with gm.graph.inserting_after(node):
            wrong = gm.graph.call_method("mul", (node, 1.001))
        node.replace_all_uses_with(wrong)
        wrong.args = (node, 1.001)
        gm.recompile()
        with pytest.raises(FxwidthError, match=r"VerifyWidths: an op of the resized graph differs by inf of its size"):
            VerifyWidths()(gm)

    def test_a_changed_attribute_is_found(self) -> None:
        gm = ResizeWidths({"two": 5})(fxwidth.trace(settled(Tied()), images())).graph_module
        gm.get_submodule("norm").eps = 0.5  # type: ignore[assignment]
        with pytest.raises(FxwidthError, match=r"VerifyWidths: an op of the resized graph differs by"):
            VerifyWidths()(gm)
        assert "fxwidth_verified" not in gm.meta

    def test_a_parameter_of_another_size_is_found(self) -> None:
        gm = ResizeWidths({"two": 5})(fxwidth.trace(settled(Tied()), images())).graph_module
        gm.get_submodule("two")._parameters["weight"] = nn.Parameter(torch.zeros(6, 8, 3, 3, dtype=torch.float64))
        with pytest.raises(FxwidthError, match=r"two.weight has shape \(6, 8, 3, 3\), where \(5, 8, 3, 3\) is presc"):
            VerifyWidths()(gm)

    def test_wrongly_kept_channels_are_found_by_zeros(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The oracle that knows no literal of the resized graph."""
        gm = ResizeWidths({"two": 5})(fxwidth.trace(settled(Tied()), images())).graph_module
        monkeypatch.setattr("fxwidth.verification.present_values.prescribed_difference", lambda *_: (0.0, 1))
        node = next(node for node in gm.graph.nodes if node.target == "three")
        gm.get_submodule("three").padding_mode = "circular"  # type: ignore[assignment]
        gm.get_submodule("three")._reversed_padding_repeated_twice = [1, 1, 1, 1]  # type: ignore[assignment]
        assert node is not None
        with pytest.raises(FxwidthError, match=r"VerifyWidths: an output of the resized graph differs by"):
            VerifyWidths()(gm)

    def test_data_without_batches_are_told(self) -> None:
        gm = ResizeWidths({"two": 5})(fxwidth.trace(settled(Tied()), images())).graph_module
        with pytest.raises(FxwidthError, match="VerifyWidths: data= holds no batch"):
            VerifyWidths([])(gm)


def test_parameters_that_were_replaced_are_let_go() -> None:
    """What VerifyWidths asks for is the tape, which holds no values."""
    model, gm, x = small_graph()
    old = [weakref.ref(parameter) for parameter in gm.parameters()]
    del model
    Pipeline(PlanWidths(params=0.5), ResizeWidths(data=[x]))(gm)
    gc.collect()
    own = {id(parameter) for parameter in gm.parameters()}
    assert not [one for one in old if one() is not None and id(one()) not in own]


class Norms(nn.Module):
    """Batch norms as modules, one of them frozen, one without affine parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.up = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1)
        self.plain, self.head, self.last = nn.BatchNorm2d(5, affine=False), nn.Linear(5, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.plain(self.up(torch.relu(self.norm(self.stem(x))))))
        return self.last(self.head(x.mean((2, 3))))


class ExportedNorms(Norms):
    """The same in ATen ops."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 100:
            x = x * 2
        return super().forward(x)


class TestRecalibrate:
    @pytest.mark.parametrize(("kind", "training"), [(Norms, False), (Norms, True), (ExportedNorms, False)])
    def test_it_does_what_torch_does(self, kind: type[nn.Module], training: bool) -> None:
        model, data = settled(kind()), [images(6), images(9), (images(5), torch.zeros(5))]
        wanted = copy.deepcopy(model)
        update_bn([batch[0] if isinstance(batch, tuple) else batch for batch in data], wanted)
        gm = fxwidth.trace(model, images()).train(training)
        assert RecalibrateBatchNorm(data)(gm).modified
        assert gm.training is training
        for name, tensor in wanted.state_dict().items():
            assert largest(gm.state_dict()[name].double(), tensor.double()) < 1e-12, name

    def test_a_graph_without_batch_norms_stays(self) -> None:
        gm = fxwidth.trace(nn.Linear(3, 2), torch.randn(2, 3))
        assert not RecalibrateBatchNorm([torch.randn(2, 3)])(gm).modified

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ([], "RecalibrateBatchNorm: data= holds no batch"),
            ([torch.randn(4, 7, dtype=torch.float64)], "input 'input' in batch 0 of data has shape"),
            (None, "RecalibrateBatchNorm needs data"),
        ],
    )
    def test_data_that_do_not_fit_are_told(self, data: Any, message: str) -> None:
        _, gm, _ = small_graph()
        before = copy.deepcopy(gm.state_dict())
        with pytest.raises(FxwidthError, match=message):
            RecalibrateBatchNorm(data)(gm)
        assert all(torch.equal(tensor, before[name]) for name, tensor in gm.state_dict().items())


class TestChangeBasis:
    def test_the_function_stays_and_the_first_channels_matter_most(self) -> None:
        x = torch.randn(256, 12, dtype=torch.float64)
        model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3)).double()
        gm, before = fxwidth.trace(model, x), copy.deepcopy(model.state_dict())
        assert ChangeBasis([x], only="0")(gm).modified
        assert largest(gm(x), model(x)) < 1e-10
        assert largest(gm(2 * x[:5]), model(2 * x[:5])) < 1e-10
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        hidden = gm.get_submodule("0")(x)
        hidden = (hidden - hidden.mean(0)).detach()
        energies = (gm.get_parameter("1.weight").detach().square().sum(0) * hidden.var(0)).tolist()
        assert energies[:6] == sorted(energies[:6], reverse=True)
        assert max(energies[6:]) < 1e-6 * energies[0]
        # To drop what is last there costs nothing.
        wanted = gm(x).detach()
        assert largest(fxwidth.resize(gm, {"0": list(range(6))}, data=[x])(x), wanted) < 1e-6

    def test_other_groups_stay(self) -> None:
        _, gm, x = small_graph()
        before = copy.deepcopy(gm.state_dict())
        ChangeBasis([x], keep=["2", "5"])(gm)
        assert all(torch.equal(tensor, before[name]) for name, tensor in gm.state_dict().items())

    def test_a_plan_for_the_old_channels_goes(self) -> None:
        gm = fxwidth.trace(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), torch.randn(8, 4))
        gm.meta["fxwidth_plan"] = {"0": [0, 2]}
        ChangeBasis()(gm)
        assert "fxwidth_plan" not in gm.meta


def test_a_report_is_plain_data() -> None:
    _, gm, x = small_graph()
    Pipeline(PlanWidths(params=0.6), ResizeWidths(data=[x]), VerifyWidths(), ReportWidths())(gm)
    told = gm.meta["fxwidth_report"]
    assert json.loads(json.dumps(told))["resizes"][0]["parameters"][1] == told["parameters"]
    assert told["verified"]["compared"] > 0
    assert told["rebuilt"] == []
    fxwidth.resize(gm, {"0": 2})
    assert "fxwidth_report" not in gm.meta


def test_options_of_passes_are_those_of_functions() -> None:
    for kind in (ShrinkWidths, GrowWidths):
        with pytest.raises(FxwidthError, match=r"folds= is no option of fxwidth\.resize"):
            kind({"0": 3}, folds=True)  # type: ignore[call-arg]
