"""Layers and batch norms as the nodes of a graph call them: modules of torch.nn, functions, and ATen ops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch.nn import functional as F

from fxwidth.analysis.result import Analysis
from fxwidth.runtime.module_state import is_plain_layer, walk

aten = torch.ops.aten

_LINEAR = ("input", "weight", "bias")
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_NORM = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")
_F_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")

_LAYER_MODULES: dict[type, tuple[str, bool]] = {
    nn.Linear: ("linear", False),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), ("convolution", False)),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), ("convolution", True)),
}
_NORM_MODULES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# Of functions in Python the names of their arguments, in order; ops of ATen have schemas that tell them.
_FUNCTIONS: dict[Any, tuple[str, bool, Sequence[str]]] = {
    F.linear: ("linear", False, _LINEAR),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), ("convolution", False, _CONVOLUTION)),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), ("convolution", True, _TRANSPOSED)),
    F.batch_norm: ("norm", False, _F_NORM),
    torch.batch_norm: ("norm", False, _NORM),
}
_OPS: dict[Any, tuple[str, bool]] = {
    aten.linear.default: ("linear", False),
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), ("convolution", False)),
    **dict.fromkeys((aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding), ("convolution", False)),
    **dict.fromkeys(
        (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input), ("convolution", True)
    ),
    aten.convolution.default: ("convolution", False),
    aten.batch_norm.default: ("norm", False),
    aten._native_batch_norm_legit_no_training.default: ("norm", False),
}


@dataclass(frozen=True)
class CalledLayer:
    """A linear layer or a convolution that a node calls.

    Attributes:
        node: the node.
        source: that which gives its input.
        weight: the path of its weight, [out, in, ...], of transposed convolutions [in, out / groups, ...].
        bias: that of its bias, or None.
        is_linear: whether it is no convolution.
        transposed: whether it is a transposed one.
        groups: of a convolution.
        module: the path of the module that is called; None for functions and ops.
    """

    node: fx.Node
    source: fx.Node
    weight: str
    bias: str | None
    is_linear: bool
    transposed: bool
    groups: int
    module: str | None


@dataclass(frozen=True)
class CalledNorm:
    """A batch norm that a node calls, which normalises by running statistics in evaluation.

    Attributes:
        node: the node.
        source: that which gives its input.
        result: the node whose result is the normalised signal: another one where the op returns several.
        mean: the path of its running mean.
        variance: that of its running variance.
        weight: that of its gain, or None.
        bias: that of its shift, or None.
        eps: what is added to the variance.
        module: the path of the module that is called; None for functions and ops.
    """

    node: fx.Node
    source: fx.Node
    result: fx.Node
    mean: str
    variance: str
    weight: str | None
    bias: str | None
    eps: float
    module: str | None


def called_layer(analysis: Analysis, node: fx.Node) -> CalledLayer | None:
    """Return the layer that a node calls, without hooks and with parameters of its own; None for any other node."""
    if node.op == "call_module":
        module = analysis.module.get_submodule(str(node.target))
        source = _only_argument(node)
        if type(module) not in _LAYER_MODULES or source is None or not is_bare(module):
            return None
        kind, transposed = _LAYER_MODULES[type(module)]
        bias = None if module._parameters.get("bias") is None else f"{node.target}.bias"
        groups, path = int(getattr(module, "groups", 1)), str(node.target)
        if getattr(module, "padding_mode", "zeros") != "zeros" and transposed:
            return None
        return CalledLayer(node, source, f"{path}.weight", bias, kind == "linear", transposed, groups, path)
    found = _called_function(node)
    if found is None or found[0] == "norm":
        return None
    kind, transposed, arguments = found
    weight, bias = _path(arguments.get("weight")), _path(arguments.get("bias"))
    source, has_bias = arguments.get("input"), arguments.get("bias") is not None
    groups = arguments.get("groups", 1)
    if weight is None or not isinstance(source, fx.Node) or (has_bias and bias is None) or type(groups) is not int:
        return None
    transposed = transposed or arguments.get("transposed") is True
    return CalledLayer(node, source, weight, bias, kind == "linear", transposed, groups, None)


def called_norm(analysis: Analysis, node: fx.Node) -> CalledNorm | None:
    """Return the batch norm that a node calls in evaluation, without hooks; None for any other node."""
    if node.op == "call_module":
        norm = analysis.module.get_submodule(str(node.target))
        source = _only_argument(node)
        if type(norm) not in _NORM_MODULES or source is None or not is_bare(norm) or norm.training:
            return None
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        if norm.running_mean is None or norm.running_var is None:
            return None
        path = str(node.target)
        gain, shift = (None if norm._parameters.get(own) is None else f"{path}.{own}" for own in ("weight", "bias"))
        statistics = f"{path}.running_mean", f"{path}.running_var"
        return CalledNorm(node, source, node, *statistics, gain, shift, norm.eps, path)
    found = _called_function(node)
    if found is None or found[0] != "norm":
        return None
    arguments = found[2]
    names = ("running_mean", "running_var", "weight", "bias")
    mean, variance, weight, bias = (_path(arguments.get(name)) for name in names)
    source, eps, result = arguments.get("input"), arguments.get("eps", 1e-5), _normalised(node)
    given = [arguments.get(name) is not None for name in names[2:]]
    if mean is None or variance is None or [weight is not None, bias is not None] != given or result is None:
        return None
    if not isinstance(source, fx.Node) or type(eps) is not float or _is_training(analysis, arguments.get("training")):
        return None
    return CalledNorm(node, source, result, mean, variance, weight, bias, eps, None)


def is_bare(module: nn.Module) -> bool:
    """Tell whether nothing but known code runs when a layer is called, and when its gradients are computed."""
    hooks = (module._backward_hooks, module._backward_pre_hooks)
    return is_plain_layer(module) and "forward" not in vars(module) and not any(hooks)


def users_of_tensors(module: fx.GraphModule) -> dict[int, set[fx.Node]]:
    """Return the nodes that use each parameter and buffer, by its `id`: those that call its module or read it."""
    users: dict[int, set[fx.Node]] = {}
    for node in module.graph.nodes:
        if node.op == "call_module":
            for _, part in walk(module.get_submodule(str(node.target))):
                for tensor in (*part._parameters.values(), *part._buffers.values()):
                    users.setdefault(id(tensor), set()).add(node)
        elif node.op == "get_attr":
            value = _attribute(module, str(node.target))
            parts = walk(value) if isinstance(value, nn.Module) else []
            inner = [own for _, part in parts for own in (*part._parameters.values(), *part._buffers.values())]
            for tensor in (value, *inner):
                users.setdefault(id(tensor), set()).update(node.users)
    return users


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _only_argument(node: fx.Node) -> fx.Node | None:
    given = [*node.args, *node.kwargs.values()]
    return given[0] if len(given) == 1 and isinstance(given[0], fx.Node) else None


def _called_function(node: fx.Node) -> tuple[str, bool, Mapping[str, Any]] | None:
    """Return the kind of layer that a function is, whether it is transposed, and its arguments by name."""
    if node.op != "call_function":
        return None
    if isinstance(node.target, OpOverload):
        if node.target not in _OPS:
            return None
        names: Sequence[str] = [argument.name for argument in node.target._schema.arguments]
        kind, transposed = _OPS[node.target]
    elif node.target in _FUNCTIONS:
        kind, transposed, names = _FUNCTIONS[node.target]
    else:
        return None
    return kind, transposed, dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _path(value: Any) -> str | None:
    return str(value.target) if isinstance(value, fx.Node) and value.op == "get_attr" else None


def _normalised(node: fx.Node) -> fx.Node | None:
    """Return the node that has the first result of an op, if the others are not used."""
    if node.target is not aten._native_batch_norm_legit_no_training.default:
        return node
    users = list(node.users)
    is_first = len(users) == 1 and users[0].target is getitem and users[0].args[1] == 0
    return users[0] if is_first else None


def _is_training(analysis: Analysis, training: Any) -> bool:
    """Tell whether an argument that says so may say that statistics are those of the batch."""
    if isinstance(training, fx.Node):
        training = analysis.node_values.get(training.name, True)
    # An op without the argument is one of evaluation; a function's default is False.
    return training not in (False, None)
