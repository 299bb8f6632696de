"""Directions for new channels: one table of methods, ours and those of users."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fxwidth.errors import FxwidthError
from fxwidth.registration import name_of, refuse_name, refuse_unknown


@dataclass(frozen=True)
class TaskMoments:
    """What data and a loss tell of new channels of a group; fields that a method has not asked for are None.

    A new channel has one row, its entries in all weights that write it, side by side, and what reads it has one column
    of entries. All are means over samples, in double precision.

    Attributes:
        inputs_second: E h h^T of what the rows are multiplied with, one for each weight that writes the channels, in
            the order of their columns, [columns of the weight, columns of the weight].
        cross: minus the derivative of the loss by a row and by what reads it, [columns, entries of readers]: a row `a`
            and reading entries `b`, both small, lower the loss by `a @ cross @ b`.
        residual: the same with the gradients at the readers' outputs but for what their present inputs explain of them.

    Example:
        >>> seen = fxwidth.TaskMoments(cross=torch.tensor([[0.0, 3.0], [1.0, 0.0]]))
        >>> left, _, _ = torch.linalg.svd(seen.cross)
        >>> left[:, 0].abs()  # the row by which a small step of its readers lowers the loss most
        tensor([1., 0.])
    """

    inputs_second: tuple[Tensor, ...] | None = None
    cross: Tensor | None = None
    residual: Tensor | None = None

    def __repr__(self) -> str:
        known = [one.name for one in fields(self) if getattr(self, one.name) is not None]
        return f"<TaskMoments: {', '.join(known) or 'none'}>"


# (rows [channels, columns], how many to make, a source of random numbers) -> new rows [count, columns]; those that
# need moments of the task are given these too.
Directions = Callable[..., Tensor]
# A method by its name, or a function.
Direction = str | Directions

DIRECTIONS: dict[str, Directions] = {}
# The fields of `TaskMoments` that a method needs, by its name.
NEEDS: dict[str, frozenset[str]] = {}
# The noise on a copy of a channel, in units of its length.
_NOISE = 0.01
# Of the Gram matrix of rows rounded to float32, an eigenvalue below this share of the largest is rounding.
_NEGLIGIBLE = 1e-12


def growth_direction(name: str, *, needs: Collection[str] = ()) -> Callable[[Directions], Directions]:
    """Register a function as a method of growth, for `directions=name` in all that takes it.

    The function is called for each parameter in which new channels may be anything, as
    `function(rows, count, generator)`: `rows` [channels, columns] is what it holds for the present channels, one row
    each, in single or double precision and in units of its largest entry, `count` how many new rows are wanted, and
    `generator` a seeded source of random numbers on the CPU. It returns the new rows, [count, columns]. What other
    parameters hold of a new channel follows from the recipe that keeps the function as it is.

    A method that looks at the task says what it needs, and is called as `function(rows, count, generator, seen)`, once
    for each growing group: a row is that of all weights that write a channel, side by side, and `seen` a
    `fxwidth.TaskMoments`. New rows are brought to the present ones' mean norm in each weight. `data=` and `loss=` must
    be given then. Where the moments of a weight cannot be taken, "orthogonal" takes the place of the method.

    Args:
        name: a name that is not taken.
        needs: the fields of `fxwidth.TaskMoments` that the function reads.

    Raises:
        FxwidthError: the name is no text, or taken, or there is no such field.

    Example:
        >>> @fxwidth.growth_direction("near the mean")
        ... def near_the_mean(rows, count, generator):
        ...     noise = torch.randn(count, rows.shape[1], generator=generator).to(rows)
        ...     return rows.mean(0, keepdim=True) + 0.01 * noise
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> fxwidth.resize(gm, {"0": 18}, directions="near the mean").get_parameter("0.weight").shape
        torch.Size([18, 8])
        >>> @fxwidth.growth_direction("steepest", needs=["cross"])
        ... def steepest(rows, count, generator, seen):
        ...     return torch.linalg.svd(seen.cross)[0].T[:count]
        >>> data = [(torch.randn(16, 8), torch.randn(16, 4)) for _ in range(4)]
        >>> loss = torch.nn.functional.mse_loss
        >>> fxwidth.resize(gm, {"0": 20}, directions="steepest", data=data, loss=loss).get_parameter("0.weight").shape
        torch.Size([20, 8])
    """
    refuse_name(DIRECTIONS, name, "growth_direction")
    known = [field.name for field in fields(TaskMoments)]
    if isinstance(needs, str) or any(need not in known for need in needs):
        raise FxwidthError(f"growth_direction({name!r}): needs={needs!r} must name some of {', '.join(known)}.")

    def registering(function: Directions) -> Directions:
        DIRECTIONS[name] = function
        NEEDS[name] = frozenset(needs)
        return function

    return registering


def check_directions(directions: Direction) -> Direction:
    """Return a method of growth.

    Raises:
        FxwidthError: there is no such method.
    """
    refuse_unknown(DIRECTIONS, directions, "directions", "(rows, count, generator) -> new rows")
    return directions


def needs_of(directions: Direction) -> frozenset[str]:
    """Return which fields of `TaskMoments` a method needs; none where it does not look at the task."""
    return NEEDS.get(directions, frozenset()) if isinstance(directions, str) else frozenset()


def new_rows(
    directions: Direction, rows: Tensor, count: int, generator: torch.Generator, seen: TaskMoments | None = None
) -> Tensor:
    """Return new rows by a method, [count, columns]; by "orthogonal" where it needs moments that there are not.

    Raises:
        FxwidthError: what the method gives has another shape, or is not finite.
    """
    check_directions(directions)
    if needs_of(directions) and seen is None:
        directions = "orthogonal"
    method = DIRECTIONS[directions] if isinstance(directions, str) else directions
    made = method(rows, count, generator, seen) if seen is not None else method(rows, count, generator)
    return _checked(made, rows, count, directions)


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
    return made * mean_norm(rows)


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
    return torch.nn.functional.normalize(made, dim=1) * mean_norm(rows)


def mean_norm(rows: Tensor) -> Tensor:
    """Return the mean norm of rows; one where there is none, or all are zero."""
    norm = torch.linalg.vector_norm(rows, dim=1).mean() if len(rows) else rows.new_zeros(())
    # Rows of a layer that starts at zero say nothing about a scale; a row of norm one keeps the size of its input.
    scale: Tensor = torch.where(norm > 0, norm, torch.ones_like(norm))
    return scale


@growth_direction("split")
def split_directions(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return copies of the present rows, the longest first, with a little noise by which a copy and its source part.

    The source halves what reads the two; here the source keeps its readers and the copy begins with none, which is as
    exact, and stays so where copies of gains and statistics would not be.

    Args:
        rows: [channels, columns], in single or double precision.
        count: how many to make.
        generator: a source of random numbers on the CPU.

    Source: Chen, Goodfellow and Shlens, Net2Net: Accelerating Learning via Knowledge Transfer, 2016.
    """
    noise = torch.randn(count, rows.shape[1], generator=generator, dtype=torch.float64, device="cpu").to(rows)
    noise = torch.nn.functional.normalize(noise, dim=1)
    if not len(rows):
        return noise
    longest = torch.linalg.vector_norm(rows, dim=1).argsort(descending=True, stable=True)
    copied = rows[longest[torch.arange(count, device=rows.device) % len(rows)]]
    return copied + _NOISE * mean_norm(rows) * noise
