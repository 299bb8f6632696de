"""Networks that are trained for quantization: weights rounded row by row, and extremes that are observed meanwhile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    FusedMovingAvgObsFakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
)
from torch.nn import functional as F

import fxwidth
from fxwidth.analysis.roles import Role
from tests.oracles.values import copy_halves


class Observed(nn.Module):
    """A layer of which the weight's rows and the results are rounded by extremes of what has been seen."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(5, 8), nn.Linear(8, 3)
        self.rows = FusedMovingAvgObsFakeQuantize(
            observer=MovingAveragePerChannelMinMaxObserver,
            quant_min=-128,
            quant_max=127,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        )
        self.results = FusedMovingAvgObsFakeQuantize(
            observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8
        )

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.rows(self.into.weight), self.into.bias)
        return self.out(self.results(torch.relu(h)))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize("observes", [True, False])
def test_what_is_observed_of_rows_goes_with_them(observes: bool) -> None:
    torch.manual_seed(0)
    model, x = Observed(), torch.randn(32, 5)
    model(x)
    if not observes:
        for part in (model.rows, model.results):
            part.disable_observer()
    gm = fxwidth.trace(model.eval(), x)
    wg = fxwidth.analyze(gm)
    (group,) = wg.free
    assert {site.parameter for site in group.sites_as(Role.WRITER)} >= {"into.weight", "into.bias"}
    assert {site.parameter for site in group.sites_as(Role.READER)} == {"out.weight"}
    copy_halves(wg, group)
    with torch.no_grad():
        gm(x)
        before = gm(x)
        fxwidth.resize(gm, {group.name: 4}, data=[torch.randn(64, 5) for _ in range(4)], rotate=False)
        assert gm.get_submodule("rows").scale.shape == (4,)
        # The extremes that are observed go on to move a little.
        assert (gm(x) - before).abs().max() < (0.02 if observes else 1e-5)


def test_observers_of_a_prepared_graph_survive_a_resize() -> None:
    pytest.importorskip("torchao")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3)).eval(), torch.randn(32, 5)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(program.module(), quantizer)
    prepared(x)
    observed = {name: buffer.clone() for name, buffer in prepared.named_buffers()}
    gm = fxwidth.resize(fxwidth.trace(prepared, x), {"0": 7})
    for name, buffer in gm.named_buffers():
        if buffer.shape == observed[name].shape:
            assert torch.equal(buffer, observed[name]), f"{name} has seen what is not the user's"
    sizes = {tuple(one.min_val.shape) for one in gm.modules() if hasattr(one, "min_val")}
    assert sizes == {(), (7,), (3,)}
    before = gm(x)
    torch.testing.assert_close(convert_pt2e(gm)(x), before, rtol=0.1, atol=0.03)
