"""What is told of data in a form that a graph does not take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth import FxwidthError


class OfDict(nn.Module):
    """A model whose one input is a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 10)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return scores, [n, 10]."""
        return self.b(self.a(batch["image"]).relu())


def test_of_a_dict_that_is_an_input_it_is_told_what_to_do() -> None:
    x, y = torch.randn(16, 8), torch.arange(16) % 10
    with pytest.raises(FxwidthError, match=r"is itself the one input, 'batch', wrap it: \(\{'image': \.\.\., 'label'"):
        fxwidth.trace(OfDict(), {"image": x, "label": y})
    graph = fxwidth.analyze(fxwidth.trace(OfDict(), ({"image": x},)))
    for batch in ({"image": x, "label": y}, ({"image": x, "label": y},)):
        with pytest.raises(FxwidthError, match=r"'batch' is itself a dict, of \['image'\]: leave \['label'\] out"):
            fxwidth.plan(graph, params=0.5, data=[batch])
    assert fxwidth.plan(graph, params=0.5, data=[({"image": x}, y)]).widths


@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x, torch.ones(16)), lambda x: {"input": x}])
def test_arrays_and_what_has_no_values_are_refused(form: Any) -> None:
    x = torch.randn(16, 8)
    graph = fxwidth.analyze(fxwidth.trace(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)), x))
    with pytest.raises(FxwidthError, match=r"batch 0 of data holds a numpy array.*torch\.from_numpy"):
        fxwidth.plan(graph, params=0.5, data=[form(x.numpy())])
    with pytest.raises(FxwidthError, match="is on the meta device"):
        fxwidth.plan(graph, params=0.5, data=[form(x.to("meta"))])
