"""Penalties on the singular values of matrices that lie side by side, from their Gram matrix, with finite gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _RowGram(torch.autograd.Function):
    """The product of a matrix with its transpose; its gradient takes one product where that of `W @ W.T` takes two."""

    @staticmethod
    def forward(matrix: Tensor) -> Tensor:
        product: Tensor = matrix @ matrix.T
        return product

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (matrix,) = ctx.saved_tensors
        (gradient,) = gradients
        result: Tensor = (gradient + gradient.T) @ matrix
        return result


def spectral_term(matrices: Sequence[Tensor], sparsity: str | None, orthogonality: float) -> Tensor:
    """Return the sparsity of the singular values of matrices side by side, and how far their rows are from orthogonal.

    The singular values are the roots of the eigenvalues of the smaller Gram matrix. As functions of these, sums over
    all of them have a gradient where some are equal too. A root has none at zero: it is rounded off below
    sqrt(eps) times the largest singular value, where a Gram matrix holds nothing but rounding, and directions that
    the matrix lacks get no gradient.

    Args:
        matrices: [rows, columns of each], of single or double precision.
        sparsity: "l1" for their sum, "hoyer" for that over their Euclidean norm, None for nothing.
        orthogonality: the factor of rows times the share of the squares of W W^T that are off its diagonal.
    """
    rows, columns = len(matrices[0]), sum(matrix.shape[1] for matrix in matrices)
    if columns < rows:
        stacked = torch.cat(list(matrices), 1)
        gram = _product(stacked.T)
        squared_lengths = stacked.square().sum(1)
    else:
        gram = _product(matrices[0])
        for matrix in matrices[1:]:
            gram = gram + _product(matrix)
        squared_lengths = gram.diagonal()
    energy = squared_lengths.sum().clamp_min(_smallest(gram))
    # Of energy one, so that no power of its entries is out of the range of numbers.
    unit = gram / energy
    result = gram.new_zeros(())
    if sparsity is not None:
        total = _roots(torch.linalg.eigvalsh(unit)).sum()
        result = result + (total if sparsity == "hoyer" else total * energy.sqrt())
    if orthogonality:
        # Both Gram matrices have the same sum of squares.
        whole = unit.square().sum().clamp_min(_smallest(gram))
        result = result + orthogonality * rows * (1 - (squared_lengths / energy).square().sum() / whole)
    return result


def _product(matrix: Tensor) -> Tensor:
    product: Tensor = _RowGram.apply(matrix)
    return product


def _roots(squares: Tensor) -> Tensor:
    """Return square roots, rounded off near zero: x / sqrt(x + floor)."""
    squares = squares.clamp_min(0)
    floor = torch.finfo(squares.dtype).eps * squares.detach().max() + _smallest(squares)
    return squares * (squares + floor).rsqrt()


def _smallest(tensor: Tensor) -> float:
    """Return a number that is as nothing, and whose inverse can still be multiplied with."""
    smallest: float = torch.finfo(tensor.dtype).tiny ** 0.5
    return smallest
