"""Runs of a model in the coverage sweeps: in either mode, from fixed seeds, forward and backward; nothing is kept."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.coverage_cases import Call
from fxwidth.runtime.pytrees import deep_tensors

OTHER_ROWS = [1, 0, 1]  # of the two rows of an example call


@dataclass(frozen=True)
class Run:
    """What one forward pass gave, the buffers that it wrote to, and whether it gave a list of results, one a row."""

    outputs: list[Tensor]
    written: dict[str, Tensor]
    is_list: bool = False


def run(module: nn.Module, call: Call, training: bool = False, seed: int = 0, steady: bool = False) -> Run:
    """Run a module forward in a mode; its buffers are put back, and it is left in eval mode.

    Args:
        module: the module.
        call: its arguments.
        training: whether in training mode.
        seed: of all generators of random numbers.
        steady: whether every call that draws draws the same numbers, in whatever order the calls come.
    """
    with _in_mode(module, training, seed), torch.no_grad(), _SteadyNoise() if steady else nullcontext():  # type: ignore[no-untyped-call]
        before = _copies(module)
        answer = module(*call.args, **call.kwargs)
        outputs = [leaf.clone() for leaf in deep_tensors(answer)]
        after = _copies(module)
    written = {name: t for name, t in after.items() if name not in before or not same(t, before[name])}
    return Run(outputs, written, isinstance(answer, list) and all(isinstance(one, Mapping) for one in answer))


def gradients(module: nn.Module, call: Call) -> frozenset[str]:
    """Return the parameters that have finite gradients after a backward pass in training mode."""
    with _in_mode(module, training=True, seed=0):
        outputs = deep_tensors(module(*call.args, **call.kwargs))
        losses = [leaf.abs().square().mean() for leaf in outputs if leaf.requires_grad]
        torch.stack([loss.to(losses[0]) for loss in losses]).sum().backward()
        found = {name: parameter.grad for name, parameter in module.named_parameters()}
        module.zero_grad()
    return frozenset(name for name, g in found.items() if g is not None and bool(g.isfinite().all()))


def other_batch(call: Call) -> Call:
    """Return a call of three rows, made of the two of an example; a list of tensors is a batch, too."""

    def is_list(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and isinstance(value[0], Tensor)

    def rows(value: Any) -> Any:
        if is_list(value):
            return [value[i] for i in OTHER_ROWS]
        return value[OTHER_ROWS] if isinstance(value, Tensor) and value.dim() and len(value) == 2 else value

    args, kwargs = pytree.tree_map(rows, (call.args, call.kwargs), is_leaf=is_list)
    return Call(args, kwargs)


def rearranged(found: Run) -> list[Tensor | None]:
    """Return what the outputs for two rows must be for the rows of the other batch; None where that is unknown."""
    outputs = found.outputs
    if found.is_list or (any(leaf.dim() and len(leaf) % 2 for leaf in outputs) and len(outputs) % 2 == 0):
        half = len(outputs) // 2  # a list of results, one a row
        return [leaf for row in OTHER_ROWS for leaf in outputs[row * half : (row + 1) * half]]
    return [_rows_of(leaf) for leaf in outputs]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    """Tell whether two outputs are equal to the bit."""
    return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))


def same(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are equal to the bit; NaN equals NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


class _SteadyNoise(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            torch.manual_seed(0)
        return func(*args, **(kwargs or {}))


@contextmanager
def _in_mode(module: nn.Module, training: bool, seed: int) -> Iterator[None]:
    before = _copies(module)
    module.train(training)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - some models draw from the global state
    try:
        yield
    finally:
        module.eval()
        with torch.no_grad():
            for name, tensor in module.named_buffers():
                if name in before and tensor.shape == before[name].shape:
                    tensor.copy_(before[name])


def _copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.named_buffers()}


def _rows_of(leaf: Tensor) -> Tensor | None:
    if leaf.dim() == 0 or len(leaf) % 2:
        return None
    by_row = leaf.reshape(2, len(leaf) // 2, *leaf.shape[1:])
    return by_row[OTHER_ROWS].flatten(0, 1)
