"""Graphs that are converted or moved after they were traced: planned, resized, saved and loaded as any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import fxwidth


class Convolutions(nn.Module):
    """Convolutions with a norm that counts, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(torch.relu(self.bn(self.a(x))))).mean((2, 3)))


def network() -> nn.Module:
    torch.manual_seed(0)
    return Convolutions().eval()


def images() -> Tensor:
    return torch.linspace(-1, 1, 4 * 3 * 6 * 6).view(4, 3, 6, 6)


def program() -> nn.Module:
    dynamic = ({0: torch.export.Dim.AUTO},)
    return torch.export.export(network(), (images(),), dynamic_shapes=dynamic).module()


CONVERSIONS: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "double": (nn.Module.double, torch.float64),
    "half": (nn.Module.half, torch.float16),
    "bfloat16": (nn.Module.bfloat16, torch.bfloat16),
    "channels last": (lambda module: module.to(memory_format=torch.channels_last), torch.float32),
    "bfloat16, channels last": (
        lambda module: module.bfloat16().to(memory_format=torch.channels_last), torch.bfloat16,
    ),
}  # fmt: skip


# A program is read in seconds: one conversion that has all of it, and the others where there is time.
_ALL = "bfloat16, channels last"
_CASES = [(name, network) for name in CONVERSIONS] + [
    pytest.param(name, program, marks=() if name == _ALL else pytest.mark.slow) for name in CONVERSIONS
]


@pytest.mark.parametrize(("name", "source"), _CASES)
def test_a_converted_graph_is_planned_resized_and_saved(
    name: str, source: Callable[[], nn.Module], tmp_path: Path
) -> None:
    convert, dtype = CONVERSIONS[name]
    gm = fxwidth.trace(source(), images())
    convert(gm)
    fxwidth.resize(gm, fxwidth.plan(fxwidth.analyze(gm), params=0.6))
    x = images().to(dtype)
    wanted = gm(x)
    assert wanted.dtype == dtype
    path = tmp_path / "a.safetensors"
    fxwidth.save(gm, path)
    again = fxwidth.load(path, source, images())
    assert torch.equal(again(x), wanted)
    assert {name: one.stride() for name, one in again.state_dict().items()} == {
        name: one.stride() for name, one in gm.state_dict().items()
    }


@pytest.mark.parametrize("name", ["double", "bfloat16"])
def test_its_program_takes_what_it_takes(name: str, tmp_path: Path) -> None:
    convert, dtype = CONVERSIONS[name]
    gm = fxwidth.trace(network(), images())
    convert(gm)
    fxwidth.save(gm, tmp_path / "a.pt2")
    assert torch.equal(fxwidth.load(tmp_path / "a.pt2")(images().to(dtype)), gm(images().to(dtype)))


def test_a_graph_on_the_meta_device_is_resized() -> None:
    gm: fx.GraphModule = fxwidth.trace(network(), images()).to("meta")
    fxwidth.resize(gm, {"a": 5}, selection="magnitude")
    assert gm.get_parameter("a.weight").shape == (5, 3, 3, 3)


def test_a_model_that_casts_its_inputs_keeps_them() -> None:
    """Inputs that fit are left as they were noted, though no parameter is of their dtype."""

    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8, dtype=torch.bfloat16), nn.Linear(8, 2, dtype=torch.bfloat16)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x.to(torch.bfloat16))))

    gm = fxwidth.trace(Casting(), torch.randn(3, 4))
    fxwidth.resize(gm, {"a": 5}, selection="magnitude")
    assert {spec.dtype for spec in gm.meta["fxwidth_inputs"]} == {torch.float32}


def test_what_fails_for_other_reasons_is_told_as_before() -> None:
    gm = fxwidth.trace(network(), images())
    gm.get_submodule("b").weight = nn.Parameter(torch.zeros(6, 7, 3, 3))
    gm.double()
    with pytest.raises(fxwidth.FxwidthError, match="fails at node"):
        fxwidth.analyze(gm)
