"""Programs of `torch.export`: without the code of the model a graph that does the same, and can be resized again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn

import fxwidth
from fxwidth import FxwidthError
from fxwidth.runtime.pytrees import deep_tensors
from tests.oracles import files
from tests.zoo.models import RMSTransformer


class Pair(nn.Module):
    """Takes an argument that may be left out, and returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(6, 12), nn.Linear(12, 3), nn.Dropout(0.5)

    def forward(self, x: Tensor, shift: Tensor | None = None, scale: float = 2.0) -> dict[str, Any]:
        hidden = torch.relu(self.up(x)) * scale
        hidden = hidden if shift is None else hidden + shift
        return {"out": self.down(self.drop(hidden)), "parts": [hidden.sum(1), None]}


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2)
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "norms": (files.network, (5, 6)),
    "an argument left out": (Pair, (5, 6)),
    "attention": (RMSTransformer, (5, 4, 10)),
    "convolutions": (convolutions, (5, 3, 8, 8)),
}


def halved(name: str) -> tuple[fx.GraphModule, Tensor]:
    make, shape = NETWORKS[name]
    x = torch.randn(shape)
    gm = fxwidth.trace(make().eval(), x)
    fxwidth.resize(gm, {group.name: max(2, group.width // 2) for group in fxwidth.analyze(gm).free})
    return gm, x


@pytest.mark.parametrize("name", NETWORKS)
def test_a_program_is_the_same_graph_and_can_be_resized(name: str, tmp_path: Path) -> None:
    gm, x = halved(name)
    fxwidth.save(gm, tmp_path / "a.pt2")
    again = fxwidth.load(tmp_path / "a.pt2")
    for batch in (x, x[:2], torch.cat([x, x]), x[:1]):
        one, other = gm(batch), again(batch)
        assert type(one) is type(other)
        assert all(map(torch.equal, deep_tensors(one), deep_tensors(other)))
    assert [record["widths"] for record in fxwidth.report(again).resizes] == [
        record["widths"] for record in fxwidth.report(gm).resizes
    ]
    assert again.state_dict().keys() == gm.state_dict().keys()
    groups = {group.name: group.width for group in fxwidth.analyze(again).free}
    assert groups == {group.name: group.width for group in fxwidth.analyze(gm).free}
    for module in (gm, again):
        fxwidth.resize(module, {name: width + 1 for name, width in groups.items()}, exact=False)
    for one, other in zip(deep_tensors(gm(x)), deep_tensors(again(x)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    # What was resized since is saved as tensors, for the program as the model.
    fxwidth.save(again, tmp_path / "b.safetensors")
    last = fxwidth.load(tmp_path / "b.safetensors", fxwidth.load(tmp_path / "a.pt2"))
    assert all(map(torch.equal, deep_tensors(last(x)), deep_tensors(again(x))))
    assert len(fxwidth.report(last).resizes) == 2


def test_another_form_of_call_is_refused(tmp_path: Path) -> None:
    gm, x = halved("an argument left out")
    fxwidth.save(gm, tmp_path / "a.pt2")
    again = fxwidth.load(tmp_path / "a.pt2")
    with pytest.raises(FxwidthError, match="argument 'shift'"):
        again(x, torch.ones(6))


def test_the_mode_is_that_in_which_it_was_saved(tmp_path: Path) -> None:
    gm, x = halved("an argument left out")
    fxwidth.save(gm, tmp_path / "eval.pt2")
    again = fxwidth.load(tmp_path / "eval.pt2").train()
    assert torch.equal(again(x)["out"], gm(x)["out"])
    fxwidth.save(gm.train(), tmp_path / "train.pt2")
    again = fxwidth.load(tmp_path / "train.pt2").eval()
    assert not torch.equal(again(x)["out"], again(x)["out"])


class Answer(NamedTuple):
    """What only code can make."""

    value: Tensor


class Numbers(nn.Module):
    """Looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h[h.sum(1) > 0])


def test_what_torch_cannot_export_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gm, _ = halved("norms")

    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("no such op\nmore")

    monkeypatch.setattr(torch.export, "export", failing)
    with pytest.raises(FxwidthError, match=r"torch\.export cannot write this graph: no such op\. Save to a path that"):
        fxwidth.save(gm, tmp_path / "a.pt2")
    assert not list(tmp_path.iterdir())


def test_a_program_of_someone_else_is_refused(tmp_path: Path) -> None:
    program = torch.export.export(files.network(), (files.inputs(),))
    torch.export.save(program, tmp_path / "a.pt2")
    with pytest.raises(FxwidthError, match=r"it is no archive of fxwidth\.save.*[(]torch\.export\.load reads"):
        fxwidth.load(tmp_path / "a.pt2")


def test_other_tools_read_it(tmp_path: Path) -> None:
    gm, x = halved("norms")
    fxwidth.save(gm, tmp_path / "a.pt2")
    assert torch.equal(torch.export.load(tmp_path / "a.pt2").module()(x), gm(x))
