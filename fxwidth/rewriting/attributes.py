"""Sizes that standard modules keep as attributes, derived from their new parameters and the ops they ran."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fxwidth.axes.factors import Axis
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.errors import FxwidthError
from fxwidth.recording.tape import OpCall
from fxwidth.rules.family_table import family_of, is_move
from fxwidth.rules.op_families import Convolution, Family, Move, Norm, NormKind
from fxwidth.rules.registry import resized_call

Attributes = dict[str, Any]
_ByShape = Callable[[Any], Attributes]


def _linear(module: nn.Linear) -> Attributes:
    out_features, in_features = module.weight.shape
    return {"out_features": out_features, "in_features": in_features}


def _bilinear(module: nn.Bilinear) -> Attributes:
    out_features, first, second = module.weight.shape
    return {"out_features": out_features, "in1_features": first, "in2_features": second}


def _embedding(module: nn.Embedding | nn.EmbeddingBag) -> Attributes:
    return {"num_embeddings": module.weight.shape[0], "embedding_dim": module.weight.shape[1]}


def _convolution(module: nn.modules.conv._ConvNd) -> Attributes:
    first, second = module.weight.shape[:2]
    if module.transposed:
        return {"in_channels": first, "out_channels": second * module.groups}
    return {"in_channels": second * module.groups, "out_channels": first}


def _batch_norm(module: nn.modules.batchnorm._NormBase) -> Attributes:
    channels = module.weight if module.weight is not None else module.running_mean
    return {} if channels is None else {"num_features": channels.shape[0]}


def _normalized_shape(module: nn.LayerNorm | nn.RMSNorm) -> Attributes:
    return {} if module.weight is None else {"normalized_shape": tuple(module.weight.shape)}


def _group_norm(module: nn.GroupNorm) -> Attributes:
    return {} if module.weight is None else {"num_channels": module.weight.shape[0]}


def _prelu(module: nn.PReLU) -> Attributes:
    return {"num_parameters": module.weight.shape[0]}


def _recurrent(module: Any) -> Attributes:
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    sizes = {"input_size": module.weight_ih_l0.shape[1], "hidden_size": module.weight_hh_l0.shape[0] // gates}
    return sizes | ({"proj_size": module.weight_hr_l0.shape[0]} if module.proj_size else {})


def _recurrent_cell(module: nn.RNNCellBase) -> Attributes:
    return {"input_size": module.weight_ih.shape[1], "hidden_size": module.weight_hh.shape[1]}


_BY_SHAPE: tuple[tuple[Any, _ByShape], ...] = (
    (nn.Linear, _linear),
    (nn.Bilinear, _bilinear),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    (nn.modules.conv._ConvNd, _convolution),
    (nn.modules.batchnorm._NormBase, _batch_norm),
    ((nn.LayerNorm, nn.RMSNorm), _normalized_shape),
    (nn.GroupNorm, _group_norm),
    (nn.PReLU, _prelu),
    (nn.RNNBase, _recurrent),
    (nn.RNNCellBase, _recurrent_cell),
)


def sizes_by_shape(module: nn.Module) -> Attributes:
    """Return the size attributes that follow from the parameters a module has now."""
    for kind, derive in _BY_SHAPE:
        if isinstance(module, kind):
            return derive(module)
    return {}


def sizes_by_calls(module: nn.Module, calls: Iterable[OpCall], maps: IndexMaps) -> Attributes:
    """Return the attributes that follow from the ops a module must run after the resize."""
    result: Attributes = {}
    for call in calls:
        _, arguments = resized_call(call, maps)
        family = family_of(call.func)
        if isinstance(module, nn.modules.conv._ConvNd) and isinstance(family, Convolution):
            result["groups"] = arguments["groups"]
        elif isinstance(module, nn.GroupNorm) and family == Norm(NormKind.GROUP):
            result |= {"num_groups": arguments["group"], "num_channels": arguments["C"]}
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and "normalized_shape" in arguments:
            result["normalized_shape"] = tuple(arguments["normalized_shape"])
            if maps.variance_ratio(call.index) != 1.0:
                result["eps"] = arguments["eps"]
        elif isinstance(module, nn.Unflatten) and call.output_axes:
            result |= _unflattened(module, call, maps)
        elif isinstance(module, nn.modules.batchnorm._NormBase) and _is_batch_norm(family):
            result["num_features"] = _channels(call.axes[call.inputs[0]][1], maps)
    return result


def _is_batch_norm(family: Family | None) -> bool:
    return isinstance(family, Norm) and family.kind is NormKind.BATCH


def _unflattened(module: nn.Unflatten, call: OpCall, maps: IndexMaps) -> Attributes:
    if not isinstance(module.dim, int) or not is_move(call.func, Move.RESHAPE):
        return {}
    axes = call.output_axes[0]
    count = len(module.unflattened_size)
    rank_before = len(axes) - count + 1
    first = module.dim % rank_before
    return {"unflattened_size": tuple(maps.size(axis) for axis in axes[first : first + count])}


def _channels(axis: Axis, maps: IndexMaps) -> int:
    """Return the channels of a dim that instance norm has merged with the batch, or of a plain channel dim."""
    size = maps.size(axis)
    return maps.with_larger_batch().size(axis) - size or size


class UnsettableError(FxwidthError):
    """An attribute that would have to hold another size does not let itself be set."""


class AttributeEdits:
    """Changes of module attributes that can be taken back."""

    def __init__(self) -> None:
        self._undo: list[tuple[nn.Module, str, Any]] = []

    def apply(self, module: nn.Module, attributes: Attributes) -> None:
        """Set attributes, remembering what they were."""
        for name, value in attributes.items():
            if getattr(module, name) != value:
                self.put(module, name, value)

    def put(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute, also to what says that it is equal to what is there.

        Raises:
            UnsettableError: the module's class does not let it be set.
        """
        self._undo.append((module, name, getattr(module, name)))
        try:
            setattr(module, name, value)
        except Exception as error:
            raise UnsettableError(
                f"{name} of {type(module).__name__} cannot be set to {value!r}: {type(error).__name__}: {error}. Let "
                "the class take another number there, or keep the groups of that size by keep=[...]."
            ) from error

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Set every attribute back for a while."""
        now = [(module, name, getattr(module, name)) for module, name, _ in self._undo]
        for module, name, value in reversed(self._undo):
            setattr(module, name, value)
        try:
            yield
        finally:
            for module, name, value in now:
                setattr(module, name, value)

    def mark(self) -> int:
        """Return a place to go back to by `undo`."""
        return len(self._undo)

    def undo(self, mark: int = 0) -> None:
        """Set every attribute back that was set since a mark."""
        while len(self._undo) > mark:
            module, name, value = self._undo.pop()
            # What could not be set cannot be set back.
            if getattr(module, name) is not value:
                setattr(module, name, value)

    def take_back(self, modules: Iterable[nn.Module]) -> None:
        """Set the attributes of some modules back."""
        chosen = {id(module) for module in modules}
        for module, name, value in reversed(self._undo):
            if id(module) in chosen:
                setattr(module, name, value)
