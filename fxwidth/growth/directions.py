"""Directions for new channels: one table of methods, ours and those of users."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxwidth.errors import FxwidthError
from fxwidth.registration import name_of, refuse_name, refuse_unknown

# (rows [channels, columns], how many to make, a source of random numbers) -> new rows [count, columns].
Directions = Callable[[Tensor, int, torch.Generator], Tensor]
# A method by its name, or a function.
Direction = str | Directions

DIRECTIONS: dict[str, Directions] = {}
# Of the Gram matrix of rows rounded to float32, an eigenvalue below this share of the largest is rounding.
_NEGLIGIBLE = 1e-12


def growth_direction(name: str) -> Callable[[Directions], Directions]:
    """Register a function as a method of growth, for `directions=name` in all that takes it.

    The function is called for each parameter in which new channels may be anything, as
    `function(rows, count, generator)`: `rows` [channels, columns] is what it holds for the present channels, one row
    each, in single or double precision and in units of its largest entry, `count` how many new rows are wanted, and
    `generator` a seeded source of random numbers on the CPU. It returns the new rows, [count, columns]. What other
    parameters hold of a new channel follows from the recipe that keeps the function as it is.

    Args:
        name: a name that is not taken.

    Raises:
        FxwidthError: the name is no text, or taken.

    Example:
        >>> @fxwidth.growth_direction("near the mean")
        ... def near_the_mean(rows, count, generator):
        ...     noise = torch.randn(count, rows.shape[1], generator=generator).to(rows)
        ...     return rows.mean(0, keepdim=True) + 0.01 * noise
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> fxwidth.resize(gm, {"0": 18}, directions="near the mean").get_parameter("0.weight").shape
        torch.Size([18, 8])
    """
    refuse_name(DIRECTIONS, name, "growth_direction")

    def registering(function: Directions) -> Directions:
        DIRECTIONS[name] = function
        return function

    return registering


def check_directions(directions: Direction) -> Direction:
    """Return a method of growth.

    Raises:
        FxwidthError: there is no such method.
    """
    refuse_unknown(DIRECTIONS, directions, "directions", "(rows, count, generator) -> new rows")
    return directions


def new_rows(directions: Direction, rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return new rows by a method, [count, columns].

    Raises:
        FxwidthError: what the method gives has another shape, or is not finite.
    """
    check_directions(directions)
    method = DIRECTIONS[directions] if isinstance(directions, str) else directions
    return _checked(method(rows, count, generator), rows, count, directions)


def _checked(made: Any, rows: Tensor, count: int, directions: Direction) -> Tensor:
    name = name_of(directions)
    shape = (count, rows.shape[1])
    if not isinstance(made, Tensor) or made.shape != shape:
        form = f"a tensor of shape {list(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
        raise FxwidthError(
            f"directions={name!r} gave {form} for {len(rows)} present rows; return {count} new rows, {list(shape)}."
        )
    if not bool(made.isfinite().all()):
        raise FxwidthError(f"directions={name!r} gave numbers that are not finite (NaN or infinity).")
    return made.detach().to(rows)


@growth_direction("orthogonal")
def orthogonal_directions(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return new rows orthogonal to the present ones and to each other, of the present ones' mean norm.

    Once nothing is left to be orthogonal to, the rest are random.

    Args:
        rows: [channels, columns], in single or double precision.
        count: how many to make.
        generator: a source of random numbers on the CPU.

    Source: the orthogonal complement of the row space, as in SVD evolutive CNN, Jérome Dejaegher, 2021.
    """
    random = torch.randn(count, rows.shape[1], generator=generator, dtype=torch.float64, device="cpu").to(rows)
    basis = _row_space(rows)
    room = min(count, rows.shape[1] - basis.shape[1])
    made = random[:room]
    if room > 0:
        for _ in range(2):  # the second pass takes away what rounding left in the first
            made = made - (made @ basis) @ basis.T
        made = torch.linalg.qr(made.T).Q.T
    made = torch.cat([made, torch.nn.functional.normalize(random[max(room, 0) :], dim=1)])
    return made * _mean_norm(rows)


def _row_space(rows: Tensor) -> Tensor:
    """Return an orthonormal basis, [columns, rank], of a space that holds all rows."""
    if rows.shape[0] < rows.shape[1]:
        basis: Tensor = torch.linalg.qr(rows.T).Q
        return basis
    # More rows than columns: only a spectrum tells whether there is room; the Gram matrix is the smaller problem.
    wide = rows if rows.device.type == "mps" else rows.double()
    energies, vectors = torch.linalg.eigh(wide.T @ wide)
    spanned: Tensor = vectors[:, energies > _NEGLIGIBLE * energies[-1]]
    return spanned.to(rows)


@growth_direction("random")
def random_directions(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return new rows in random directions, of the present ones' mean norm.

    Args:
        rows: [channels, columns], in single or double precision.
        count: how many to make.
        generator: a source of random numbers on the CPU.
    """
    made = torch.randn(count, rows.shape[1], generator=generator, dtype=torch.float64, device="cpu").to(rows)
    return torch.nn.functional.normalize(made, dim=1) * _mean_norm(rows)


def _mean_norm(rows: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(rows, dim=1).mean() if len(rows) else rows.new_zeros(())
    # Rows of a layer that starts at zero say nothing about a scale; a row of norm one keeps the size of its input.
    scale: Tensor = torch.where(norm > 0, norm, torch.ones_like(norm))
    return scale
