"""Layers of a graph replaced by two of low rank, in one transaction with all that knows their parameters."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxwidth.analysis.result import Analysis
from fxwidth.errors import FxwidthError
from fxwidth.factorization.layer_inputs import input_moments
from fxwidth.factorization.low_rank import Spectrum, factors, spectrum_of
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.rewriting.optimizers import Optimizers, exchange_parameters
from fxwidth.rewriting.successors import with_values
from fxwidth.rewriting.transaction import Transaction
from fxwidth.runtime.reachable_state import has_global_hooks
from fxwidth.runtime.tensor_slots import named_tensors, set_slot
from fxwidth.simplification.called_layers import CalledLayer, called_layer, users_of_tensors
from fxwidth.simplification.rebuilding import part, rebuild

aten = torch.ops.aten
# After an op with the padding of a kernel by its name comes one without.
_SECOND = {aten.conv1d.padding: aten.conv1d.default, aten.conv2d.padding: aten.conv2d.default}
_SECOND |= {aten.conv3d.padding: aten.conv3d.default}


@dataclass(frozen=True)
class LowRankLayer:
    """A layer that may become two.

    Attributes:
        layer: how its node calls it.
        weight: its weight as a matrix, [out, in].
        positions: how many vectors it takes in the example.
        spectrum: what each rank loses.
    """

    layer: CalledLayer
    weight: Tensor
    positions: int
    spectrum: Spectrum


def separable_layers(analysis: Analysis) -> list[CalledLayer]:
    """Return the linear layers, and convolutions over single positions, that share no tensors and have no hooks."""
    if has_global_hooks():
        return []
    users, tensors = users_of_tensors(analysis.module), named_tensors(analysis.module)
    names: dict[int, int] = {}
    for tensor in tensors.values():
        names[id(tensor)] = names.get(id(tensor), 0) + 1

    def is_alone(layer: CalledLayer, name: str) -> bool:
        tensor = tensors.get(name)
        if tensor is None or users.get(id(tensor)) != {layer.node} or names[id(tensor)] != 1:
            return False
        hooks = (tensor._backward_hooks, tensor._post_accumulate_grad_hooks)
        return type(tensor) is nn.Parameter and tensor.is_floating_point() and not any(hooks) and not vars(tensor)

    found = (called_layer(analysis, node) for node in analysis.module.graph.nodes)
    return [
        layer
        for layer in found
        if layer is not None
        and all(is_alone(layer, name) for name in (layer.weight, layer.bias) if name is not None)
        and _is_over_single_positions(layer, tensors[layer.weight])
        and _has_usual_dims(analysis, layer, tensors[layer.weight])
    ]


def with_spectra(
    width_graph: WidthGraph, layers: Sequence[CalledLayer], data: Iterable[Any] | None
) -> list[LowRankLayer]:
    """Return layers with what each rank of theirs loses, by what they read of data, or of noise.

    Raises:
        FxwidthError: the data cannot be used.
    """
    analysis, result = width_graph.analysis, []
    seen = input_moments(width_graph, layers, data)
    for layer in layers:
        weight = analysis.parameters[layer.weight].tensor.detach().flatten(1)
        answer = analysis.node_values[layer.node.name]
        spectrum = spectrum_of(weight, seen.get(layer.node.name), has_bias=layer.bias is not None)
        result.append(LowRankLayer(layer, weight, answer.numel() // weight.shape[0], spectrum))
    return result


def factorize(
    module: fx.GraphModule,
    layers: Collection[LowRankLayer],
    ranks: Mapping[str, int],
    transaction: Transaction,
    by: str,
    optimizer: Optimizers | None = None,
) -> None:
    """Replace layers of a graph by two each, in place.

    Args:
        module: the graph.
        layers: those that may be replaced.
        ranks: the rank of each that is, by the path of its weight.
        transaction: that of which this is a part.
        by: the name of the pass that does it.
        optimizer: what trains the graph; it is given the new parameters, whose state begins anew.

    Raises:
        FxwidthError: a factor would not be finite.
    """
    chosen = [one for one in layers if one.layer.weight in ranks]
    tensors = named_tensors(module)
    made = [_made(tensors, one, ranks[one.layer.weight]) for one in chosen]
    old = [tensors[name] for one in chosen for name in (one.layer.weight, one.layer.bias) if name is not None]
    paths = dict.fromkeys(one.layer.weight.rpartition(".")[0] for one in chosen)
    part(module, [path for path in paths if path], old, transaction)
    graph = copy.deepcopy(module.graph)
    by_name = {node.name: node for node in graph.nodes}
    successors: dict[Tensor, list[Tensor]] = {}
    for one, new in zip(chosen, made, strict=True):
        layer = one.layer
        successors[tensors[layer.weight]] = [new.first, new.second]
        if layer.bias is not None and new.bias is not None and new.bias is not tensors[layer.bias]:
            successors[tensors[layer.bias]] = [new.bias]
        put = _put_modules if layer.module is not None else _put_parameters
        put(module, graph, by_name[layer.node.name], layer, new)
    if optimizer is not None:
        exchange_parameters(optimizer, successors, {tensor: name for name, tensor in tensors.items()})
    rebuild(module, graph, by)


@dataclass(frozen=True)
class _Factors:
    """The parameters of two layers; the bias is that of the second."""

    first: nn.Parameter
    second: nn.Parameter
    bias: Tensor | None


def _is_over_single_positions(layer: CalledLayer, weight: Tensor) -> bool:
    if layer.transposed or layer.groups != 1 or layer.node.target is aten.convolution.default:
        return False
    return all(size == 1 for size in weight.shape[2:])


def _has_usual_dims(analysis: Analysis, layer: CalledLayer, weight: Tensor) -> bool:
    """Tell whether a layer reads vectors along the last dim, or a convolution channels along the second one."""
    value, answer = (analysis.node_values.get(node.name) for node in (layer.source, layer.node))
    if not isinstance(value, Tensor) or not isinstance(answer, Tensor):
        return False
    return layer.is_linear or value.dim() == weight.dim()


def _made(tensors: Mapping[str, Tensor], one: LowRankLayer, rank: int) -> _Factors:
    old = tensors[one.layer.weight]
    first, second, shift = factors(one.weight, one.spectrum, rank)
    bias = None if one.layer.bias is None else tensors[one.layer.bias]
    added = bias if bias is None or shift is None else bias.detach().double() + shift
    for values in (first, second, added):
        if values is not None and not bool(values.to(old.dtype).isfinite().all()):
            raise FxwidthError(
                f"two layers of rank {rank} in the place of {one.layer.weight} would not be finite in {old.dtype}; "
                "keep it with keep=, or convert the model to a wider precision first."
            )
    ones = [1] * (old.dim() - 2)
    shapes = [(*values.shape, *ones) for values in (first, second)]
    weights = [values.reshape(shape).to(old.dtype) for values, shape in zip((first, second), shapes, strict=True)]
    parameters = [nn.Parameter(own, requires_grad=old.requires_grad) for own in weights]
    if bias is not None and added is not bias:
        assert added is not None
        assert one.layer.bias is not None
        bias = with_values(one.layer.bias, bias, added.to(bias.dtype))
    return _Factors(parameters[0], parameters[1], bias)


def _put_modules(module: fx.GraphModule, graph: fx.Graph, node: fx.Node, layer: CalledLayer, new: _Factors) -> None:
    """Put a sequence of two layers in the place of one, and have two nodes call them."""
    assert layer.module is not None
    parent, _, name = layer.module.rpartition(".")
    old: Any = module.get_submodule(layer.module)
    pair = nn.Sequential(*_two_modules(old, new)).train(old.training)
    module.get_submodule(parent)._modules[name] = pair
    with graph.inserting_before(node):
        first = graph.call_module(f"{layer.module}.0", node.args, dict(node.kwargs))
        second = graph.call_module(f"{layer.module}.1", (first,))
    _replace(graph, node, second)


def _two_modules(old: Any, new: _Factors) -> tuple[nn.Module, nn.Module]:
    rank, inputs = new.first.shape[:2]
    kinds: dict[str, Any] = {"device": "meta", "dtype": new.first.dtype}
    if isinstance(old, nn.Linear):
        pair: tuple[nn.Module, nn.Module] = (
            nn.Linear(inputs, rank, bias=False, **kinds),
            nn.Linear(rank, old.out_features, bias=new.bias is not None, **kinds),
        )
    else:
        how = {"stride": old.stride, "padding": old.padding, "padding_mode": old.padding_mode}
        pair = (
            type(old)(inputs, rank, 1, bias=False, **how, **kinds),
            type(old)(rank, old.out_channels, 1, bias=new.bias is not None, **kinds),
        )
    pair[0]._parameters["weight"], pair[1]._parameters["weight"] = new.first, new.second
    if new.bias is not None:
        pair[1]._parameters["bias"] = new.bias  # type: ignore[assignment]
    return pair


def _put_parameters(module: fx.GraphModule, graph: fx.Graph, node: fx.Node, layer: CalledLayer, new: _Factors) -> None:
    """Put two parameters in the place of one, and have two nodes like the old one use them."""
    holder, _, name = layer.weight.rpartition(".")
    owner = module.get_submodule(holder)
    del owner._parameters[name]
    paths = []
    for suffix, parameter in (("first", new.first), ("second", new.second)):
        own = next(one for one in _numbered(f"{name}_{suffix}") if not hasattr(owner, one))
        owner.register_parameter(own, parameter)
        paths.append(f"{holder}.{own}".lstrip("."))
    if layer.bias is not None and new.bias is not None:
        path, _, attribute = layer.bias.rpartition(".")
        set_slot(module.get_submodule(path), attribute, new.bias)
    given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | dict(node.kwargs)
    bias = given.get("bias")
    reads = [read for read in node.all_input_nodes if read.op == "get_attr"]
    target: Any = node.target
    with graph.inserting_before(node):
        weights = [graph.create_node("get_attr", path) for path in paths]
        more = {key: value for key, value in given.items() if key not in ("input", "weight", "bias")}
        first = graph.call_function(target, (given["input"], weights[0], None, *node.args[3:]), more)
        second = graph.call_function(_SECOND.get(target, target), (first, weights[1], bias))
    _replace(graph, node, second)
    for read in reads:
        if not read.users:
            graph.erase_node(read)


def _numbered(name: str) -> Iterable[str]:
    yield name
    yield from (f"{name}_{number}" for number in count(1))


def _replace(graph: fx.Graph, node: fx.Node, second: fx.Node) -> None:
    second.meta = dict(node.meta)
    node.replace_all_uses_with(second)
    graph.erase_node(node)
