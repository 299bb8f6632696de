"""What is told of the model that was traced, after widths were written back to it or to another one."""

import copy

import pytest
import torch
from torch import nn

import fxwidth


class Written(nn.Module):
    """Knows a size in its own code, which a resize of its graph does not change."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.h = nn.Linear(4, 12), nn.Linear(6, 3), 6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.relu(self.a(x)).view(x.shape[0], 2, self.h).mean(1))


_X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def _resized(net: nn.Module) -> torch.fx.GraphModule:
    gm = fxwidth.trace(net, _X)
    return fxwidth.resize(gm, {next(group.name for group in fxwidth.analyze(gm).free if group.width == 6): 3})


def _original(of: object) -> str | None:
    return fxwidth.report(of).resizes[0]["original"]


def test_evolve_says_that_the_model_itself_was_resized():
    net = Written()
    assert fxwidth.evolve(net, _X, params=0.6, output="module") is net
    assert "the traced model resized by writing back" in str(fxwidth.report(net))
    assert "left as it was" not in str(fxwidth.report(net))


def test_a_model_that_was_left_is_told_of_as_resized_once_it_is_written_to():
    net, other = Written(), Written()
    gm = _resized(net)
    before = fxwidth.report(gm)
    fxwidth.write_back(gm, other)
    assert (_original(gm), _original(other)) == ("untouched", "untouched")
    fxwidth.write_back(gm, net)
    assert (_original(gm), _original(net)) == ("written back", "written back")
    assert "the traced model left as it was" in str(before)


@pytest.mark.parametrize("is_parted", [False, True])
def test_of_a_copied_pair_nothing_wrong_is_told(is_parted):
    net = Written()
    gm = _resized(net) if is_parted else fxwidth.trace(net, _X)
    net, gm = copy.deepcopy((net, gm))
    if not is_parted:
        fxwidth.resize(gm, {next(group.name for group in fxwidth.analyze(gm).free if group.width == 6): 3})
    assert _original(gm) == "untouched"
    fxwidth.write_back(gm, net)
    assert _original(net) == (None if is_parted else "written back")
