"""Each row of the guide for those who come from Torch-Pruning runs: our column always, theirs where it is installed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxwidth

PAGE = Path(__file__).parents[1] / "docs/guides/torch-pruning.md"


class Net(nn.Module):
    """A convolution, a batch norm, a parameter by itself, and a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
        self.scale, self.fc = nn.Parameter(torch.ones(1, 8, 1, 1)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.norm(self.conv1(x)).relu()) * self.scale
        return self.fc(x.relu().mean((2, 3)))  # type: ignore[no-any-return]


def _rows() -> list[tuple[list[str], list[str]]]:
    """Return what stands in code in both cells of each row."""
    cells = re.findall(r"^\| (`.*) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [(re.findall(r"`([^`]+)`", theirs), re.findall(r"`([^`]+)`", ours)) for theirs, ours in cells]


ROWS = _rows()


# It warns of the parameter by itself, which two of the rows are about.
pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")


def _made() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def _names(tmp_path: Path, ending: str = "safetensors") -> dict[str, Any]:
    model, example_inputs = _made(), torch.randn(2, 3, 8, 8)
    gm = fxwidth.trace(model, example_inputs)
    return {
        "torch": torch,
        "fxwidth": fxwidth,
        "model": model,
        "make_model": _made,
        "example_inputs": example_inputs,
        "gm": gm,
        "wg": fxwidth.analyze(gm),
        "optimizer": torch.optim.SGD(gm.parameters(), lr=0.1),
        "batches": [(torch.randn(64, 3, 8, 8), torch.randint(0, 4, (64,)))],
        "loss": nn.functional.cross_entropy,
        "path": str(tmp_path / f"net.{ending}"),
    }


def _is_option(code: str) -> bool:
    return re.match(r"\w+=", code) is not None


def test_the_table_is_read() -> None:
    assert len(ROWS) == 15
    assert sum(bool(ours) for _, ours in ROWS) >= 12


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][0][:40])
def test_our_column_runs(row: tuple[list[str], list[str]], tmp_path: Path) -> None:
    names = _names(tmp_path)
    for code in row[1]:
        if _is_option(code):
            plan = eval(f"fxwidth.plan(wg, params=0.6, {code})", names)
            assert plan
            if code.startswith("selection"):
                fresh = {**names, "gm": fxwidth.trace(_made(), names["example_inputs"]), "plan": dict(plan)}
                eval(f"fxwidth.resize(gm, plan, {code}, fold=False)", fresh)
        else:
            assert eval(code, names) is not None or code.startswith("fxwidth.save")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][0][:40])
def test_their_column_runs(row: tuple[list[str], list[str]], tmp_path: Path) -> None:
    tp = pytest.importorskip("torch_pruning")
    names = {**_names(tmp_path, "pt"), "tp": tp}
    model = names["model"] = _made()
    graph = names["DG"] = tp.DependencyGraph().build_dependency(model, names["example_inputs"])
    names["group"] = graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, idxs=[0, 2])
    names["importance"] = tp.importance.GroupMagnitudeImportance()
    for code in row[0]:
        if _is_option(code):
            given = "" if code.startswith("unwrapped") else ", unwrapped_parameters=[(model.scale, 1)]"
            eval(
                f"tp.pruner.MagnitudePruner(model, example_inputs, importance, pruning_ratio=0.5{given}, {code})", names
            )
        else:
            answer = eval(code, names)
            assert answer is not None or ".step()" in code or ".prune()" in code or ".save(" in code


def test_groups_removals_and_costs_are_the_same(tmp_path: Path) -> None:
    tp = pytest.importorskip("torch_pruning")
    ours, theirs = _names(tmp_path), _made()
    graph = tp.DependencyGraph().build_dependency(theirs, ours["example_inputs"])
    group = graph.get_pruning_group(theirs.conv1, tp.prune_conv_out_channels, idxs=[0, 2])
    layers = {
        one.dep.target.name.split(" ")[0] for one in group if "elementwise" not in str(one.dep.target.name).lower()
    }
    assert layers == {site.parameter.rpartition(".")[0] for site in ours["wg"]["conv1"].sites}
    group.prune()
    fxwidth.resize(ours["gm"], {"conv1": [1, 3, 4, 5, 6, 7]}, fold=False)
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(ours["gm"](x), theirs(x))
    _, parameters = tp.utils.count_ops_and_params(theirs, ours["example_inputs"])
    assert fxwidth.cost(fxwidth.analyze(ours["gm"])).params == parameters
