"""Tensors that take the place of others in a module: of the same class, layout, hooks and attributes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fxwidth.axes.index_maps import NEW, Indices
from fxwidth.errors import FxwidthError


def gather(tensor: Tensor, indices: Sequence[Indices | None]) -> Tensor:
    """Return the old entries of a tensor in their new places, zero where there was none.

    Args:
        tensor: any shape.
        indices: for each dim the old position of each new one, `NEW` for none, or None for a dim that stays.
    """
    for dim, kept in enumerate(indices):
        if kept is None:
            continue
        places = torch.from_numpy(np.maximum(kept, 0)).to(tensor.device)
        tensor = tensor.index_select(dim, places)
        new = np.flatnonzero(kept == NEW)
        if len(new):
            tensor = tensor.index_fill(dim, torch.from_numpy(new).to(tensor.device), 0)
    return tensor


def successor(name: str, old: Tensor, values: Tensor, indices: Sequence[Indices | None]) -> Tensor:
    """Return the parameter or buffer of other sizes that takes the place of one.

    Hooks are shared, so that their handles go on to work; a gradient keeps its layout.

    Args:
        name: that of the old one.
        old: any layout in memory.
        values: what the new one holds.
        indices: for each dim the old position of each new one, `NEW` for none, or None for a dim that stays.

    Raises:
        FxwidthError: it is of a class whose tensors cannot be made from values.
    """
    new = _like(old, values, name)
    if old.grad is not None:
        new.grad = _gradient(old.grad, indices)
    return new


def twin(old: Tensor, values: Tensor) -> Tensor:
    """Return a copy of a parameter or buffer with its gradient."""
    new = _like(old, values.detach().clone(), "")
    if old.grad is not None:
        new.grad = old.grad.clone()
    return new


def with_values(name: str, old: Tensor, values: Tensor) -> Tensor:
    """Return a parameter or buffer with other values of the same shape, of any dtype, in the place of one without.

    Raises:
        FxwidthError: it is of a class whose tensors cannot be made from values.
    """
    return _like(old, values, name)


def _like(old: Tensor, values: Tensor, name: str) -> Tensor:
    new = _laid_out(values.detach(), old)
    if isinstance(old, nn.Parameter) and type(old) in (nn.Parameter, type(new)):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    elif type(new) is not type(old):
        if hasattr(old, "__tensor_flatten__"):
            raise FxwidthError(
                f"{name} is a {type(old).__name__}, which cannot be made from the values of a plain tensor; "
                "resize the model before its parameters are wrapped, or keep their groups with keep=."
            )
        new = new.as_subclass(type(old))
    new.requires_grad_(old.requires_grad)
    vars(new).update(vars(old))
    if old._backward_hooks is not None:
        new._backward_hooks = old._backward_hooks
    if old._post_accumulate_grad_hooks is not None:
        new._post_accumulate_grad_hooks = old._post_accumulate_grad_hooks
    return new


def _laid_out(values: Tensor, old: Tensor) -> Tensor:
    """Return values whose dims lie in memory in the order of those of another tensor, with no gaps."""
    if values.layout != torch.strided or old.layout != torch.strided or values.dim() != old.dim():
        return values
    order = sorted(range(old.dim()), key=old.stride().__getitem__, reverse=True)
    if values.permute(order).is_contiguous():
        return values
    return torch.empty_permuted(values.shape, order, dtype=values.dtype, device=values.device).copy_(values)


def _gradient(old: Tensor, indices: Sequence[Indices | None]) -> Tensor:
    """Return the gradient of what has taken the place of a parameter, in the same layout."""
    if old.layout == torch.strided:
        return _laid_out(gather(old.detach(), indices), old)
    if old.layout == torch.sparse_coo and all(kept is None for kept in indices[: old.sparse_dim()]):
        # The same rows are on record, those that hold zeros too.
        values = gather(old._values(), [None, *indices[old.sparse_dim() :]])
        size = [*old.shape[: old.sparse_dim()], *values.shape[1:]]
        # The public function warns, in some versions of torch, of the checks that it is told not to make.
        new: Tensor = torch.ops.aten._sparse_coo_tensor_with_dims_and_tensors.default(
            old.sparse_dim(),
            old.dense_dim(),
            size,
            old._indices(),
            values,
            dtype=values.dtype,
            layout=old.layout,
            device=values.device,
            is_coalesced=old.is_coalesced(),
        )
        return new
    dense = gather(old.to_dense(), indices)
    return dense.to_sparse(old.sparse_dim()) if old.layout == torch.sparse_coo else dense.to_sparse(layout=old.layout)
