"""The examples run, and train what they evolve."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD

YOLO = """
nc: 1
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, C2f, [32, True]]
  - [-1, 1, Conv, [48, 3, 2]]
  - [-1, 1, C2f, [48, True]]
head:
  - [[2, 4], 1, Detect, [nc]]
"""


def small_detector(folder: Path) -> nn.Module:
    layers = [
        layer
        for read, write in ((3, 16), (16, 32), (32, 48))
        for layer in (nn.Conv2d(read, write, 3, stride=2, padding=1), nn.BatchNorm2d(write), nn.ReLU())
    ]
    return SSD(nn.Sequential(*layers), DefaultBoxGenerator([[2]], scales=[0.3, 0.6]), (96, 96), 2)


def small_yolo(folder: Path) -> str:
    file = folder / "small.yaml"
    file.write_text(YOLO)
    return str(file)


EXAMPLES = Path(__file__).parent.parent / "examples"
# How long each is run, and what it must reach then.
CASES: dict[str, tuple[int, Any]] = {
    "plain_loop": (3, lambda accuracy: accuracy > 0.6),
    "lightning_loop": (3, lambda accuracy: accuracy > 0.6),
    "transformers_trainer": (60, lambda loss: loss < 1.5),
    "timm_model": (3, lambda accuracy: accuracy > 0.8),
    "language_model": (150, lambda accuracy: accuracy > 0.7),
    "detector": (30, lambda share: share < 1),
    "ultralytics_detector": (40, lambda share: share < 1),
    "deploy_exported": (7, lambda difference: difference < 1e-6),
    "deploy_inductor": (7, lambda difference: difference < 1e-6),
    "deploy_onnx": (7, lambda difference: difference < 1e-6),
    "deploy_quantized": (7, lambda share: share < 0.05),
}
# What stands for a network that would take minutes.
SMALL: dict[str, tuple[Callable[[Path], Any], ...]] = {
    "detector": (small_detector,),
    "ultralytics_detector": (small_yolo,),
}
NEEDED = {
    "lightning_loop": ("lightning",),
    "transformers_trainer": ("transformers", "accelerate"),
    "language_model": ("transformers",),
    "timm_model": ("timm",),
    "ultralytics_detector": ("ultralytics",),
    "deploy_onnx": ("onnx", "onnxscript", "onnxruntime"),
    "deploy_quantized": ("torchao",),
}
# Of the first a compiler makes programs, which takes it as long as the others take together; of the last a guide has a
# smaller one.
LONG = {"deploy_inductor", "ultralytics_detector", "language_model"}


def test_every_example_has_a_case() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(CASES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in CASES])
def test_it_runs(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # ultralytics writes its settings when it is imported, and asks for updates.
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    for package in NEEDED.get(name, ()):
        pytest.importorskip(package, reason=f"pip install {package}, which fxwidth[test] or fxwidth[deploy] holds")
    if name == "deploy_inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler, such as g++")
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    length, good = CASES[name]
    assert good(module.main(length, *(small(tmp_path) for small in SMALL.get(name, ()))))
    assert "parameters" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_showed(path: Path, tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(path, 4)
    kept = [kinds_of(cell) for cell in notebook.cells]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    assert [kinds_of(cell) for cell in notebook.cells] == kept
    assert sum("image/png" in kinds for kinds in kept) >= 2


def kinds_of(cell: Any) -> list[str]:
    """Return what a cell has put out, by kind; warnings are none of it."""
    outputs = [output for output in cell.get("outputs", ()) if output.output_type != "stream"]
    assert all(output.output_type != "error" for output in outputs)
    return sorted(kind for output in outputs for kind in output.data)
