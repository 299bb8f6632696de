"""The same promises where the tensors are on a GPU; skipped without one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxwidth
from fxwidth.verification.replay_oracle import replay_difference
from tests.oracles.judges import random_maps
from tests.resizing.test_resize import growth_plan, train_a_step, widths
from tests.rules.test_recurrent import build as recurrent
from tests.rules.test_recurrent import sequences
from tests.zoo.models import SMALL, build, relative_difference

pytestmark = pytest.mark.gpu


class CopiesToCPU(TorchDispatchMode):
    """Notes tensors of more than a few numbers that leave the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        source = args[0] if args else None
        if isinstance(source, torch.Tensor) and not isinstance(source, torch._subclasses.FakeTensor):
            leaves = source.is_cuda and isinstance(result, torch.Tensor) and result.device.type == "cpu"
            if leaves and source.is_floating_point() and source.numel() > 1:
                self.found.append((str(func), source.numel()))
        return result


@pytest.mark.parametrize("name", SMALL)
def test_growth_and_shrinking_where_the_tensors_are(name: str) -> None:
    model, x = build(name)
    gm, x = fxwidth.trace(model.cuda(), x.cuda()), x.cuda()
    before = gm(x)
    plan = growth_plan(fxwidth.analyze(gm))
    old = widths(gm, plan)
    with CopiesToCPU() as copies:
        fxwidth.resize(gm, plan)
        assert relative_difference(gm(x), before) < 1e-10
        fxwidth.resize(gm, old)
    assert relative_difference(gm(x), before) < 1e-10
    assert copies.found == []
    assert all(tensor.is_cuda for tensor in [*gm.parameters(), *gm.buffers()])


@pytest.mark.parametrize("name", ["lstm, projected, both directions", "gru, given state", "rnn, three layers"])
def test_recurrent_layers_where_the_tensors_are(name: str) -> None:
    gm, x = fxwidth.trace(recurrent(name).double().cuda().eval(), sequences().cuda()), sequences().cuda()
    before = gm(x)
    wg = fxwidth.analyze(gm)
    assert any(call.name.startswith("_thnn_fused") for call in wg.analysis.calls) is ("rnn" not in name)
    assert replay_difference(wg.analysis, random_maps(wg.analysis, 0.5), [x]) < 1e-9
    old = {group.name: group.width for group in wg.free}
    fxwidth.resize(gm, {group: width + 3 for group, width in old.items()})
    assert relative_difference(gm(x), before) < 1e-10
    fxwidth.resize(gm, old)
    assert relative_difference(gm(x), before) < 1e-10
    fxwidth.resize(gm, {group: width // 2 for group, width in old.items()}, data=[x])
    assert gm.layer.hidden_size == 6
    train_a_step(gm, x)


def test_training_goes_on_after_halving() -> None:
    model, x = build("resnet18", torch.float32)
    gm, x = fxwidth.trace(model.cuda(), x.cuda()), x.cuda()
    optimizer = torch.optim.AdamW(gm.parameters())
    fxwidth.resize(
        gm, {group.name: group.width // 2 for group in fxwidth.analyze(gm).free}, optimizer=optimizer, data=[x]
    )
    train_a_step(gm, x)


@pytest.mark.parametrize("compiled", [False, True])
def test_evolver_on_the_gpu(compiled: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3)).cuda()
    x, y = torch.randn(64, 8, device="cuda"), torch.randint(0, 3, (64,), device="cuda")
    gm = fxwidth.trace(model, x)
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-3)
    evolver = fxwidth.Evolver(gm, optimizer, every=5, params=500, rounds=2)
    forward = torch.compile(gm) if compiled else gm
    for _ in range(15):
        nn.functional.cross_entropy(forward(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if evolver.step(x) is not None and compiled:
            torch.compiler.reset()
            forward = torch.compile(gm)
    assert evolver.finished
    assert sum(p.numel() for p in gm.parameters()) <= 500
