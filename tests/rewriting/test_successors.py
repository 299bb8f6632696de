"""What a parameter is besides its values goes over to the one that takes its place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxwidth
from tests.oracles.interruptions import differences, state_of


class Tagged(nn.Parameter):
    """A parameter of a class of its own."""


class Marked(Tensor):
    """A buffer of a class of its own."""


class Net(nn.Module):
    """A convolution, a parameter and a buffer of classes of their own, and a layer that reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.scale = Tagged(torch.rand(8, 1, 1) + 0.5)
        self.register_buffer("shift", torch.randn(8, 1, 1).as_subclass(Marked))
        self.read = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(torch.relu(self.conv(x) * self.scale + self.shift))


def traced() -> tuple[fx.GraphModule, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 7)
    return fxwidth.trace(Net().to(memory_format=torch.channels_last), x), x


@pytest.mark.parametrize("width", [5, 11])
def test_classes_attributes_flags_and_memory_format(width: int) -> None:
    gm, x = traced()
    gm.scale.requires_grad_(False)
    for tensor in gm.state_dict(keep_vars=True).values():
        tensor.tag = ["kept"]
    gm(x).sum().backward()
    layouts = {name: tensor.grad.stride()[1] for name, tensor in gm.named_parameters() if tensor.dim() == 4}
    old = gm.state_dict(keep_vars=True)
    fxwidth.resize(gm, {"shift": width})
    for name, tensor in gm.state_dict(keep_vars=True).items():
        assert type(tensor) is type(old[name]), name
        assert tensor.tag is old[name].tag, name
        assert tensor.requires_grad == (name not in ("scale", "shift")), name
        assert tensor.is_leaf
        if tensor.dim() == 4:
            assert tensor.is_contiguous(memory_format=torch.channels_last)
            assert (tensor.grad.stride()[1] == 1) == (layouts[name] == 1)
            assert tensor.grad.shape == tensor.shape
    assert gm.conv.weight.shape[0] == gm.scale.shape[0] == gm.shift.shape[0] == width


def test_hooks_go_on_and_their_handles_too() -> None:
    gm, x = traced()
    seen: list[Any] = []
    handles = [gm.conv.weight.register_hook(lambda gradient: seen.append(tuple(gradient.shape)))]
    handles.append(gm.conv.weight.register_post_accumulate_grad_hook(seen.append))
    fxwidth.resize(gm, {"shift": 5})
    gm(x).sum().backward()
    assert seen[0] == (5, 3, 3, 3)
    assert seen[1] is gm.conv.weight
    for handle in handles:
        handle.remove()
    seen.clear()
    gm(x).sum().backward()
    assert not seen


def test_an_optimizer_in_the_backward_pass_trains_every_layer() -> None:
    gm, x = traced()

    def update(parameter: Tensor) -> None:
        parameter.data.sub_(0.1 * parameter.grad)
        parameter.grad = None

    for parameter in gm.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    fxwidth.resize(gm, {"shift": 5})
    before = [parameter.detach().clone() for parameter in gm.parameters()]
    gm(x).square().sum().backward()
    assert not any(map(torch.equal, gm.parameters(), before))


@pytest.mark.parametrize("layout", ["coalesced", "uncoalesced"])
@pytest.mark.parametrize("width", [5, 11])
def test_sparse_gradients_stay_sparse(layout: str, width: int) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Embedding(9, 8, sparse=True), nn.Linear(8, 3)), torch.randint(0, 9, (4, 5))
    gm = fxwidth.trace(model, x)
    weight = gm.get_parameter("0.weight")
    gm(x).sum().backward()
    assert weight.grad is not None
    if layout == "coalesced":
        weight.grad = weight.grad.coalesce()
    old, values = weight.grad, weight.detach().clone()
    (group,) = fxwidth.analyze(gm).free
    fxwidth.resize(gm, {group.name: width}, fold=False, selection="magnitude")
    new = gm.get_parameter("0.weight")
    assert new.grad is not None
    assert (new.grad.is_sparse, new.grad.is_coalesced()) == (True, layout == "coalesced")
    assert torch.equal(new.grad._indices(), old._indices())
    for column in range(min(8, width)):
        source = next(i for i in range(8) if torch.equal(values[:, i], new.detach()[:, column]))
        assert torch.equal(new.grad.to_dense()[:, column], old.to_dense()[:, source])
    assert not new.grad.to_dense()[:, 8:].any()


def test_a_wrapped_tensor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gm, _ = traced()
    before = state_of(gm)
    monkeypatch.setattr(Tagged, "__tensor_flatten__", lambda _: ([], None), raising=False)
    with pytest.raises(fxwidth.FxwidthError, match="scale is a Tagged, which cannot be made from the values"):
        fxwidth.resize(gm, {"shift": 5})
    assert not differences(before, state_of(gm))


def test_a_copy_of_a_resized_graph_trains() -> None:
    gm, x = fxwidth.trace(nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2)), torch.randn(2, 3)), torch.randn(2, 3)
    gm.get_parameter("0.weight").register_hook(lambda gradient: gradient * 2)
    fxwidth.resize(gm, {"0": 5})
    twin = copy.deepcopy(gm)
    twin(x).sum().backward()
    assert all(parameter.grad is not None for parameter in twin.parameters())
