"""Where tensors lie in memory: ops kept whole lay out their results as their kernels do, and any layout can be met."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import fxwidth
from fxwidth.recording.composite_ops import attention
from fxwidth.recording.layouts import for_any_layout
from fxwidth.recording.tape import plain_kernels
from fxwidth.runtime.fake_tensors import fake_mode
from fxwidth.verification.replay_oracle import replay_difference
from tests.oracles.judges import ROUNDING, analysed, random_maps


def _in_order(shape: Sequence[int], order: Sequence[int]) -> Tensor:
    """Return a tensor whose dims lie in memory in an order."""
    return torch.randn([shape[dim] for dim in order]).permute([order.index(dim) for dim in range(len(order))])


ORDERS = [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2)]
MASKS = {"no": None, "bool": torch.ones(5, 5).tril().bool(), "added": torch.randn(5, 5)}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("gradients", [False, True])
def test_the_layout_is_that_of_the_kernel(kind: str, gradients: bool) -> None:
    torch.manual_seed(0)
    seen = set()
    for order, others, size, heads in itertools.product(ORDERS, ORDERS, (4, 6), (2, 1)):
        query, key = _in_order((4, 2, 5, 4), order), _in_order((4, heads, 5, 4), others)
        value, mask = _in_order((4, heads, 5, size), others), MASKS[kind]
        query.requires_grad_(gradients)
        kernel = functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=heads == 1)
        with plain_kernels():
            real = attention(query, key, value, mask, enable_gqa=heads == 1)
            mode = fake_mode()
            fakes = [None if t is None else mode.from_tensor(t) for t in (query, key, value, mask)]
            with mode:
                fake = attention(*fakes, enable_gqa=heads == 1)
        torch.testing.assert_close(real, kernel.detach())
        assert real.stride() == kernel.stride() == fake.stride()
        assert (fake.shape, fake.dtype) == (kernel.shape, kernel.dtype)
        seen.add(kernel.is_contiguous())
    assert seen == {False, True}


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_norms_kept_whole_have_the_layout_of_their_kernels(order: Sequence[int]) -> None:
    torch.manual_seed(0)
    x, gain = _in_order((3, 4, 5, 6), order), torch.rand(6)
    lengths = torch.norm_except_dim(x, 2, 0)
    norms: list[tuple[Callable[..., Tensor], list[Tensor]]] = [
        (lambda x, gain: torch.rms_norm(x, [6], gain, 1e-5), [x, gain]),
        (lambda x: functional.rms_norm(x, [5, 6]), [x]),
        (lambda v, g: torch._weight_norm(v, g, 0), [x, lengths]),
    ]
    for norm, operands in norms:
        outside = norm(*operands)
        with plain_kernels():
            real, mode = norm(*operands), fake_mode()
            fakes = list(map(mode.from_tensor, operands))
            with mode:
                fake = norm(*fakes)
        torch.testing.assert_close(real, outside)
        assert real.stride() == outside.stride() == fake.stride()


class Attending(nn.Module):
    """Attention whose heads are put side by side by a view: of a contiguous result there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.parts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        heads = [part(y).unflatten(-1, (4, -1)).transpose(1, 2) for part in self.parts]
        values = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        return self.last(values.transpose(1, 2).view(x.shape[0], x.shape[1], -1))


def _exported(model: nn.Module, x: Tensor) -> fx.GraphModule:
    batch = torch.export.Dim("batch", min=2)
    return torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()


@pytest.mark.parametrize("front_end", [fxwidth.trace, _exported])
def test_views_of_attention_stay_possible(front_end: Callable[[nn.Module, Tensor], fx.GraphModule]) -> None:
    torch.manual_seed(0)
    model, x = Attending().eval(), torch.randn(4, 5, 6)
    names = [group.name for group in fxwidth.analyze(front_end(model, x)).free]
    assert len(names) >= 3
    for name in names:
        gm = front_end(Attending().eval(), x)
        before = gm(x[:3])
        width = next(group.width for group in fxwidth.analyze(gm).free if group.name == name)
        fxwidth.resize(gm, {name: width + 2})
        torch.testing.assert_close(gm(x[:3]), before)
        fxwidth.resize(gm, {name: width // 2})
        assert gm(x[:3]).shape == before.shape


def _convolutions() -> nn.Module:
    return nn.Sequential(nn.GroupNorm(2, 6), nn.Conv1d(6, 8, 1), nn.Conv1d(8, 3, 1))


def _lowered() -> nn.Module:
    """Return a layer that is taken apart when its heads change, and with it a norm of what the layer is given."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    layer.norm1 = nn.GroupNorm(2, 6)
    return nn.Sequential(layer, nn.Linear(8, 3))


@pytest.mark.parametrize("make", [_convolutions, _lowered])
def test_operands_may_lie_otherwise_than_when_they_were_recorded(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(3, 6, 8).double()
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    analysis = analysed(model, [x])
    assert replay_difference(analysis, random_maps(analysis, 0.5), [strided]) < ROUNDING
    gm = fxwidth.trace(model, x)
    plan = {group.name: group.width // 2 for group in fxwidth.analyze(gm).free}
    assert plan
    fxwidth.resize(gm, plan, fold=False, selection="magnitude")
    torch.testing.assert_close(gm(strided), gm(x))


def test_an_op_is_given_what_its_kernel_can_take() -> None:
    aten = torch.ops.aten
    strided = torch.randn(3, 8, 6).double().transpose(1, 2)
    norm = {"input": strided, "weight": None, "bias": None, "N": 3, "C": 6, "HxW": 8, "group": 2, "eps": 1e-5}
    func, given = for_any_layout(aten.native_group_norm.default, norm, Tensor.contiguous)
    assert given["input"].is_contiguous()
    torch.testing.assert_close(func(**given)[0], nn.functional.group_norm(strided.contiguous(), 2))
    for view in (aten.view.default, aten._unsafe_view.default):
        func, given = for_any_layout(view, {"self": strided, "size": [3, -1]}, Tensor.contiguous)
        assert torch.equal(func(**given), strided.contiguous().view(3, -1))
    func, given = for_any_layout(aten.relu.default, {"self": strided}, Tensor.contiguous)
    assert func is aten.relu.default
    assert given["self"] is strided
