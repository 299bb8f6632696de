"""The table of which op is of which family, and the questions that several packages ask of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch._ops import OpOverload

from fxwidth.rules.op_families import (
    Arithmetic,
    Attention,
    Bags,
    Cell,
    ChannelCopies,
    Convolution,
    Distances,
    Elementwise,
    FakeQuantization,
    Family,
    GroupedProduct,
    LookUp,
    Move,
    Movement,
    Norm,
    NormKind,
    Product,
    SampledConvolution,
    WeightNorm,
)
from fxwidth.rules.op_names import Op, op_name, rule_name

_Family = TypeVar("_Family", bound=Family)

FAMILIES: dict[str, Family] = {}


def declare(family: Family, *ops: Op) -> None:
    """Say to which family ops belong.

    Raises:
        ValueError: that has been said of one of them already, or it has no operand of a name that the family gives.
    """
    names = [op_name(op) for op in ops]
    for name in names:
        if name in FAMILIES:
            raise ValueError(f"{name} is declared already")
        _check_names(family, name)
    FAMILIES.update(dict.fromkeys(names, family))


def family_of(func: OpOverload) -> Family | None:
    """Return the family of an op, if it is declared."""
    return FAMILIES.get(rule_name(func))


def as_family(func: OpOverload, kind: type[_Family]) -> _Family | None:
    """Return the family of an op if it is one of a kind."""
    family = FAMILIES.get(rule_name(func))
    return family if isinstance(family, kind) else None


def _check_names(family: Family, name: str) -> None:
    namespace, _, own = name.rpartition("::")
    packet = getattr(getattr(torch.ops, namespace or "aten"), own, None)
    if packet is None:
        return  # of a library that is not loaded
    for wanted in _operand_names(family):
        overloads = [getattr(packet, overload) for overload in packet.overloads()]
        if not any(argument.name == wanted for overload in overloads for argument in overload._schema.arguments):
            raise ValueError(f"{name} has no argument {wanted!r}: {overloads[0]._schema}")


def _operand_names(family: Family) -> Iterable[str]:
    match family:
        case Product():
            return filter(None, (family.left, family.right, family.added))
        case GroupedProduct():
            return family.left, family.right
        case Norm():
            training = family.training if isinstance(family.training, str) else ""
            return filter(None, ("input", "weight", family.bias, family.mean, family.variance, family.eps, training))
        case LookUp() | Bags():
            return family.table, family.index
        case Distances():
            return "x1", "x2"
        case FakeQuantization(axis=axis):
            return ("self", axis) if axis else ("self",)
        case SampledConvolution():
            return "input", "weight", "bias"
        case WeightNorm():
            return "v", "g"
        case Convolution():
            return "input", "weight", "bias", "transposed", "groups"
        case Attention():
            return "query", "key", "value"
        case ChannelCopies():
            return "self", "table", "dim"
        case _:
            return ()


# -- questions that several packages ask -------------------------------------------------------------------------------


def is_move(func: OpOverload, *kinds: Move) -> bool:
    """Tell whether an op is a movement of one of some kinds."""
    family = FAMILIES.get(rule_name(func))
    return isinstance(family, Movement) and family.kind in kinds


def is_arithmetic(func: OpOverload, *kinds: Arithmetic) -> bool:
    """Tell whether an op is elementwise and of one of some kinds."""
    family = FAMILIES.get(rule_name(func))
    return isinstance(family, Elementwise) and family.kind in kinds


def takes_rows(func: OpOverload, argument: str) -> bool:
    """Tell whether an operand of a product is given rows that are samples, and has an own entry for each output.

    What is added to the result along its last dim then has one entry for each of these.
    """
    match FAMILIES.get(rule_name(func)):
        case Convolution():
            return argument == "weight"
        case GroupedProduct(right=right):
            return argument == right
        case Product() as product:
            return argument == product.right and product.is_of_matrices
        case _:
            return False


def channel_norm(func: OpOverload) -> Norm | None:
    """Return the family of a layer or RMS norm: its statistics are over the channels of each sample."""
    norm = as_family(func, Norm)
    return norm if norm is not None and norm.kind in (NormKind.LAYER, NormKind.RMS) else None


def running_norm(func: OpOverload) -> Norm | None:
    """Return the family of a batch norm that may normalise by running statistics."""
    norm = as_family(func, Norm)
    return norm if norm is not None and norm.kind is NormKind.BATCH and norm.training is not True else None


def adds(func: OpOverload) -> bool:
    """Tell whether what an op takes beside the channels becomes a part of them, and does not scale them."""
    match FAMILIES.get(rule_name(func)):
        case Elementwise(kind):
            return kind not in (Arithmetic.PRODUCT, Arithmetic.QUOTIENT)
        case Movement(kind):
            return kind is Move.JOIN
        case LookUp(slices=slices):
            return slices
        case Cell() | Bags() | Distances():
            return True
        case _:
            return False
