"""Batch norms folded into the linear layers and convolutions whose results they alone read."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxwidth.analysis.result import Analysis
from fxwidth.errors import FxwidthError
from fxwidth.importance.estimates import refuse_negative_variances
from fxwidth.recording.graph_meta import refuse_groups_of_one
from fxwidth.rewriting.optimizers import Optimizers, exchange_parameters
from fxwidth.rewriting.successors import with_values
from fxwidth.rewriting.transaction import Transaction
from fxwidth.runtime.reachable_state import has_global_hooks
from fxwidth.runtime.tensor_slots import named_tensors, set_slot
from fxwidth.simplification.called_layers import CalledLayer, CalledNorm, called_layer, called_norm, users_of_tensors
from fxwidth.simplification.modes import evaluates
from fxwidth.simplification.rebuilding import part, rebuild
from fxwidth.tracing.analyze import analyze_module

_COUNT = "num_batches_tracked"


@dataclass(frozen=True)
class Fold:
    """A batch norm that becomes a part of the layer before it.

    Attributes:
        layer: the layer.
        norm: the batch norm that alone reads its result.
    """

    layer: CalledLayer
    norm: CalledNorm


def foldable(analysis: Analysis) -> list[Fold]:
    """Return the batch norms of a graph in evaluation that can be folded into the layers before them.

    A layer and its batch norm have no hooks, are called once, and share no tensors with anything else.

    Args:
        analysis: that of the graph.
    """
    if has_global_hooks():
        return []
    users, names = users_of_tensors(analysis.module), _names_of(analysis.module)
    found = []
    for node in analysis.module.graph.nodes:
        norm = called_norm(analysis, node)
        layer = None if norm is None else called_layer(analysis, norm.source)
        if norm is None or layer is None or list(layer.node.users) != [norm.node]:
            continue
        if _fits(analysis, layer, norm) and _is_alone(analysis.module, layer, norm, users, names):
            found.append(Fold(layer, norm))
    return found


def fold_batch_norms(
    module: fx.GraphModule, transaction: Transaction, by: str, optimizer: Optimizers | None = None
) -> int:
    """Fold the batch norms of a graph in evaluation, in place, and return how many there were.

    Args:
        module: the graph.
        transaction: that of which this is a part.
        by: the name of the pass that does it.
        optimizer: what trains the graph; it is given the new parameters, whose state begins anew.

    Raises:
        FxwidthError: the graph is in training mode, a batch norm would take the root of a negative number, or a weight
            would not be finite.
    """
    if not evaluates(module):
        raise FxwidthError(f"{by} needs a graph in eval mode, where batch norms are fixed; call gm.eval() before it.")
    analysis = analyze_module(module)
    folds = foldable(analysis)
    if not folds:
        return 0
    refuse_groups_of_one(module, by)
    refuse_negative_variances(analysis)
    tensors = named_tensors(module)
    folded = [_folded(tensors, fold) for fold in folds]
    paths = dict.fromkeys(_holder(name) for fold in folds for name in _own_names(fold))
    going = [tensors[name] for fold in folds for name in _own_names(fold)]
    part(module, [path for path in paths if path], going, transaction)
    graph = copy.deepcopy(module.graph)
    by_name = {node.name: node for node in graph.nodes}
    successors: dict[Tensor, list[Tensor]] = {one: [] for one in going if isinstance(one, nn.Parameter)}
    for fold, (weight, bias) in zip(folds, folded, strict=True):
        successors[tensors[fold.layer.weight]] = [weight, *([bias] if fold.layer.bias is None else [])]
        if fold.layer.bias is not None:
            successors[tensors[fold.layer.bias]] = [bias]
        path = _put(module, fold.layer, weight, bias)
        _rewire(graph, by_name, fold, path)
        _remove_norm(module, graph, fold.norm)
    if optimizer is not None:
        exchange_parameters(optimizer, successors, {tensor: name for name, tensor in tensors.items()})
    rebuild(module, graph, by)
    return len(folds)


def _fits(analysis: Analysis, layer: CalledLayer, norm: CalledNorm) -> bool:
    """Tell whether the channels that a batch norm normalises are those that the layer writes."""
    result = analysis.node_values.get(layer.node.name)
    weight = analysis.parameters[layer.weight].tensor if layer.weight in analysis.parameters else None
    if not isinstance(result, Tensor) or weight is None or not weight.is_floating_point():
        return False
    # A linear layer writes to the last dim; a convolution without a batch has its channels in the first one.
    if result.dim() != (2 if layer.is_linear else weight.dim()):
        return False
    outputs = weight.shape[1] * layer.groups if layer.transposed else weight.shape[0]
    mean = analysis.parameters.get(norm.mean)
    return mean is not None and tuple(mean.tensor.shape) == (outputs,)


def _is_alone(
    module: fx.GraphModule,
    layer: CalledLayer,
    norm: CalledNorm,
    users: Mapping[int, set[fx.Node]],
    names: Mapping[int, int],
) -> bool:
    """Tell whether a layer and a batch norm share no tensors with anything else, by whatever name."""
    tensors = named_tensors(module)
    own = {layer.node: [layer.weight, layer.bias], norm.node: [norm.mean, norm.variance, norm.weight, norm.bias]}
    for node, paths in own.items():
        for path in (path for path in paths if path is not None):
            tensor = tensors.get(path)
            if tensor is None or users.get(id(tensor)) != {node} or names[id(tensor)] != 1:
                return False
            if tensor.layout is not torch.strided or type(tensor) not in (Tensor, nn.Parameter):
                return False
    return True


def _names_of(module: fx.GraphModule) -> dict[int, int]:
    """Return how many names each parameter and buffer has, by its `id`."""
    counts: dict[int, int] = {}
    for tensor in named_tensors(module).values():
        counts[id(tensor)] = counts.get(id(tensor), 0) + 1
    return counts


def _folded(tensors: Mapping[str, Tensor], fold: Fold) -> tuple[Tensor, Tensor]:
    """Return the weight and the bias of a layer that does what it and its batch norm did.

    With g = gain / sqrt(variance + eps): W' = g W, b' = g (b - mean) + shift.

    Raises:
        FxwidthError: one of them would not be finite.
    """
    layer, norm = fold.layer, fold.norm

    def wide(name: str | None, default: float) -> Tensor | float:
        return default if name is None else tensors[name].detach().double()

    weight, mean, variance = (tensors[name].detach().double() for name in (layer.weight, norm.mean, norm.variance))
    scale = wide(norm.weight, 1.0) / (variance + norm.eps).sqrt()
    values = _scaled(weight, scale, layer)
    shift = (wide(layer.bias, 0.0) - mean) * scale + wide(norm.bias, 0.0)
    old = tensors[layer.weight]
    for name, own in ((layer.weight, values), (layer.bias or norm.mean, shift)):
        if not own.is_meta and not bool(own.to(old.dtype).isfinite().all()):
            raise FxwidthError(
                f"with the batch norm at node {norm.node.name!r} in it, {name} would not be finite in {old.dtype}; "
                "check its running statistics, or convert the model to a wider precision first."
            )
    template = layer.bias or norm.bias
    if template is None:
        bias: Tensor = nn.Parameter(shift.to(old.dtype), requires_grad=old.requires_grad)
    else:
        bias = with_values(template, tensors[template], shift.to(tensors[template].dtype))
    return with_values(layer.weight, old, values.to(old.dtype)), bias


def _scaled(weight: Tensor, scale: Tensor, layer: CalledLayer) -> Tensor:
    """Return a weight each of whose output channels is scaled."""
    if not layer.transposed:
        return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    grouped = weight.reshape(layer.groups, -1, *weight.shape[1:])
    scaled = grouped * scale.reshape(layer.groups, 1, -1, *[1] * (weight.dim() - 2))
    return scaled.reshape(weight.shape)


def _put(module: fx.GraphModule, layer: CalledLayer, weight: Tensor, bias: Tensor) -> str:
    """Put the tensors of a layer in place, and return the path of its bias."""
    owner = module.get_submodule(_holder(layer.weight))
    set_slot(owner, layer.weight.rpartition(".")[2], weight)
    if layer.module is not None:
        owner._parameters["bias"] = bias  # type: ignore[assignment]
        return f"{layer.module}.bias"
    if layer.bias is not None:
        set_slot(module.get_submodule(_holder(layer.bias)), layer.bias.rpartition(".")[2], bias)
        return layer.bias
    name = next(name for name in _bias_names(layer.weight) if not hasattr(owner, name))
    owner.register_parameter(name, bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias))
    return f"{_holder(layer.weight)}.{name}".lstrip(".")


def _bias_names(weight: str) -> Iterator[str]:
    own = weight.rpartition(".")[2]
    base = "bias" if own == "weight" else f"{own}_bias"
    yield base
    number = 0
    while True:
        number += 1
        yield f"{base}_{number}"


def _rewire(graph: fx.Graph, by_name: Mapping[str, fx.Node], fold: Fold, bias: str) -> None:
    """Have the layer give what the batch norm gave."""
    layer, norm, result = (by_name[one.name] for one in (fold.layer.node, fold.norm.node, fold.norm.result))
    if fold.layer.module is None and fold.layer.bias is None:
        with graph.inserting_before(layer):
            read = graph.create_node("get_attr", bias)
        # All of these take it as their third argument.
        if len(layer.args) > 2:
            layer.args = (*layer.args[:2], read, *layer.args[3:])
        else:
            layer.kwargs = {**layer.kwargs, "bias": read}
    result.replace_all_uses_with(layer)
    reads = [node for node in norm.all_input_nodes if node.op == "get_attr"]
    for node in dict.fromkeys((result, norm)):
        graph.erase_node(node)
    for node in reads:
        if not node.users:
            graph.erase_node(node)


def _remove_norm(module: fx.GraphModule, graph: fx.Graph, norm: CalledNorm) -> None:
    """Take the tensors of a batch norm out of a graph, and its count of batches where nobody else reads it."""
    holder = _holder(norm.mean)
    if norm.module is not None:
        owner = module.get_submodule(_holder(norm.module))
        del owner._modules[norm.module.rpartition(".")[2]]
        return
    counter = f"{holder}.{_COUNT}".lstrip(".")
    for read in [node for node in graph.find_nodes(op="get_attr") if node.target == counter]:
        writes = [user for user in read.users if user.target is torch.ops.aten.add_.Tensor and not user.users]
        if len(writes) == len(read.users):
            for node in (*writes, read):
                graph.erase_node(node)
    names = [norm.mean, norm.variance, norm.weight, norm.bias]
    if not any(node.target == counter for node in graph.find_nodes(op="get_attr")):
        names.append(counter)
    for name in (name for name in names if name is not None):
        part = module.get_submodule(_holder(name))
        for table in (part._parameters, part._buffers):
            table.pop(name.rpartition(".")[2], None)


def _own_names(fold: Fold) -> list[str]:
    """Return the names of the tensors that a fold replaces or removes."""
    layer, norm = fold.layer, fold.norm
    names = (layer.weight, layer.bias, norm.mean, norm.variance, norm.weight, norm.bias)
    return [name for name in names if name is not None]


def _holder(name: str) -> str:
    return name.rpartition(".")[0]
