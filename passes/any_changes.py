"""What passes of others may change in ways of their own, as it was before."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxwidth.passes.width_pass import members
from fxwidth.rewriting.optimizers import optimizers_in
from fxwidth.rewriting.transaction import Transaction
from fxwidth.runtime.kept_objects import Kept
from fxwidth.runtime.module_state import walk
from fxwidth.runtime.tensor_slots import overwrite, tensor_slots


def keep_all(graph_module: fx.GraphModule, steps: Sequence[object], transaction: Transaction) -> None:
    """Have a transaction put back what code of any kind may do to a graph, its tensors and optimizers.

    The values of all tensors are copied, and the graph goes on with copies of its nodes.

    Args:
        graph_module: the graph, before anything has changed.
        steps: the passes, which tell of optimizers and companions.
        transaction: has all of these.
    """
    passes = list(members(steps))
    modules = [graph_module, *(one for step in passes for one in step.companions)]
    tensors = [tensor for module in modules for tensor, _ in tensor_slots(module).values()]
    optimizers = [one for step in passes for one in optimizers_in(step.optimizer)]
    states = [leaf for one in optimizers for leaf in pytree.tree_leaves(list(one.state.values()))]
    tensors += [leaf for leaf in states if isinstance(leaf, Tensor)]
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        transaction.undo.callback(_KeptTensor.of(tensor).put_back, tensor)
    notes = Kept()
    for module in modules:
        notes.add_value(module.__dict__.get("meta", {}))
    transaction.undo.callback(notes.put_back, lambda _: True)
    for _, part in walk(graph_module):
        if isinstance(part, fx.GraphModule):
            part.graph = copy.deepcopy(part.graph)


@dataclass(frozen=True)
class _KeptTensor:
    """A tensor as it is: its memory, values, gradient, attributes and hooks."""

    memory: Tensor
    values: Tensor
    gradient: Tensor | None
    gradient_values: Tensor | None
    requires_grad: bool
    attributes: dict[str, Any]
    hooks: tuple[dict[int, Any] | None, dict[int, Any] | None]

    @staticmethod
    def of(tensor: Tensor) -> _KeptTensor:
        gradient = tensor.grad if tensor.is_leaf else None
        return _KeptTensor(
            tensor.detach(),
            tensor.detach().clone(),
            gradient,
            None if gradient is None else gradient.detach().clone(),
            tensor.requires_grad,
            dict(vars(tensor)),
            (_copied(tensor._backward_hooks), _copied(tensor._post_accumulate_grad_hooks)),
        )

    def put_back(self, tensor: Tensor) -> None:
        """Make a tensor what it was."""
        if tensor.layout is torch.strided and _place(tensor) != _place(self.memory):
            tensor.data = self.memory
        overwrite(self.memory, self.values)
        if tensor.is_leaf:
            tensor.requires_grad_(self.requires_grad)
            if tensor.grad is not self.gradient:
                tensor.grad = self.gradient
            if self.gradient is not None and self.gradient_values is not None:
                overwrite(self.gradient, self.gradient_values)
        vars(tensor).clear()
        vars(tensor).update(self.attributes)
        names = ("_backward_hooks", "_post_accumulate_grad_hooks")
        for name, kept in zip(names, self.hooks, strict=True):
            present = getattr(tensor, name)
            if kept is None or present is None:
                if present is not kept:
                    setattr(tensor, name, kept)
            elif list(present.items()) != list(kept.items()):
                present.clear()
                present.update(kept)


def _copied(hooks: dict[int, Any] | None) -> dict[int, Any] | None:
    return None if hooks is None else hooks.copy()


def _place(tensor: Tensor) -> tuple[Any, ...]:
    own = tensor.untyped_storage()._cdata
    return own, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()
