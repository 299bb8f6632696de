"""No resize of a finite network makes NaN or infinity, whatever the scale of its weights and their dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth import FxwidthError

Scales = tuple[float, float]

# The scales of the first and the second half of the layers: what one makes large the other makes small again.
SCALES: dict[torch.dtype, list[Scales]] = {
    torch.float64: [(1e100, 1e-100), (1e-100, 1e100), (1e-310, 1.0), (1e20, 1e-20), (0.0, 1.0), (1.0, 0.0)],
    torch.float32: [(1e20, 1e-20), (1e-20, 1e20), (1e30, 1e-30), (1e-30, 1e30), (1e-40, 1.0), (1.0, 1e-42), (0.0, 1.0)],
    torch.float16: [(1e3, 1e-3), (1e-4, 1e2), (1e-7, 1.0), (1.0, 0.0)],
    torch.bfloat16: [(1e20, 1e-20), (1e-30, 1e30), (1e-40, 1.0), (0.0, 0.0)],
}
CASES = [(dtype, scales) for dtype, every in SCALES.items() for scales in every]


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 3))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 8, 3), nn.ReLU(), nn.Conv1d(8, 10, 3), nn.BatchNorm1d(10), nn.ReLU(),
        nn.Flatten(), nn.Linear(20, 3),
    )  # fmt: skip


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 10), nn.RMSNorm(10), nn.Linear(10, 3))


def scaled(make: Callable[[], nn.Module], dtype: torch.dtype, scales: Scales) -> nn.Module:
    model = make().double().eval()
    layers = [layer for layer in model if isinstance(layer, (nn.Linear, nn.Conv1d))]
    with torch.no_grad():
        for place, layer in enumerate(layers):
            for tensor in layer.parameters():
                tensor.mul_(scales[place % 2])
    return model.to(dtype)


@pytest.mark.parametrize(("dtype", "scales"), CASES, ids=str)
@pytest.mark.parametrize("make", [dense, convolutional, normed])
def test_finite_stays_finite(make: Callable[[], nn.Module], dtype: torch.dtype, scales: Scales) -> None:
    model, x = scaled(make, dtype, scales), torch.randn(16, 6).to(dtype)
    with torch.no_grad():
        before = model(x)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    if not before.isfinite().all():
        pytest.skip("it overflows as it is")
    gm = fxwidth.trace(model, x)
    groups = fxwidth.analyze(gm).free
    steps = [(2, None), (-3, None), (1, None), (-2, [x])]
    for change, data in steps:
        for group in groups:
            width = fxwidth.analyze(gm)[group.name].width
            fxwidth.resize(gm, {group.name: width + change}, data=data, exact=False)
            assert all(t.isfinite().all() for t in gm.state_dict().values()), (group.name, change)
            with torch.no_grad():
                after = gm(x)
            assert after.isfinite().all(), (group.name, change)
            # A norm of zeros blows up what rounding makes of them.
            if (change, data) == steps[0] and group.inexact_growth is None and 0.0 not in scales:
                eps = torch.finfo(dtype).eps
                torch.testing.assert_close(after, before, rtol=50 * eps, atol=50 * eps * float(before.abs().max()))


def test_a_resize_that_would_write_infinity_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: growth that copies the norm of half precision's largest rows."""
    monkeypatch.setattr("fxwidth.growth.new_entries._bounded", lambda rows, dtype: rows * 1e30)
    gm = fxwidth.trace(dense().half().eval(), torch.randn(4, 6).half())
    state = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    with pytest.raises(FxwidthError, match=r"0\.weight would hold values that are not .* range of torch\.float16"):
        fxwidth.resize(gm, {"0": 12})
    assert all(torch.equal(tensor, state[name]) for name, tensor in gm.state_dict().items())


def test_what_a_dtype_cannot_hold_is_not_folded() -> None:
    """Readers of which a kept channel would have to speak for one ten million times as loud keep their weights."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)).eval()
    with torch.no_grad():
        model[0].weight[2:] = model[0].weight[:2] * 1e-4
        model[0].bias.zero_()
        model[1].weight[:, :2] = 60000.0
    x: Tensor = torch.randn(8, 6).half()
    gm = fxwidth.trace(model.half(), x)
    fxwidth.resize(gm, {"0": 2}, selection="magnitude")
    assert all(tensor.isfinite().all() for tensor in gm.state_dict().values())


def test_a_fold_beyond_the_range_is_reported() -> None:
    """A reader that would have to read one channel in the place of two, twice as loud."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)).eval()
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
        model[0].weight[2:], model[0].bias[2:] = model[0].weight[:2].clone(), model[0].bias[:2].clone()
        model[1].weight.fill_(60000.0)
    x = torch.randn(64, 6).half()
    gm = fxwidth.trace(model.half(), x)
    fxwidth.resize(gm, {"0": 2}, data=[x], rotate=False)
    assert bool((gm.get_submodule("1").weight == 60000).all())
    missed = fxwidth.report(gm).resizes[-1]["not_refitted"]
    assert missed == {"1.weight": "what it would take over is beyond the range of its dtype"}


@pytest.mark.parametrize("act", [nn.ReLU, lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))])
def test_squares_beyond_all_range_are_told_apart_from_infinity(act: Callable[[], nn.Module]) -> None:
    """What readers see is finite, and its second moments are not."""
    model = nn.Sequential(nn.Linear(6, 8), act(), nn.Linear(8, 3)).double().eval()
    with torch.no_grad():
        model[0].weight.mul_(1e200)
        model[2].weight.mul_(1e-200)
    x = torch.randn(16, 6).double()
    gm = fxwidth.trace(model, x)
    with pytest.raises(FxwidthError, match=r"are finite for these data, but so large that their squares .*magnitude"):
        fxwidth.resize(gm, {"0": 4}, data=[x])
    fxwidth.resize(gm, {"0": 6})
    assert "squares are beyond the range" in " ".join(fxwidth.report(gm).resizes[-1]["not_refitted"].values())
    fxwidth.resize(gm, {"0": 4}, data=[x], selection="magnitude", fold=False, recalibrate=False)
    with torch.no_grad():
        model[0].weight.mul_(1e108)
    with pytest.raises(FxwidthError, match=r"not finite"):
        fxwidth.resize(gm, {"0": 3}, data=[1e10 * x])
