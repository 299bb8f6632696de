"""Whether all ranks hold the same network, optimizer state and history, to the bit; and how they come to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxwidth.errors import FxwidthError
from fxwidth.recording.graph_meta import HISTORY
from fxwidth.rewriting.optimizers import Optimizers, optimizers_in
from fxwidth.rewriting.transaction import Transaction
from fxwidth.runtime.process_groups import Ranks
from fxwidth.runtime.tensor_slots import tensor_slots

_DRIFTED = (
    "Make them equal first: wrap the graph anew after every resize, or load the same checkpoint on all ranks; of "
    "DistributedDataParallel, find the step at which they part."
)


def agree_before(
    ranks: Ranks, modules: Sequence[nn.Module], optimizer: Optimizers | None, transaction: Transaction
) -> None:
    """Check that all ranks begin with the same parameters, optimizer state and history; buffers become rank 0's.

    Buffers, such as the running statistics of batch norms, differ between the ranks of data parallelism, which takes
    those of rank 0 too at its next step.

    Args:
        ranks: all come here.
        modules: the network and its companions.
        optimizer: that of the network.
        transaction: takes the buffers back, should it end before its time.

    Raises:
        FxwidthError: they differ; the first difference is named.
    """
    _refuse_difference(ranks, "before the resize", [*_told(modules, buffers=False), *_told_of(optimizer)])
    buffers = [one for _, one in _tensors(modules) if not isinstance(one, nn.Parameter)]
    values = [one.detach().clone() for one in buffers]
    ranks.broadcast("the buffers", values)
    for buffer, value in zip(buffers, values, strict=True):
        if _digest(buffer) != _digest(value):
            transaction.overwrite(buffer, value)


def agree_after(ranks: Ranks, modules: Sequence[nn.Module], optimizer: Optimizers | None) -> None:
    """Have all ranks end with the same network, optimizer state and history.

    Where machines differ, sums do in their last bits: then the values of rank 0 are taken.

    Raises:
        FxwidthError: they differ in more than values, or still do.
    """
    shapes = [(name, str((tuple(one.shape), one.dtype))) for name, one in _all(modules, optimizer)]
    histories = [(f"the history of {type(one).__name__}", repr(_history(one))) for one in modules]
    _refuse_difference(ranks, "after the resize", [*shapes, *histories])
    told = [*_told(modules, buffers=True), *_told_of(optimizer)]
    if len(set(map(str, ranks.gather("the digests", told)))) > 1:
        ranks.broadcast("the new values", [one for _, one in _all(modules, optimizer)])
        _refuse_difference(ranks, "after the resize", [*_told(modules, buffers=True), *_told_of(optimizer)])


def _refuse_difference(ranks: Ranks, when: str, told: list[tuple[str, str]]) -> None:
    for rank, other in enumerate(everyone := ranks.gather(f"the comparison {when}", told)):
        if other == everyone[0]:
            continue
        pairs = zip(everyone[0], other, strict=False)
        names = [first[0] for first, second in pairs if first != second]
        name = names[0] if names else f"the number of tensors, {len(everyone[0])} and {len(other)}"
        raise FxwidthError(
            f"rank 0 and rank {rank} differ in {name!r} {when}, so that they would train different networks. {_DRIFTED}"
        )


def _told(modules: Sequence[nn.Module], *, buffers: bool) -> list[tuple[str, str]]:
    own = [(name, one) for name, one in _tensors(modules) if buffers or isinstance(one, nn.Parameter)]
    histories = [("the history", repr(_history(one))) for one in modules]
    return [*((name, _digest(one)) for name, one in own), *histories]


def _told_of(optimizer: Optimizers | None) -> list[tuple[str, str]]:
    return [
        (name, _digest(value) if isinstance(value, Tensor) else repr(value)) for name, value in _optimized(optimizer)
    ]


def _all(modules: Sequence[nn.Module], optimizer: Optimizers | None) -> list[tuple[str, Tensor]]:
    states = [(name, value) for name, value in _optimized(optimizer) if isinstance(value, Tensor)]
    return [*_tensors(modules), *states]


def _tensors(modules: Sequence[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for place, module in enumerate(modules):
        for name, (tensor, _) in tensor_slots(module).items():
            yield (f"also[{place - 1}].{name}" if place else name), tensor


def _optimized(optimizer: Optimizers | None) -> Iterator[tuple[str, Any]]:
    """Yield the settings of an optimizer, and the parts of its state in the order of its parameters."""
    for one in optimizers_in(optimizer):
        kind = type(one).__name__
        for number, group in enumerate(one.param_groups):
            yield from ((f"{key}= of {kind}'s group {number}", group[key]) for key in sorted(group.keys() - {"params"}))
            for place, parameter in enumerate(group["params"]):
                state = one.state.get(parameter, {})
                label = f"of {kind}'s parameter {place} in group {number}"
                yield f"the presence {label}", sorted(map(str, state))
                yield from ((f"{key!r} {label}", state[key]) for key in sorted(state, key=str))


def _history(module: nn.Module) -> Any:
    return module.meta.get(HISTORY, ()) if isinstance(module, fx.GraphModule) else ()


def _digest(tensor: Tensor) -> str:
    plain = tensor.detach()
    if plain.layout is not torch.strided:
        plain = plain.to_dense()
    if plain.is_meta:
        return "meta"
    content = plain.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(content.numpy().data, digest_size=16).hexdigest()
