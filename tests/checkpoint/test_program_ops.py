"""Ops of programs that nobody vouches for: those that take strides, lengths and sizes as they are are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth import FxwidthError
from fxwidth.checkpoint.program_ops import _CHECKING, _UNCHECKED
from tests.oracles import files


def argument(name: str, kind: str, value: Any) -> dict[str, Any]:
    return {"name": name, "arg": {kind: value}, "kind": 1}


def with_call(path: Path, op: str, *more: dict[str, Any]) -> None:
    """Write a program whose first activation is replaced by another op."""
    fxwidth.save(fxwidth.trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU()).eval(), torch.randn(2, 4)), path)

    def change(told: dict[str, Any]) -> None:
        node = next(node for node in files._nodes(told) if "relu" in node["target"])
        node.update(target=f"torch.ops.{op}", inputs=[node["inputs"][0], *more])

    files._with_entries(path, change)


CALLS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "strides that nobody checks": (
        "aten._reshape_alias.default",
        [argument("size", "as_ints", [2, 8]), argument("stride", "as_ints", [10**6, 1])],
    ),
    "other memory": ("aten.set_.source_Tensor", [argument("source", "as_tensor", {"name": "x"})]),
    "a sparse tensor": ("aten._sparse_coo_tensor_unsafe.default", []),
    "packed weights": ("aten.fbgemm_linear_int8_weight.default", []),
    "a backward pass": ("aten.embedding_dense_backward.default", [argument("num_weights", "as_int", 3)]),
    "a kernel of another": ("aten.native_batch_norm.default", []),
    "sizes that overflow": ("aten.view.default", [argument("size", "as_ints", [2**40, 2**40])]),
    "a scale that overflows": (
        "aten._upsample_bilinear2d_aa.default",
        [argument("output_size", "as_ints", [7, 7]), argument("scales_h", "as_float", 1e-10)],
    ),
    "lengths that nobody checks": ("aten.segment_reduce.default", [argument("unsafe", "as_bool", True)]),
    "boxes of other images": ("torchvision.roi_align.default", []),
    "no op at all": ("aten.no_such_op.default", []),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_may_reach_other_memory_needs_trust(name: str, tmp_path: Path) -> None:
    op, more = CALLS[name]
    with_call(tmp_path / "a.pt2", op, *more)
    with pytest.raises(FxwidthError, match=rf"a\.pt2 may run code: .*{op}'.* memory .* trusted=True"):
        fxwidth.load(tmp_path / "a.pt2")


def test_what_is_trusted_is_loaded(tmp_path: Path) -> None:
    strides = argument("size", "as_ints", [2, 8]), argument("stride", "as_ints", [8, 1])
    with_call(tmp_path / "a.pt2", "aten._reshape_alias.default", *strides)
    x = torch.randn(2, 4)
    gm = fxwidth.load(tmp_path / "a.pt2", trusted=True)
    assert torch.equal(gm(x), nn.functional.linear(x, *gm.parameters()))


def test_the_checked_form_of_a_view_checks() -> None:
    """Of what is let through, this one takes strides."""
    for sizes in (((2, 8), (10**6, 1), 0), ((2,), (1,), 10**6), ((2,), (-1,), 0)):
        with pytest.raises(RuntimeError):
            torch.as_strided(torch.zeros(4), *sizes)


def test_the_names_are_those_of_ops() -> None:
    known = {name: any(hasattr(getattr(torch.ops, one), name) for one in ("aten", "prims")) for name in _CHECKING}
    # In place alone.
    assert {name for name, is_op in known.items() if not is_op} <= {"fill_diagonal"}
    assert not _CHECKING & _UNCHECKED


class Recurrent(nn.Module):
    """Has a layer that is an op by itself, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.inner, self.norm = nn.Linear(4, 6), nn.GRU(6, 5, batch_first=True), nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.inner(torch.relu(self.a(x)))
        return torch.softmax(self.norm(hidden).flatten(1), -1).clamp_min(0.0)


class Images(nn.Module):
    """Scales, pads and pools images."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ConvTranspose2d(8, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.interpolate(self.norm(self.a(x)), scale_factor=2, mode="bilinear")
        x = nn.functional.pad(nn.functional.max_pool2d(x, 2), (1, 1, 1, 1), mode="reflect")
        return self.b(nn.functional.adaptive_avg_pool2d(x, 3)).mean((2, 3))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "recurrent": (Recurrent, (3, 7, 4)),
    "images": (Images, (3, 3, 8, 8)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_saved_is_loaded_without_trust(name: str, tmp_path: Path) -> None:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    gm = fxwidth.trace(make().double().eval(), x)
    fxwidth.save(gm, tmp_path / "a.pt2")
    torch.testing.assert_close(fxwidth.load(tmp_path / "a.pt2")(x), gm(x), rtol=1e-12, atol=1e-12)


class Bags(nn.Module):
    """Is made of kernels that take lengths as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.a = nn.EmbeddingBag(9, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(torch.relu(self.words(x)))


def test_own_layers_that_do_not_check_come_back_with_trust(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.arange(12).view(3, 4) % 9
    gm = fxwidth.trace(Bags().double().eval(), x)
    fxwidth.save(gm, tmp_path / "a.pt2")
    with pytest.raises(FxwidthError, match=r"embedding_bag.*trusted=True"):
        fxwidth.load(tmp_path / "a.pt2")
    assert torch.equal(fxwidth.load(tmp_path / "a.pt2", trusted=True)(x), gm(x))
