"""What is loaded is what was saved, whatever replays make of it; else it is refused, and all is as it was."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, fx, nn

import fxwidth
from fxwidth import FxwidthError, FxwidthWarning
from fxwidth.serialization.graph_record import adopt, record_of
from fxwidth.serialization.tensor_files import write_tensors
from tests.oracles import files
from tests.oracles.interruptions import Work, assert_undone, counted, differences, state_of
from tests.serialization import earlier_networks
from tests.serialization.earlier_form import tensors_in

FILES = Path(earlier_networks.__file__).with_name("files")


def test_a_file_of_the_version_before_comes_back_to_the_bit() -> None:
    path = FILES / f"{earlier_networks.REPLAYED}.safetensors"
    x = earlier_networks.stream_inputs()
    gm = fxwidth.load(path, earlier_networks.stream(), x)
    wanted = load_file(FILES / f"{earlier_networks.REPLAYED}-answers.safetensors")["answer"]
    torch.testing.assert_close(gm(x), wanted, rtol=1e-12, atol=1e-12)
    assert [len(record["widths"]) for record in fxwidth.report(gm).resizes] == [1, 1, 4]


def test_a_file_of_one_length_comes_back_in_the_place_of_a_model() -> None:
    """Exported graphs took the example's length alone; with a graph that takes others, the remedy is told."""
    path, x = FILES / f"{earlier_networks.OF_ONE_LENGTH}.safetensors", earlier_networks.stream_inputs()
    gm = fxwidth.load(path, earlier_networks.placed, x)
    wanted = load_file(FILES / f"{earlier_networks.OF_ONE_LENGTH}-answers.safetensors")["answer"]
    # Another machine may round otherwise.
    torch.testing.assert_close(gm(x), wanted, rtol=1e-12, atol=1e-12)
    with pytest.raises(FxwidthError, match=r"traced with \(any, 3, 4\)"):
        gm(x[:, :2])
    graph = fxwidth.trace(earlier_networks.placed(), x)
    before = {name: tensor.clone() for name, tensor in graph.state_dict().items()}
    # Of another torch, which may write other nodes for the same, a graph that differs is told by a warning.
    same_torch = earlier_networks.OF_TORCH in torch.__version__
    with pytest.raises(FxwidthError, match="pass the model itself" if same_torch else "whose graph differs"):
        fxwidth.load(path, graph, x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in graph.state_dict().items())


def test_a_file_says_whether_its_graph_takes_other_sizes(tmp_path: Path) -> None:
    x = earlier_networks.stream_inputs()
    gm = fxwidth.trace(earlier_networks.placed(), x)
    fxwidth.resize(gm, {"up": 5})
    fxwidth.save(gm, tmp_path / "any.safetensors")
    again = fxwidth.load(tmp_path / "any.safetensors", earlier_networks.placed, x)
    for length in (1, 3, 7):
        assert torch.equal(again(x[:, :1].expand(5, length, -1)), gm(x[:, :1].expand(5, length, -1)))
    # And one of one length is again one of one length.
    old = FILES / f"{earlier_networks.OF_ONE_LENGTH}.safetensors"
    fxwidth.save(fxwidth.load(old, earlier_networks.placed, x), tmp_path / "one.safetensors")
    one = fxwidth.load(tmp_path / "one.safetensors", earlier_networks.placed, x)
    # Its ops are not all those of the other graph, and may round otherwise.
    torch.testing.assert_close(one(x), gm(x), rtol=1e-12, atol=1e-12)


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the record of a file."""
    record = files._record(path)
    change(record)
    write_tensors(path, tensors_in(path), {"fxwidth.record": json.dumps(record)})


class Shared(nn.Module):
    """Numbers as literals of nodes, and as attributes of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.drop, self.b = nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(0.25), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(torch.nn.functional.layer_norm(self.norm(self.a(x)) * 0.5, (8,), eps=1e-3)))


def test_numbers_are_those_of_the_file(tmp_path: Path) -> None:
    """What a user has changed since the trace, and what other arithmetic would make of literals in a replay."""
    x = torch.randn(5, 4)
    gm = fxwidth.trace(Shared().eval(), x)
    fxwidth.resize(gm, {"a": 5})
    gm.get_submodule("norm").eps = 0.75
    gm.get_submodule("drop").p = 0.5
    scaled = next(node for node in gm.graph.nodes if 0.5 in node.args)
    scaled.args = (scaled.args[0], 0.625)
    gm.recompile()
    fxwidth.save(gm, tmp_path / "a.safetensors")
    fresh = Shared().eval()
    again = fxwidth.load(tmp_path / "a.safetensors", fresh, x)
    assert torch.equal(again(x), gm(x))
    assert again.get_submodule("drop").p == 0.5
    assert record_of(again) == record_of(gm)


