"""Batch norms right behind writers of linear groups: together they are one linear map while statistics are running."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch._ops import OpOverload

from fxwidth.analysis.def_use import def_use
from fxwidth.axes.index_maps import Indices
from fxwidth.bases.channel_provenance import Origins
from fxwidth.recording.tape import OpCall
from fxwidth.rules.family_table import family_of, is_move, running_norm
from fxwidth.rules.op_families import Convolution, Move, Product
from fxwidth.weights.readers import Wiring

# Between writer and batch norm nothing may be but what leaves all channels of all samples where they are.
_MOVES = (Move.COPY, Move.RESHAPE, Move.PERMUTATION, Move.UNIT_DIMS)


@dataclass(frozen=True)
class Writer:
    """A parameter that makes what a batch norm is given.

    Attributes:
        parameter: its name.
        dim: the dim along which it holds the channels.
        rows: the position of each of the batch norm's channels along it.
    """

    parameter: str
    dim: int
    rows: Indices


@dataclass(frozen=True)
class InnerNorm:
    """A batch norm with running statistics and gains that alone reads what a layer writes.

    Attributes:
        call: the op.
        layer: the op that writes.
        writers: the weight of the layer, and its bias if it has one.
        weight: the name of the batch norm's gain, one per channel.
        bias: and of what it adds.
        mean: and of the running mean that it takes off.
        variance: and of the running variance by which it divides.
        eps: what is added to the variance.
    """

    call: OpCall
    layer: OpCall
    writers: tuple[Writer, ...]
    weight: str
    bias: str
    mean: str
    variance: str
    eps: float

    @property
    def scales(self) -> frozenset[str]:
        """What scales each channel alone."""
        return frozenset({self.weight, self.variance})

    @property
    def vectors(self) -> frozenset[str]:
        """All parameters and buffers of the batch norm."""
        return self.scales | {self.bias, self.mean}


def inner_norms(wiring: Wiring, calls: Sequence[OpCall], paths: Mapping[str, Origins]) -> list[InnerNorm] | None:
    """Return the batch norms among some ops; None where one is not right behind a layer, or shares what it has.

    Args:
        wiring: that of the graph.
        calls: all ops that see the channels of a group, in order.
        paths: where the channels of each parameter go, by its name.
    """
    found = [_inner_norm(wiring, call, paths) for call in calls if running_norm(call.func)]
    whole = [norm for norm in found if norm is not None]
    return whole if len(whole) == len(found) else None


def _inner_norm(wiring: Wiring, call: OpCall, paths: Mapping[str, Origins]) -> InnerNorm | None:
    layer, family = _layer_of(wiring, call), running_norm(call.func)
    if layer is None or family is None or family.by_own_batch(call.arguments):
        return None
    writers = []
    for argument in _parameters_of(layer.func):
        if layer.arguments.get(argument) is None:
            continue
        name = _sole_parameter(wiring, layer, argument)
        path = None if name is None else paths.get(name)
        rows = None if path is None else path.along(call.arguments["input"], 1)
        if path is None or rows is None:
            return None
        writers.append(Writer(path.parameter, path.dim, rows.numpy()))
    vectors = "weight", family.bias, family.mean, family.variance
    weight, bias, mean, variance = (_sole_parameter(wiring, call, argument) for argument in vectors)
    if weight is None or bias is None or mean is None or variance is None:
        return None
    eps = float(call.arguments[family.eps])
    return InnerNorm(call, layer, tuple(writers), weight, bias, mean, variance, eps)


def _parameters_of(func: OpOverload) -> tuple[str, ...]:
    """Return under which names an op takes the parameters of a layer; none if it is no layer."""
    match family_of(func):
        case Convolution():
            return "weight", "bias"
        case Product() as product if product.is_of_matrices and len(product.terms[2]) == 2:
            return (product.right,) if product.added is None else (product.right, product.added)
        case _:
            return ()


def _sole_parameter(wiring: Wiring, call: OpCall, argument: str) -> str | None:
    """Return the parameter that an op is given under a name, if all of it is, and it is used nowhere else."""
    tensor = call.arguments.get(argument)
    view = None if tensor is None else wiring.view(tensor)
    if tensor is None or view is None:
        return None
    if len(wiring.uses.get(view.parameter, [])) != 1 or view.parameter in wiring.shown:
        return None
    whole = wiring.analysis.parameters[view.parameter].tensor
    return view.parameter if tensor.numel() == whole.numel() else None


def _layer_of(wiring: Wiring, call: OpCall) -> OpCall | None:
    """Return the layer whose result a batch norm alone reads."""
    tape, outputs = def_use(wiring.analysis), wiring.analysis.outputs
    tensor = call.arguments["input"]
    while len(tape.consumers_of(tensor)) == 1 and not any(tensor is output for output in outputs):
        maker = tape.producers.get(tensor)
        if maker is None or _parameters_of(maker.func):
            return maker
        if not is_move(maker.func, *_MOVES) or len(maker.outputs) != 1:
            return None
        tensor = maker.arguments["self"]
    return None
