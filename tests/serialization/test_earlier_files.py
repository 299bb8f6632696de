"""Files of the version before modules went into packages: they are read as they were written, or refused."""

from __future__ import annotations

import importlib
import io
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import fx, nn

import fxwidth
from fxwidth import FxwidthError
from fxwidth.serialization import earlier_files
from fxwidth.serialization.earlier_files import module_of_code
from tests.serialization.earlier_networks import ANSWERS, NETWORKS, answers

FILES = Path(__file__).with_name("files")


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pickled_graph_does_what_it_did(name: str, tmp_path: Path) -> None:
    gm = fxwidth.load(FILES / f"{name}.pt", trusted=True)
    assert "scratch" not in gm.state_dict()
    fxwidth.save(gm, tmp_path / "again.pt")
    expected = {key: value for key, value in load_file(FILES / ANSWERS).items() if key.startswith(f"{name} ")}
    for module in (gm, fxwidth.load(tmp_path / "again.pt", trusted=True)):
        found = dict(answers(name, module))
        assert found.keys() == expected.keys()
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-12, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", NETWORKS)
def test_it_can_be_resized(name: str) -> None:
    gm = fxwidth.load(FILES / f"{name}.pt", trusted=True)
    free = fxwidth.analyze(gm).free
    assert free
    fxwidth.resize(gm, {group.name: group.width + 1 for group in free})
    assert len(dict(answers(name, gm))) >= 4


@pytest.mark.parametrize("name", NETWORKS)
def test_tensors_alone_fit_a_fresh_model(name: str) -> None:
    make, inputs, _ = NETWORKS[name]
    gm = fxwidth.load(FILES / f"{name}.safetensors", make().double().eval(), inputs)
    expected = load_file(FILES / ANSWERS)
    key, value = next(answers(name, gm.eval()))
    torch.testing.assert_close(value, expected[key], rtol=1e-12, atol=1e-12)


def names_in(file: Path) -> set[tuple[str, str]]:
    """Return the modules and names of this package that a file names."""
    with zipfile.ZipFile(file) as archive:
        (entry,) = (entry for entry in archive.namelist() if entry.endswith("data.pkl"))
        found = pickletools.genops(archive.read(entry))
        return {tuple(arg.split()) for op, arg, _ in found if op.name == "GLOBAL" and arg.startswith("fxwidth")}


def test_what_the_files_name_has_moved() -> None:
    """The files need most of the table; what they name is found by it, and not without it."""
    named: set[tuple[str, str]] = set()
    for name in NETWORKS:
        named |= names_in(FILES / f"{name}.pt")
    assert len({module for module, _ in named} & earlier_files._MOVED.keys()) >= 8
    assert {(earlier_files._MOVED[module], name) for module, name in named} >= earlier_files._RENAMED.keys()
    for module, name in named:
        place = earlier_files._MOVED[module], name
        _, now = earlier_files._RENAMED.get(place, place)
        assert earlier_files.Unpickler(io.BytesIO()).find_class(module, name).__name__ == now
        with pytest.raises((ImportError, AttributeError)):
            getattr(importlib.import_module(module), name)


# What files of this version name. Who moves or renames one of these tells where it is now, in `earlier_files._MOVED` or
# `_RENAMED`, and here.
NAMED = frozenset(
    {
        "fxwidth.analysis.known_axes.KnownAxes",
        "fxwidth.analysis.known_axes.KnownCall",
        "fxwidth.analysis.known_axes.KnownFactor",
        "fxwidth.analysis.known_axes.Ref",
        "fxwidth.analysis.result.TensorSpec",
        "fxwidth.axes.pins.Fixed",
        "fxwidth.axes.pins.Pin",
        "fxwidth.frontends.call_signature.Inputs",
        "fxwidth.frontends.call_signature.Outputs",
        "fxwidth.frontends.export_reassembly.Region",
        "fxwidth.frontends.in_place.iadd",
        "fxwidth.frontends.tracer_proxies.CodeTracer",
        "fxwidth.frontends.train_eval_merge.InTraining",
        "fxwidth.frontends.train_eval_merge.TrainingFlag",
        "fxwidth.frontends.train_eval_merge.by_mode",
        "fxwidth.runtime.pytrees.Constant",
        "fxwidth.runtime.pytrees.Container",
        "fxwidth.runtime.pytrees.Leaf",
        "fxwidth.serialization.graph_data.GraphData",
        "fxwidth.serialization.graph_data.Named",
        "fxwidth.serialization.graph_data.NodeData",
        "fxwidth.serialization.graph_data.NodeReference",
        "fxwidth.serialization.graph_pickling.blank",
        "fxwidth.serialization.graph_pickling.fill",
        "fxwidth.serialization.graph_pickling.pickle_as_data",
    }
)


def test_what_present_files_name_stays(tmp_path: Path) -> None:
    named = set()
    for name in NETWORKS:
        fxwidth.save(fxwidth.load(FILES / f"{name}.pt", trusted=True), tmp_path / f"{name}.pt")
        named |= names_in(tmp_path / f"{name}.pt")
    assert {f"{module}.{name}" for module, name in named} == NAMED
    for old, now in earlier_files._RENAMED.items():
        assert ".".join(old) not in NAMED
        assert earlier_files.Unpickler(io.BytesIO()).find_class(*old).__module__ == now[0]


def code_of(lines: str) -> tuple[dict[str, Any], str]:
    """Return what torch.fx pickles for a graph module with a layer `a`, given the lines of its code."""
    gm = fx.symbolic_trace(nn.Sequential())
    gm.a = nn.Linear(2, 2)
    body = {name: value for name, value in gm.__dict__.items() if name != "_graph"}
    return body | {"_code": f"\ndef forward(self, x):\n{lines}\n"}, "import torch\n"


def test_what_is_computed_from_no_input_is_a_node() -> None:
    lines = ["rand = torch.rand(2)", "add = x + rand;  x = rand = None", "a = self.a(add);  add = None", "return a"]
    read = module_of_code(*code_of("\n".join(f"    {line}" for line in lines)))
    assert [node.name for node in read.graph.nodes] == ["x", "rand", "add", "a", "output"]
    assert not torch.equal(read(torch.ones(2)), read(torch.ones(2)))


@pytest.mark.parametrize(
    "lines",
    [
        "    if x is None:\n        return 1\n    return x",  # no code of a graph
        "    ones = [torch.ones(2)][0]\n    return x",  # the node has another name
        "    return undefined(x)",
    ],
)
def test_code_that_does_not_come_back_is_refused(lines: str) -> None:
    with pytest.raises(FxwidthError, match=r"of an earlier version, .* load it with the versions of fxwidth and torch"):
        module_of_code(*code_of(lines))


def test_a_class_that_is_gone_is_named(tmp_path: Path) -> None:
    source, target = FILES / "counts.pt", tmp_path / "counts.pt"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry, re.sub(rb"fxwidth\.analysis\n", b"fxwidth.lost\n", data))
    with pytest.raises(FxwidthError, match=r"the file needs TensorSpec of fxwidth\.lost, which is not there"):
        fxwidth.load(target, trusted=True)