def test_without_them_outputs_would_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault."""
    x = torch.randn(5, 4)
    gm = fxwidth.trace(Shared().eval(), x)
    gm.get_submodule("norm").eps = 0.75
    fxwidth.save(gm, tmp_path / "a.safetensors")
    monkeypatch.setattr("fxwidth.checkpoint.replay.adopt", lambda *_, **__: None)
    assert not torch.equal(fxwidth.load(tmp_path / "a.safetensors", Shared().eval(), x)(x), gm(x))


def test_whole_numbers_need_trust(tmp_path: Path) -> None:
    gm = files.graph()
    fxwidth.save(gm, tmp_path / "a.safetensors")
    path = tmp_path / "a.safetensors"

    def wider(record: dict[str, Any]) -> None:
        record["graph"]["attributes"]["1"]["normalized_shape"] = {"tuple": [10**6]}

    changed(path, wider)
    with pytest.raises(FxwidthError, match=r"1\.normalized_shape has 1000000 in the file, and 13 here; .*trusted=True"):
        files.load(path)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        fxwidth.load(path, files.network(), files.inputs(), trusted=True)(files.inputs())


class OtherActivation(nn.Sequential):
    """The same parameters, and other code."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as nn.Sequential calls it
        return super().forward(input) + 0


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "of other sizes": (
        lambda: files.network(20),
        r"0\.weight has shape \(24, 6\) in the file and \(20, 6\) here, before",
    ),
    "with other code": (
        lambda: OtherActivation(*files.network()).eval(),
        r"'output' is output in the file, and 'add' is",
    ),
    "with a layer more": (lambda: nn.Sequential(*files.network(), nn.Linear(3, 3)), r"7\.weight occurs in only one"),
    "of another dtype": (
        lambda: files.network().double(),
        r"is of torch\.float32 in the file and of torch\.float64 here",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_is_refused_and_is_as_it_was(name: str, tmp_path: Path) -> None:
    fxwidth.save(files.graph(), tmp_path / "a.safetensors")
    make, told = OTHERS[name]
    model = make()
    x = files.inputs().to(next(model.parameters()).dtype)
    before = state_of(model)
    with pytest.raises(FxwidthError, match=rf"a\.safetensors does not fit this model: .*{told}"):
        fxwidth.load(tmp_path / "a.safetensors", model, x)
    assert not differences(before, state_of(model))


class Tied(nn.Module):
    """A table and a head of the same shape, that are one tensor or two."""

    def __init__(self, is_tied: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        if is_tied:
            self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x))


@pytest.mark.parametrize("saved", [False, True])
def test_tied_weights_are_not_loaded_into_two_nor_two_into_one(saved: bool, tmp_path: Path) -> None:
    ids = torch.arange(6).view(2, 3)
    fxwidth.save(fxwidth.trace(Tied(saved), ids), tmp_path / "a.safetensors")
    model = Tied(not saved)
    before = state_of(model)
    with pytest.raises(FxwidthError, match=r"does not fit this model: head\.weight occurs in only one"):
        fxwidth.load(tmp_path / "a.safetensors", model, ids)
    assert not differences(before, state_of(model))
    gm = fxwidth.load(tmp_path / "a.safetensors", Tied(saved), ids)
    assert (gm.get_parameter("head.weight") is gm.get_parameter("table.weight")) is saved


def test_an_expanded_buffer_is_loaded(tmp_path: Path) -> None:
    """One place in memory for several values can take none of them; it gets places of its own."""

    def model() -> nn.Module:
        network = files.network()
        network[4].running_mean = torch.zeros(1).expand(12)
        return network

    gm = fxwidth.trace(model(), files.inputs())
    fxwidth.save(gm, tmp_path / "a.safetensors")
    assert files.is_equal(fxwidth.load(tmp_path / "a.safetensors", model(), files.inputs()), gm)
    gm.get_buffer("4.running_mean").data = torch.linspace(0, 1, 12)
    fxwidth.save(gm, tmp_path / "a.safetensors")
    for fresh in (model(), model):
        assert files.is_equal(fxwidth.load(tmp_path / "a.safetensors", fresh, files.inputs()), gm)


