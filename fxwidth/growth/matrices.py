"""How new channels pass linear algebra on batches of matrices, and diagonals."""

from __future__ import annotations

import torch
from torch import Tensor

from fxwidth.growth.call_view import CallView
from fxwidth.growth.states import ALL_ZERO, CONSTANT, State
from fxwidth.growth.transfers import Result, family_transfer, transfer
from fxwidth.rules.family_table import as_family
from fxwidth.rules.matrices import SIDES, free_side
from fxwidth.rules.op_families import Matrices

aten = torch.ops.aten


@family_transfer(Matrices)
def _matrices(c: CallView) -> Result:
    """Let matrices of new channels through where each has a result, or all are one."""
    family = as_family(c.call.func, Matrices)
    if all(c.states(tensor)[dim] & State.UNIFORM for tensor, dim in _carrying(c)):
        return c.everywhere(CONSTANT)
    if family is None or family.regular:
        c.refuse("there may be no result for matrices of new channels")
    return c.everywhere(State.ANY)


def _carrying(c: CallView) -> list[tuple[Tensor, int]]:
    """Return the dims of all operands that carry the factor."""
    return [(tensor, dim) for tensor in c.call.inputs for dim in c.carrying(tensor)]


@transfer(aten._linalg_solve_ex, aten.linalg_solve_triangular, aten.cholesky_solve, aten.triangular_solve)
def _solved(c: CallView) -> Result:
    """Let new right-hand sides through, of which each solution is a sum of products with numbers."""
    free, (_, sides) = free_side(c.call), SIDES[c.call.name]
    if free is None or c.carrying(sides) != [len(c.axes(sides)) + free] or len(_carrying(c)) > 1:
        return _matrices(c)
    state, (first, *rest) = c.states(sides)[free], c.everywhere(CONSTANT)
    return [[state if dim == len(first) + free else CONSTANT for dim in range(len(first))], *rest]


@transfer(aten.diag_embed)
def _diag_embed(c: CallView) -> Result:
    *rest, own = c.states("self")
    # Beside the diagonal they are zero, whatever is on it.
    state = ALL_ZERO if own == ALL_ZERO else own & State.ZERO
    for dim in sorted(c[name] % (len(rest) + 2) for name in ("dim1", "dim2")):
        rest.insert(dim, state)
    return [rest]


@transfer(aten.diagonal, aten.diagonal_copy)
def _diagonal(c: CallView) -> Result:
    states = c.states("self")
    own = [c[name] % len(states) for name in ("dim1", "dim2")]
    on_it = (states[own[0]] | states[own[1]]) & State.ZERO
    return [[*(state for dim, state in enumerate(states) if dim not in own), on_it]]
