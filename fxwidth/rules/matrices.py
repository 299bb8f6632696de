"""Linear algebra on batches of matrices: the batch goes through; and diagonals of matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxwidth.axes.factors import Axis, axis_size
from fxwidth.axes.pins import MATRIX
from fxwidth.recording.tape import OpCall
from fxwidth.rules.op_families import Matrices
from fxwidth.rules.registry import RuleContext, rule

aten = torch.ops.aten

# How many of the last dims of an operand are of one matrix, where not two are.
_OWN_DIMS = {"tau": 1, "LU_pivots": 1, "atol": 0, "rtol": 0}

_OF_ANY = rule(
    *(aten._linalg_det, aten.linalg_qr, aten._linalg_svd, aten._linalg_eigh, aten.linalg_eig, aten._linalg_eigvals),
    *(aten.linalg_matrix_exp, aten.linalg_householder_product, aten.linalg_pinv),
    family=Matrices(),
)
_OF_REGULAR = rule(
    *(aten.linalg_inv_ex, aten.linalg_cholesky_ex, aten.cholesky_inverse, aten._linalg_slogdet, aten.lu_unpack),
    *(aten.linalg_lu_factor_ex, aten.linalg_lu, aten.linalg_ldl_factor_ex),
    family=Matrices(regular=True),
)

# By which names equations have their matrices and their right-hand sides.
SIDES = {
    "_linalg_solve_ex": ("A", "B"),
    "linalg_solve_triangular": ("self", "B"),
    "cholesky_solve": ("input2", "self"),
    "triangular_solve": ("A", "self"),
}


@_OF_ANY
@_OF_REGULAR
def _matrices(c: RuleContext) -> Sequence[Sequence[Axis]]:
    """Couple the dims before those of the matrices, which are broadcast; what is known of a matrix is of all of it."""
    leads = []
    for name, operand in c.call.arguments.items():
        if isinstance(operand, Tensor):
            axes = c.axes(operand)
            own = len(axes) - _OWN_DIMS.get(name, 2)
            c.pin(axes[own:], MATRIX)
            leads.append(axes[:own])
    lead = c.broadcast(leads)
    return [_of_each(c, lead, output) for output in c.outputs]


@rule(
    *(aten._linalg_solve_ex, aten.linalg_solve_triangular, aten.cholesky_solve, aten.triangular_solve),
    family=Matrices(regular=True),
)
def _solved(c: RuleContext) -> Sequence[Sequence[Axis]]:
    """Solve A X = B, or X A = B: each column of B, or each row, is one of X."""
    matrices, sides = (c.axes(name) for name in SIDES[c.call.name])
    free = free_side(c.call)
    lead = c.broadcast([matrices[:-2], sides[: len(sides) - (1 if free is None else 2)]])
    c.pin([*matrices[-2:], *(sides[-1:] if free is None else [sides[-3 - free]])], MATRIX)
    result = _of_each(c, lead, c.outputs[0])
    if free is not None:
        result[free] = sides[free]
    return [result, *(_of_each(c, lead, output) for output in c.outputs[1:])]


def free_side(call: OpCall) -> int | None:
    """Return which dim of right-hand sides numbers these, from the end; None where each is one vector."""
    arguments = call.arguments
    matrices, sides = (arguments[name].shape for name in SIDES[call.name])
    if call.name == "_linalg_solve_ex" and (len(sides) == 1 or sides == matrices[:-1]):
        return None
    return -1 if arguments.get("left", True) else -2


def _of_each(c: RuleContext, lead: list[Axis], output: Tensor) -> list[Axis]:
    """Return the axes of a result that has something for each matrix; what was not asked for is empty."""
    if tuple(output.shape[: len(lead)]) != tuple(map(axis_size, lead)):
        return [c.fixed(size, MATRIX) for size in output.shape]
    return [*lead, *(c.fixed(size, MATRIX) for size in output.shape[len(lead) :])]


@rule(aten.diag_embed)
def _diag_embed(c: RuleContext) -> Sequence[Sequence[Axis]]:
    """Put the last dim on the diagonal of two dims, which are zero beside it."""
    *rest, axis = c.axes("self")
    if c["offset"] != 0:
        c.pin([axis], MATRIX)
        axis = c.fixed(axis_size(axis) + abs(c["offset"]), MATRIX)
    rank = len(rest) + 2
    for dim in sorted(c.dim(c[name], rank) for name in ("dim1", "dim2")):
        rest.insert(dim, axis)
    return [rest]


@rule(aten.diagonal, aten.diagonal_copy)
def _diagonal(c: RuleContext) -> Sequence[Sequence[Axis]]:
    """Take the diagonal of two dims, which becomes the last dim."""
    signal = c.axes("self")
    own = [c.dim(c[name], len(signal)) for name in ("dim1", "dim2")]
    one, other = (signal[dim] for dim in own)
    rest = [axis for dim, axis in enumerate(signal) if dim not in own]
    if c["offset"] == 0 and axis_size(one) == axis_size(other):
        c.unify(one, other)
        return [[*rest, c.space.normalise(one)]]
    c.pin([one, other], MATRIX)
    return [[*rest, c.fixed(c.outputs[0].shape[-1], MATRIX)]]