def test_attributes_in_dicts_are_those_of_the_file(tmp_path: Path) -> None:
    gm = files.graph()
    part = gm.get_submodule("1")
    part.notes = {"scale": 0.5, "by": {3: [1.5]}}
    fxwidth.save(gm, tmp_path / "a.safetensors")
    model = files.network()
    model[1].notes = {"scale": 0.7, "by": {3: [2.5]}}
    again = fxwidth.load(tmp_path / "a.safetensors", model, files.inputs())
    assert again.get_submodule("1").notes == part.notes


@pytest.mark.parametrize("name", ["__metadata__", "of_half_a\ud800letter"])
def test_names_that_no_file_can_hold_are_refused(name: str, tmp_path: Path) -> None:
    gm = files.graph()
    gm.register_buffer(name, torch.zeros(2))
    with pytest.raises(FxwidthError, match=r"no tensor in a \.safetensors file can be called .*another name"):
        fxwidth.save(gm, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_graph_of_another_version_of_torch_is_told_of(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    fxwidth.save(files.graph(), path)

    def older(record: dict[str, Any]) -> None:
        record["versions"]["torch"] = "2.0"
        record["graph"]["graphs"][""][2][1] = "7"

    changed(path, older)
    with pytest.warns(
        FxwidthWarning, match=r"was written by fxwidth .*, torch 2\.0, whose graph differs: .* is 7 in the"
    ):
        again = files.load(path)
    assert files.is_equal(again, files.graph())


def test_ctrl_c_leaves_all_as_it_was(tmp_path: Path) -> None:
    saved, path = files.graph(), tmp_path / "a.safetensors"
    optimizer = torch.optim.AdamW(saved.parameters())
    saved(files.inputs()).sum().backward()
    optimizer.step()
    fxwidth.save(saved, path, optimizer=optimizer)
    model = files.network()
    gm = fxwidth.trace(model, files.inputs())
    own = torch.optim.AdamW(gm.parameters())
    work = Work(lambda: fxwidth.load(path, gm, optimizer=own), [gm, model], own)
    other, its_own = _twin()
    count = counted(lambda: fxwidth.load(path, other, optimizer=its_own)).count
    assert_undone(work, sorted(random.Random(0).sample(range(1, count), 12)))
    assert fxwidth.load(path, gm, optimizer=own) is gm
    assert files.is_equal(gm, saved)


def _twin() -> tuple[fx.GraphModule, torch.optim.Optimizer]:
    gm = fxwidth.trace(files.network(), files.inputs())
    return gm, torch.optim.AdamW(gm.parameters())


def test_a_failure_at_the_last_tensor_leaves_all_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = tmp_path / "a.safetensors", files.network()
    fxwidth.save(files.graph(), path)
    from fxwidth.serialization.tensor_files import TensorFile

    read, calls = TensorFile.tensor, list[str]()

    def failing(self: TensorFile, name: str) -> Tensor:
        calls.append(name)
        if len(calls) == len(self.entries):
            raise OSError("input/output error")
        return read(self, name)

    monkeypatch.setattr(TensorFile, "tensor", failing)
    before = state_of(model)
    with pytest.raises(FxwidthError, match=r"cannot be loaded \(OSError: input/output error\); nothing has changed"):
        fxwidth.load(path, model, files.inputs())
    assert len(calls) > 5
    assert not differences(before, state_of(model))


class TestFactories:
    """A function that makes a model."""

    def test_on_the_meta_device(self, tmp_path: Path) -> None:
        saved = files.graph()
        fxwidth.save(saved, tmp_path / "a.safetensors")

        def make() -> nn.Module:
            with torch.device("meta"):
                return files.network()

        again = fxwidth.load(tmp_path / "a.safetensors", make, files.inputs())
        assert not any(tensor.is_meta for tensor in again.state_dict().values())
        assert files.is_equal(again, saved)
        with torch.device("meta"):
            model = files.network()
        assert files.is_equal(fxwidth.load(tmp_path / "a.safetensors", model, files.inputs()), saved)

    @pytest.mark.parametrize("convert", [nn.Module.double, nn.Module.bfloat16])
    def test_dtypes_are_those_of_the_file(self, convert: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
        saved, path = files.graph(), tmp_path / "a.safetensors"
        convert(saved)
        fxwidth.save(saved, path)
        dtype = saved.get_parameter("0.weight").dtype
        again = fxwidth.load(path, files.network, files.inputs())
        assert again.get_parameter("0.weight").dtype == dtype
        x = files.inputs().to(dtype)
        assert torch.equal(again(x), saved(x))
        with pytest.raises(FxwidthError, match=rf"convert the model first, model\.to\({dtype}\), .*convert=True"):
            files.load(path)
        rounded = fxwidth.load(path, files.network(), files.inputs(), convert=True)
        assert torch.equal(rounded.get_parameter("0.weight"), saved.get_parameter("0.weight").float())

    def test_the_order_of_dims_in_memory_too(self, tmp_path: Path) -> None:
        def make() -> nn.Module:
            torch.manual_seed(0)
            return nn.Sequential(
                nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2)
            ).eval()

        x = torch.randn(2, 3, 8, 8)
        gm = fxwidth.trace(make(), x).to(memory_format=torch.channels_last)
        fxwidth.resize(gm, {"0": 5}, selection="magnitude")
        gm.to(memory_format=torch.channels_last)
        fxwidth.save(gm, tmp_path / "a.safetensors")
        again = fxwidth.load(tmp_path / "a.safetensors", make, x)
        assert {n: t.stride() for n, t in again.named_parameters()} == {n: t.stride() for n, t in gm.named_parameters()}
        assert torch.equal(again(x), gm(x))

    def test_what_makes_no_model_is_told(self, tmp_path: Path) -> None:
        fxwidth.save(files.graph(), tmp_path / "a.safetensors")
        for wrong in (3, lambda: 3):
            with pytest.raises(
                FxwidthError, match=r"takes an nn\.Module or a function that makes one, but received int"
            ):
                fxwidth.load(tmp_path / "a.safetensors", wrong, files.inputs())  # type: ignore[arg-type]


def test_a_graph_goes_on_from_where_it_is(tmp_path: Path) -> None:
    path, plans = tmp_path / "a.safetensors", [{"0": 12}, {"3": 15}, {"0": 13, "3": 9}]
    saved = files.graph(24, *plans)
    fxwidth.save(saved, path)
    for done in range(len(plans) + 1):
        begun = fxwidth.trace(files.network(), files.inputs())
        for plan in plans[:done]:
            fxwidth.resize(begun, plan, selection="magnitude")
        assert files.is_equal(fxwidth.load(path, begun), saved)
    other = files.graph(24, {"0": 7})
    with pytest.raises(FxwidthError, match=r"the graph has been resized 1 times, otherwise than the one in the file"):
        fxwidth.load(path, other)
    assert fxwidth.report(other).resizes[0]["widths"] == {"0": [24, 7]}


def test_loaded_graphs_tell_the_same_history(tmp_path: Path) -> None:
    saved = files.graph()
    fxwidth.save(saved, tmp_path / "a.safetensors")
    again = files.load(tmp_path / "a.safetensors")
    told = [[{**one, "original": None} for one in fxwidth.report(gm).resizes] for gm in (again, saved)]
    assert told[0] == told[1]
    fxwidth.save(again, tmp_path / "b.safetensors")
    assert files.is_equal(files.load(tmp_path / "b.safetensors"), saved)


def test_a_record_is_adopted_as_a_whole_or_not_at_all() -> None:
    gm = fxwidth.trace(Shared().eval(), torch.randn(2, 4))
    record = copy.deepcopy(record_of(gm))
    record["attributes"]["norm"]["eps"] = 0.5
    record["attributes"]["b"]["in_features"] = 9
    code, graph = gm.code, gm.graph
    with pytest.raises(Exception, match="in_features"):
        adopt(gm, record, trusted=False)
    assert gm.get_submodule("norm").eps == 1e-5
    assert (gm.code, gm.graph) == (code, graph)


def test_state_dicts_of_other_widths_are_told_of() -> None:
    wide, narrow = fxwidth.trace(files.network(), files.inputs()), files.graph()
    before = {name: tensor.clone() for name, tensor in wide.state_dict().items()}
    for gm in (wide, copy.deepcopy(wide)):
        with pytest.raises(
            FxwidthError, match=r"0\.weight is \(13, 6\) there and \(24, 6\) here, .*fxwidth\.load, which"
        ):
            gm.load_state_dict(narrow.state_dict(), strict=False)
        assert all(torch.equal(tensor, before[name]) for name, tensor in gm.state_dict().items())
    assert narrow.state_dict().keys() == files.network().state_dict().keys()
    with pytest.raises(RuntimeError, match="Missing key"):
        wide.load_state_dict({})
    assert str(wide.load_state_dict(before)) == "<All keys matched successfully>"
