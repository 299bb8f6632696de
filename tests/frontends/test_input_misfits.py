"""Inputs that a network cannot take are told with what it takes and an example, and that example is taken."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

import fxwidth
from fxwidth import FxwidthError
from fxwidth.frontends.input_misfits import misfit_of


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a(x) + self.a(y)


class Branching(nn.Module):
    """Nothing can trace it where it fails, so that its own fault is told."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return y if y.sum() > 0 else -y


def images() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def signals() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14, 4))


def rows() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def flattened() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4))


CASES: dict[str, tuple[Any, Tensor, tuple[int, ...]]] = {
    "an image": (images, torch.randn(3, 16, 16), (1, 3, 16, 16)),
    "an image with channels last": (images, torch.randn(16, 16, 3), (1, 3, 16, 16)),
    "channels last": (images, torch.randn(2, 16, 16, 3), (2, 3, 16, 16)),
    "grey images": (images, torch.randn(2, 1, 16, 16), (2, 3, 16, 16)),
    "sizes alone": (images, torch.randn(16, 16), (1, 3, 16, 16)),
    "one size": (images, torch.randn(16), (1, 3, 64, 64)),
    "a video": (images, torch.randn(2, 3, 16, 16, 5), (1, 3, 64, 64)),
    "bytes": (images, torch.zeros(2, 3, 16, 16, dtype=torch.uint8), (2, 3, 16, 16)),
    "numbers of NumPy": (images, torch.randn(2, 3, 16, 16, dtype=torch.float64), (2, 3, 16, 16)),
    "numbers of torch": (lambda: images().double(), torch.randn(2, 3, 16, 16), (2, 3, 16, 16)),
    "a signal": (signals, torch.randn(2, 16), (1, 2, 16)),
    "rows of another width": (rows, torch.randn(2, 9), (2, 8)),
    "sequences of another width": (rows, torch.randn(2, 5, 9), (2, 5, 8)),
    "a row of another width": (rows, torch.randn(9), (1, 8)),
    "fractions for words": (Words, torch.randn(2, 5), (2, 5)),
    "one layer": (lambda: nn.Linear(8, 4), torch.randn(2, 9), (2, 8)),
    "its own fault": (Branching, torch.randn(2, 9), (2, 8)),
}


# Under fake tensors it looks up fractions too, so that the model can be traced.
TAKEN_BY_OLDER_TORCH = {"fractions for words"} if torch.__version__ < TorchVersion("2.12") else set()


@pytest.mark.parametrize("name", sorted(CASES.keys() - TAKEN_BY_OLDER_TORCH))
def test_what_is_taken_is_told_and_the_example_is_taken(name: str) -> None:
    make, given, shape = CASES[name]
    model = make()
    with pytest.raises(FxwidthError) as caught:
        fxwidth.trace(model, given)
    told = str(caught.value)
    assert f"he input has shape {tuple(given.shape)}" in told
    assert re.search(r"but the first layer, \w+( '\w+')?, takes .+: pass (example_)?inputs such as torch\.", told)
    found = misfit_of(model, [given])
    assert found is not None
    assert found.shape == shape
    assert found.example in told
    example = eval(found.example)
    assert tuple(example.shape) == shape
    assert fxwidth.trace(model, example)(example).shape[0] == shape[0]
    assert misfit_of(model, [example]) is None


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (images, torch.randn(2, 3, 16, 16)),
        (rows, torch.randn(2, 8)),
        (rows, torch.randn(2, 5, 8)),
        (flattened, torch.randn(2, 3, 4)),
        (flattened, torch.randn(2, 12)),
        (Words, torch.zeros(2, 5, dtype=torch.int32)),
    ],
)
def test_nothing_is_amiss_with_what_is_taken(make: Any, given: Tensor) -> None:
    assert misfit_of(make(), [given]) is None
    assert misfit_of(fxwidth.trace(make(), given), [given]) is None


def test_of_a_graph_the_layer_that_reads_an_input_counts() -> None:
    class Late(nn.Module):
        """The layer that is registered first comes last."""

        def __init__(self) -> None:
            super().__init__()
            self.head, self.stem = nn.Linear(4, 2), nn.Conv1d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stem(x).mean(-1))

    with pytest.raises(FxwidthError, match=r"the first layer, Conv1d 'stem', takes \(batch, 3, length\)"):
        fxwidth.trace(Late(), torch.randn(2, 5, 7))


def test_inputs_that_fit_the_first_layer_are_told_as_before() -> None:
    with pytest.raises(FxwidthError, match=r"the graph fails at node '_3' on inputs of shapes .* Pass example_inputs"):
        fxwidth.trace(signals(), torch.randn(2, 2, 40))


X = torch.randn(4, 3, 16, 16)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ((X, torch.arange(4)), "int64 of shape (4,)"),
        ((X, torch.rand(4, 10)), "float32 of shape (4, 10)"),
        ((X, 3), "3"),
        ((X, "cat"), "'cat'"),
        ((X, [1, 0, 2, 2]), "a list of 4"),
    ],
)
def test_labels_beside_images_are_told(given: Any, shown: str) -> None:
    gm = fxwidth.trace(images(), X)
    told = f"takes 1 argument (input), but example_inputs is a pair, of which the second, {shown}, looks like labels: "
    for call in (
        lambda: fxwidth.trace(images(), given),
        lambda: fxwidth.evolve(images(), given, params=0.5),
        lambda: fxwidth.analyze(gm, given),
    ):
        with pytest.raises(FxwidthError, match=re.escape(told + "pass the images alone, example_inputs=images.")):
            call()


@pytest.mark.parametrize("given", [[X, torch.arange(4)], [X, torch.rand(4)]])
def test_a_batch_of_a_loader_is_told(given: Any) -> None:
    expected = r"its second entry, .*, looks like labels: pass the inputs alone, example_inputs=batch\[0\]"
    gm = fxwidth.trace(images(), X)
    for call in (lambda: fxwidth.trace(images(), given), lambda: fxwidth.analyze(gm, given)):
        with pytest.raises(FxwidthError, match=expected) as caught:
            call()
        assert str(caught.value).count("labels") == 1


def test_other_inputs_too_many_are_no_labels() -> None:
    with pytest.raises(FxwidthError, match=r"the model takes 1 inputs \(input\), but example_inputs has 2: too many"):
        fxwidth.trace(images(), (X, X))
    rows_of_pairs = torch.randn(4, 8)
    with pytest.raises(FxwidthError, match=r"Pair.forward takes 2 arguments \(x, y\), .*: pass the first 2 alone"):
        fxwidth.trace(Pair(), (rows_of_pairs, rows_of_pairs, torch.arange(4)))
    # What a model takes is no fault.
    fxwidth.trace(Pair(), (rows_of_pairs, rows_of_pairs))
