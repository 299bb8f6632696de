"""How many matrices of the size of a wide group are held at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import fxwidth

WIDTH = 1024
MATRIX = 4 * WIDTH * WIDTH  # bytes, in float32


class Held(TorchDispatchMode):
    """Counts the bytes of large tensors that are alive after each op, and keeps the most."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one op."""
        result = func(*args, **(kwargs or {}))
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        for tensor in tree_iter(result):
            if type(tensor) is Tensor and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage.nbytes() > MATRIX // 16:
                    self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, sum(size for _, size in self._alive.values()))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "most"), [(0, 7), (512, 9.5)])
def test_a_wide_group_takes_a_few_matrices_of_its_size(dtype: torch.dtype, rows: int, most: float) -> None:
    """Two are its covariance, in float64; three are S, D and what is left of S.

    With data two more are the covariance of noise, whose rows come to a few matrices at this width.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 64)).to(dtype).eval()
    x = torch.randn(max(2, rows), 64).to(dtype)
    gm = fxwidth.trace(net, x[:2])
    with Held() as held:
        fxwidth.evolve(gm, params=0.5, data=[x] if rows else None)
    assert gm(x).shape == x.shape
    assert 4 < held.most / MATRIX < most
