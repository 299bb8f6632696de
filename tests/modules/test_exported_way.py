"""A class of which the graph is what it does when it is exported."""

import pytest
import torch
from torch import nn

import fxwidth
from fxwidth.modules.exported_answers import answering_as_exported


class TwoWays(nn.Module):
    """What it does by itself no tracer follows, and it runs at even widths alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.least = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        if torch.compiler.is_exporting():
            return self.last(y.relu())
        if y.shape[1] % 2:
            raise ValueError("an odd width")
        return self.last(torch.from_numpy(y.detach().numpy().clip(self.least)))


def _traced() -> tuple[nn.Module, torch.fx.GraphModule]:
    torch.manual_seed(0)
    model = TwoWays().double().eval()
    with pytest.warns(fxwidth.FxwidthWarning, match="when it is exported"):
        return model, fxwidth.trace(model, torch.randn(3, 6, dtype=torch.float64))


def test_it_is_compared_on_that_way_and_by_values_on_its_own():
    model, gm = _traced()
    plan = fxwidth.plan(fxwidth.analyze(gm), params=0.6, for_module=model)
    fxwidth.write_back(fxwidth.resize(gm, plan), model)
    x = torch.randn(4, 6, dtype=torch.float64)
    assert model.first.out_features < 16
    assert torch.allclose(model(x), gm(x), rtol=0, atol=1e-12)


def test_other_values_on_its_own_way_are_refused():
    model, gm = _traced()
    model.least = 0.1
    with pytest.raises(fxwidth.FxwidthError, match="differ by"):
        fxwidth.write_back(fxwidth.resize(gm, {"first": 8}), model)


def test_a_plan_keeps_to_the_widths_at_which_its_own_way_runs():
    model, gm = _traced()
    graph = fxwidth.analyze(gm)
    with pytest.raises(fxwidth.FxwidthError, match="an odd width"):
        fxwidth.plan(graph, min_width=9, max_width=9, shrink_energy=0, for_module=model)
    plan = fxwidth.plan(graph, max_width=9, shrink_energy=0, for_module=model)
    assert plan.widths["first"] % 2 == 0


def test_questions_are_answered_so_for_a_while_and_to_code_outside_of_torch():
    found = []

    def ask_and_end():
        with answering_as_exported():
            found.extend([torch.compiler.is_exporting(), torch.compiler.is_compiling()])
            found.append(torch.fx._symbolic_trace.is_fx_tracing())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask_and_end()
    assert found == [True, True, False]
    assert not torch.compiler.is_exporting()
    assert not torch.compiler.is_compiling()
