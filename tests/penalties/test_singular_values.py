"""The terms of a penalty on singular values, against numpy's decomposition, and their gradients where it has none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fxwidth.penalties.singular_values import _RowGram, spectral_term

SHAPES = [(5, 12), (12, 5), (6, 6), (1, 4), (4, 1), (1, 1)]


def drawn(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_numpy(matrix: Tensor, sparsity: str | None, orthogonality: float) -> float:
    plain = matrix.numpy()
    values = np.linalg.svd(plain, compute_uv=False)
    gram = plain @ plain.T
    parts = {"l1": values.sum(), "hoyer": values.sum() / np.sqrt((values**2).sum()), None: 0.0}
    off = gram - np.diag(np.diag(gram))
    return float(parts[sparsity] + orthogonality * len(plain) * (off**2).sum() / (gram**2).sum())


PARTS = [("l1", 0.0), ("hoyer", 0.0), (None, 1.0), ("l1", 0.3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("sparsity", "orthogonality"), PARTS)
def test_values(shape: tuple[int, int], sparsity: str | None, orthogonality: float) -> None:
    matrix = 3 * drawn(*shape)
    found = spectral_term([matrix], sparsity, orthogonality)
    assert float(found) == pytest.approx(by_numpy(matrix, sparsity, orthogonality), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_matrices_side_by_side_are_one(shape: tuple[int, int]) -> None:
    parts = [drawn(*shape, seed) for seed in range(3)]
    whole, apart = (spectral_term(one, "l1", 0.5) for one in ([torch.cat(parts, 1)], parts))
    torch.testing.assert_close(apart, whole, rtol=1e-12, atol=0)


def equal_values(rows: int, columns: int) -> Tensor:
    """Return a matrix whose singular values are all the same."""
    return 2 * torch.linalg.qr(drawn(max(rows, columns), min(rows, columns)))[0].reshape(max(rows, columns), -1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("sparsity", "orthogonality"), PARTS)
def test_gradients(shape: tuple[int, int], sparsity: str | None, orthogonality: float) -> None:
    def term(matrix: Tensor) -> Tensor:
        return spectral_term([matrix], sparsity, orthogonality)

    assert gradcheck(term, drawn(*shape).requires_grad_())
    equal = equal_values(*shape)
    assert gradcheck(term, (equal if equal.shape == shape else equal.T.contiguous()).requires_grad_())


def test_the_gradient_of_a_gram_matrix() -> None:
    matrix = drawn(4, 7).requires_grad_()
    assert gradcheck(_RowGram.apply, matrix)
    assert gradgradcheck(_RowGram.apply, matrix)


def zero_row(matrix: Tensor) -> None:
    matrix[1] = 0


def repeated_rows(matrix: Tensor) -> None:
    matrix[2] = matrix[0]
    matrix[3] = -2 * matrix[1]


def one_row_alone(matrix: Tensor) -> None:
    matrix[1:] = 0


def one_direction(matrix: Tensor) -> None:
    matrix[:] = matrix[:, :1] @ matrix[:1]


def nothing(matrix: Tensor) -> None:
    matrix.zero_()


def next_to_nothing(matrix: Tensor) -> None:
    matrix *= 1e-25


def huge(matrix: Tensor) -> None:
    matrix *= 1e15


DEGENERATE = [zero_row, repeated_rows, one_row_alone, one_direction, nothing, next_to_nothing, huge]


@pytest.mark.parametrize("degrade", DEGENERATE, ids=lambda one: one.__name__)
@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (6, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_and_bounded(degrade: object, shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = drawn(*shape).to(dtype)
    assert callable(degrade)
    degrade(matrix)
    for sparsity, orthogonality in PARTS:
        matrix.grad = None
        value = spectral_term([matrix.requires_grad_()], sparsity, orthogonality)
        value.backward()
        assert matrix.grad is not None
        assert value.isfinite()
        assert matrix.grad.isfinite().all()
        if sparsity == "l1" and not orthogonality:
            # The gradient of the sum of singular values has none above one, but for what rounding off adds.
            assert float(torch.linalg.matrix_norm(matrix.grad, 2)) < 1.1
        matrix = matrix.detach()


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("shape", [(5, 12), (12, 5)])
def test_directions_that_are_not_there_get_no_gradient(rank: int, shape: tuple[int, int]) -> None:
    left, values, right = torch.linalg.svd(drawn(*shape), full_matrices=False)
    matrix = (left[:, :rank] * values[:rank]) @ right[:rank]
    matrix.requires_grad_()
    spectral_term([matrix], "l1", 0).backward()
    torch.testing.assert_close(matrix.grad, left[:, :rank] @ right[:rank], rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_what_is_lost_in_rounding_is_not_pulled_at(shape: tuple[int, int]) -> None:
    # A Gram matrix in single precision does not tell whether such values are there.
    values = torch.logspace(0, -5, 24, dtype=torch.float64)
    for seed in range(20):
        left, _, right = torch.linalg.svd(drawn(*shape, seed), full_matrices=False)
        matrix = ((left * values) @ right).float().requires_grad_()
        spectral_term([matrix], "l1", 0).backward()
        assert matrix.grad is not None
        assert float(torch.linalg.matrix_norm(matrix.grad, 2)) < 1.2
