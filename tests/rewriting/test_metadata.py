"""After a resize the metadata of nodes are those of what the nodes compute, whoever wrote them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata
from torch.utils import _pytree as pytree

import fxwidth
from fxwidth.passes import ResizeWidths
from tests.zoo.nets import images


class Attending(nn.Module):
    """Attention that is lowered when its heads change, and a branch that no resize touches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.attention = nn.MultiheadAttention(16, 4, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what attention makes of tokens, and their mean."""
        y = self.first(x)
        values, _ = self.attention(y, y, y, need_weights=False)
        return self.last(values), x.mean(1)


def convolutions() -> nn.Module:
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6, 3))


def symbolic(net: nn.Module, x: Tensor) -> fx.GraphModule:
    return fxwidth.trace(net, x)


def with_shapes_of_another_batch(net: nn.Module, x: Tensor) -> fx.GraphModule:
    gm = fx.symbolic_trace(net)
    ShapeProp(gm).propagate(x[:1])
    return gm


def exported(net: nn.Module, x: Tensor) -> fx.GraphModule:
    return torch.export.export(net, (x,)).module()


def exported_for_any_batch(net: nn.Module, x: Tensor) -> fx.GraphModule:
    return torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)).module()


def shapes_of(value: Any) -> list[tuple[int, ...]]:
    """Return the shapes in a value or in metadata, a symbolic size as what it was exported with."""
    leaves = pytree.tree_leaves(value, is_leaf=lambda leaf: isinstance(leaf, TensorMetadata))
    return [tuple(map(int, leaf.shape)) for leaf in leaves if isinstance(leaf, (Tensor, TensorMetadata))]


def values_of(gm: fx.GraphModule, x: Tensor) -> dict[str, Any]:
    values = {}

    class Recording(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n.name] = super().run_node(n)
            return values[n.name]

    Recording(gm).run(x)
    return values


@pytest.mark.parametrize("front_end", [symbolic, with_shapes_of_another_batch, exported, exported_for_any_batch])
@pytest.mark.parametrize(("make", "x"), [(convolutions, images(4)), (Attending, torch.randn(4, 5, 6))])
@pytest.mark.parametrize("by_pass", [False, True])
def test_metadata_are_those_of_the_new_sizes(
    front_end: Callable[[nn.Module, Tensor], fx.GraphModule], make: Callable[[], nn.Module], x: Tensor, by_pass: bool
) -> None:
    gm = front_end(make().to(x).eval(), x)
    carried = {key for node in gm.graph.nodes for key in ("val", "tensor_meta") if key in node.meta}
    plan = {group.name: group.width // 2 for group in fxwidth.analyze(gm).free}
    assert plan
    assert carried
    if by_pass:
        ResizeWidths(plan, selection="magnitude", fold=False)(gm)
    else:
        fxwidth.resize(gm, plan, selection="magnitude", fold=False)
    values = values_of(gm, x[:1] if front_end is with_shapes_of_another_batch else x)
    for node in gm.graph.nodes:
        for key in carried if node.op != "output" else ():
            if shapes_of(values[node.name]):
                assert shapes_of(node.meta[key]) == shapes_of(values[node.name]), (node, key)
    if front_end is exported_for_any_batch:
        assert not isinstance(gm.graph.find_nodes(op="output")[0].all_input_nodes[0].meta["val"].shape[0], int)


def test_what_cannot_be_told_is_taken_away() -> None:
    """A graph that carries shapes but for an input: those that have changed are wrong, the others are not."""
    x = images(4)
    gm = exported(convolutions().to(x).eval(), x)
    fxwidth.analyze(gm)
    placeholder = gm.graph.find_nodes(op="placeholder")[0]
    placeholder.meta.pop("val"), placeholder.meta.pop("tensor_meta", None)
    last = gm.graph.find_nodes(op="output")[0].all_input_nodes[0]
    kept = last.meta["val"]
    fxwidth.resize(gm, {"0": 3}, selection="magnitude", fold=False)
    nodes = {node.name: node for node in gm.graph.nodes}
    assert nodes[last.name].meta["val"] is kept
    assert "val" not in nodes["conv2d"].meta


def test_metadata_of_a_refused_resize_stay() -> None:
    x = images(4)
    gm = exported(convolutions().to(x).eval(), x)
    before = {node.name: node.meta["val"] for node in gm.graph.nodes if "val" in node.meta}
    with pytest.raises(fxwidth.FxwidthError):
        fxwidth.resize(gm, {"0": 3, "6": 2})
    assert all(node.meta.get("val") is before.get(node.name) for node in gm.graph.nodes)
