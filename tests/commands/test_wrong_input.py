"""Wrong input is one message that names what was typed and what helps, without a traceback, and status 2."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion
from typer.testing import CliRunner

from fxwidth.commands.app import app

OWN = """
import torch
from torch import nn
net = nn.Linear(8, 4)
images = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 7 * 7, 4))
words = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 4))
number = 3
def nothing():
    return None
def fails():
    raise ValueError("no such layer")
"""
PLAIN = ["own_wrong:net", "--input", "2x8"]
CASES: dict[str, tuple[list[str], str]] = {
    "no zoo": (["inspect", "resnet18"], "did you mean torchvision:resnet18,"),
    "misspelt zoo": (["inspect", "torchvison:resnet18"], "did you mean torchvision?"),
    "misspelt model": (
        ["inspect", "torchvision:resnet81"],
        "no model 'resnet81'; did you mean resnet18",
    ),
    "misspelt timm model": (["inspect", "timm:vit_tiny_patch16_225"], "did you mean vit_tiny_patch16_224"),
    "int8 model": (["inspect", "torchvision:quantized_resnet18"], "take torchvision:resnet18"),
    "package that is not there": (["inspect", "ultralytics:yolo11n.yaml"], "pip install ultralytics"),
    "no configuration": (["inspect", "hf:no/config.json"], "there is no file no/config.json"),
    "no file": (["inspect", "missing.pt2"], "there is no file missing.pt2"),
    "no module": (["inspect", "no_such_module:net"], "there is no library or module 'no_such_module'"),
    "no function": (["inspect", "own_wrong:nett"], "own_wrong has no 'nett'; did you mean net?"),
    "no model": (["inspect", "own_wrong:number"], "own_wrong:number is int; it must be a model or a function"),
    "nothing returned": (["inspect", "own_wrong:nothing"], "own_wrong:nothing returns NoneType"),
    "failing function": (["inspect", "own_wrong:fails"], "fails: ValueError: no such layer ("),
    "unknown inputs": (["inspect", "own_wrong:net"], "give its shape, as in --input 1x3x224x224"),
    "bad shape": (
        ["inspect", "own_wrong:net", "--input", "2,8"],
        "--input 2,8: sizes are joined by x: type --input 2x8.",
    ),
    "a tuple": (["inspect", "own_wrong:net", "--input", "a=(2, 8)"], "type --input a=2x8."),
    "letters": (["inspect", "own_wrong:net", "--input", "NxC"], "--input NxC: 'N' is no size; an input is a shape"),
    "no batch": (["inspect", "own_wrong:images", "--input", "3x9x9"], "height, width); try --input 1x3x9x9."),
    "named": (["inspect", "own_wrong:images", "--input", "input=9x9x3"], "try --input input=1x3x9x9."),
    "another width": (["inspect", "own_wrong:net", "--input", "2x9"], "takes (batch, 8); try --input 2x8."),
    "words": (
        ["inspect", "own_wrong:words", "--input", "1x9"],
        "takes whole numbers, (batch, length); try --input 1x9:i",
    ),
    "size zero": (["inspect", "own_wrong:net", "--input", "0x8"], "--input 0x8: a size is 0; an input is a shape"),
    "bad dtype": (["inspect", "own_wrong:net", "--input", "2x8:floaty"], "torch has no dtype 'floaty'"),
    "near dtype": (["inspect", "own_wrong:net", "--input", "2x8:int65"], "did you mean int64"),
    "half named": (["inspect", "own_wrong:net", "--input", "a=2x8", "--input", "2x8"], "give every input a name"),
    "no weights": (["inspect", *PLAIN, "--weights", "missing.pt"], "--weights missing.pt: there is no such file"),
    "other weights": (["inspect", *PLAIN, "--weights", "other.pt"], "does not hold the state dict of this model"),
    "weights of no library": (["inspect", *PLAIN, "--weights", "default"], "is of no library; give --weights a file"),
    "bad bound": (["plan", *PLAIN, "--params", "half"], "--params half: a bound is a whole number"),
    "no data": (["plan", *PLAIN, "--params", "0.5", "--data", "missing"], "--data missing: there is no such file"),
    "no data file": (["plan", *PLAIN, "--params", "0.5", "--data", "no.pt"], "--data no.pt: there is no such file"),
    "no folder": (["plan", *PLAIN, "--params", "0.5", "--out", "no/plan.json"], "there is no folder no; make"),
    "file is there": (["plan", *PLAIN, "--params", "0.5", "--out", "other.pt"], "replace it with --overwrite"),
    "no plan": (["evolve", *PLAIN, "--plan", "no.json", "--out", "x.pt2"], "--plan no.json cannot be read"),
    "bad plan": (
        ["evolve", *PLAIN, "--plan", "own_wrong.py", "--out", "x.pt2"],
        "own_wrong.py: this is no JSON",
    ),
    "no budget": (["evolve", *PLAIN, "--out", "x.pt2"], "evolve takes either --plan or a budget"),
    "bad file name": (["evolve", *PLAIN, "--params", "0.5", "--out", "x.onnx"], "ends in .pt2, .safetensors, .pt"),
    "unknown group": (
        ["explain", *PLAIN, "wieght", "weight"],
        "no channel group 'wieght'; did you mean 'weight'",
    ),
    "report of a model": (
        ["report", "torchvision:resnet18"],
        "is no file; a report is of what fxwidth.save",
    ),
    "needless architecture": (["inspect", *PLAIN, "--architecture", "x:y"], "is no such file"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_wrong.py").write_text(OWN)
    torch.save({"weight": torch.zeros(3, 3)}, tmp_path / "other.pt")
    monkeypatch.delitem(sys.modules, "own_wrong", raising=False)
    return tmp_path


def told(output: str) -> list[str]:
    """Return the lines of an output, but for those of progress, which a slow machine has more of."""
    return [line for line in output.splitlines() if not re.match(r"\d\d:\d\d:\d\d ", line)]


@pytest.mark.parametrize("name", CASES)
def test_wrong_input(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "package that is not there":
        monkeypatch.setitem(sys.modules, "ultralytics", None)
    if name == "misspelt timm model":
        pytest.importorskip("timm")
    if name == "words" and torch.__version__ < TorchVersion("2.12"):
        pytest.skip("under fake tensors an older torch looks up fractions too")
    arguments, message = CASES[name]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2, result.output
    (error,) = told(result.output)
    assert error.startswith("Error: ")
    assert message in error
    assert sorted(path.name for path in folder.iterdir() if path.suffix) == ["other.pt", "own_wrong.py"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", *PLAIN, "--params", "1"], "params=1 is out of reach"),
        (["plan", *PLAIN, "--params", "0.5", "--only", "weight"], "leaves no group that may change"),
        (["inspect", "own_wrong:images", "--input", "2x3x8x8"], "the graph fails at node '_2' on inputs of shapes"),
    ],
)
def test_what_cannot_be_done_ends_with_status_1(arguments: list[str], message: str, folder: Path) -> None:
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    (error,) = told(result.output)
    assert error.startswith("Error: ")
    assert message in error
