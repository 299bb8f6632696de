"""Parameters that are spread over ranks: whole during a resize, and spread as before after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, fx, nn

from fxwidth.distributed.fsdp_modules import fsdp_modules, put_hooks_back, take_hooks_off, unshard_modules
from fxwidth.errors import FxwidthError
from fxwidth.frontends.untraceable import refuse_sharded
from fxwidth.rewriting.optimizers import Optimizers, optimizers_in
from fxwidth.rewriting.transaction import Transaction
from fxwidth.runtime.process_groups import sharded_kind
from fxwidth.runtime.tensor_slots import set_slot, tensor_slots

Shard = Callable[[fx.GraphModule], object]
"""What spreads the parameters of a graph over ranks, in place."""

_EARLIER = "resize the graph before it is sharded, and shard the result."


@dataclass(frozen=True)
class Sharding:
    """How the parameters of a network are spread.

    Attributes:
        mesh: over which ranks; None for whole parameters.
        placements: how each parameter lies there, by name.
        shard: what spreads those of `fully_shard`; None for those of tensor parallelism, whose modules stay as they
            are.
    """

    mesh: Any = None
    placements: Mapping[str, Any] = field(default_factory=dict)
    shard: Shard | None = None

    @classmethod
    def of(cls, module: nn.Module, shard: Shard | None) -> Sharding:
        """Return that of a module.

        Raises:
            FxwidthError: it is of a kind that cannot be taken back.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        if not isinstance(module, fx.GraphModule):
            # Its code would have to be traced while it is whole.
            refuse_sharded(module)
            return cls()
        kind, is_fsdp = sharded_kind(), bool(fsdp_modules(module))
        for part in fsdp_modules(module):
            # After a forward pass the parameters may be whole for a while.
            part.reshard()  # type: ignore[operator]
        found = {} if kind is None else {n: t for n, (t, _) in tensor_slots(module).items() if isinstance(t, kind)}
        if shard is not None and not callable(shard):
            raise FxwidthError(f"shard={shard!r} must be a function that shards the graph, such as fully_shard.")
        if not found:
            return cls()
        meshes = list(dict.fromkeys(one.device_mesh for one in found.values()))  # type: ignore[attr-defined]
        if len(meshes) > 1 or meshes[0].ndim > 1:
            raise FxwidthError(
                f"the parameters are spread over several meshes of ranks, or one of two dims; {_EARLIER}"
            )
        if is_fsdp and shard is None:
            raise FxwidthError(
                "the graph is sharded by fully_shard, which must be called again after a resize. Pass the function "
                "that does it: shard=fully_shard, or shard=lambda gm: fully_shard(gm, mesh=mesh)."
            )
        if not is_fsdp and shard is not None:
            raise FxwidthError("shard= is for a graph sharded by fully_shard; tensor parallelism is kept without it.")
        return cls(meshes[0], {n: one.placements for n, one in found.items()}, shard)  # type: ignore[attr-defined]

    @property
    def group(self) -> distributed.ProcessGroup | None:
        """The ranks over which parameters are spread."""
        return None if self.mesh is None else self.mesh.get_group()

    def make_whole(
        self, module: nn.Module, optimizer: Optimizers | None, transaction: Transaction
    ) -> dict[nn.Module, dict[str, Any]]:
        """Put whole parameters and optimizer state in the place of those that are spread; all ranks do it together.

        Returns:
            The hooks that were taken off.
        """
        if self.mesh is None:
            return {}
        slots = tensor_slots(module)
        whole = {name: _whole_parameter(slots[name][0]) for name in self.placements}
        taken = take_hooks_off(module)
        unshard_modules(module, transaction)
        for name, parameter in whole.items():
            for holder, attribute in slots[name][1]:
                set_slot(holder, attribute, parameter)
        _exchange(optimizer, {slots[name][0]: one for name, one in whole.items()}, lambda _, value: _whole(value))
        return taken

    def spread(self, module: nn.Module, optimizer: Optimizers | None, taken: dict[nn.Module, dict[str, Any]]) -> None:
        """Spread parameters and optimizer state as they were before.

        Raises:
            FxwidthError: they cannot be, or `shard` does otherwise.
        """
        if self.mesh is None:
            return
        assert isinstance(module, fx.GraphModule)
        before = {name: tensor for name, (tensor, _) in tensor_slots(module).items()}
        self._refuse_uneven(before)
        if self.shard is not None:
            self.shard(module)
            if "forward" in vars(type(module)):
                module.recompile()
        else:
            self._spread_in_place(module)
            put_hooks_back(taken)
        after = {name: tensor for name, (tensor, _) in tensor_slots(module).items()}
        for name, placements in self.placements.items():
            own = getattr(after[name], "placements", None)
            if own != placements or after[name].device_mesh != self.mesh:  # type: ignore[attr-defined]
                raise FxwidthError(
                    f"shard= spreads {name!r} as {own}, and it was spread as {placements}; give the function by which "
                    "the graph was sharded."
                )
            _gradient(before[name], after[name], self._spread)
        _exchange(optimizer, {before[name]: after[name] for name in self.placements}, self._spread)

    def _spread_in_place(self, module: nn.Module) -> None:
        slots = tensor_slots(module)
        for name in self.placements:
            old, places = slots[name]
            local = self._spread(None, old.detach(), self.placements[name])
            new = nn.Parameter(local, requires_grad=old.requires_grad)
            vars(new).update(vars(old))
            for holder, attribute in places:
                set_slot(holder, attribute, new)

    def _spread(self, like: Any, value: Any, placements: Any = None) -> Any:
        from torch.distributed.tensor import distribute_tensor

        if not isinstance(value, Tensor) or (like is not None and value.shape != like.shape):
            return value
        # All ranks hold the same: nothing needs to be sent.
        return distribute_tensor(
            value, self.mesh, like.placements if placements is None else placements, src_data_rank=None
        )

    def _refuse_uneven(self, tensors: Mapping[str, Tensor]) -> None:
        """Check that tensor parallelism divides every dim evenly, which the code between layers counts on."""
        for name, placements in self.placements.items() if self.shard is None else ():
            for placement in placements:
                size, ranks = tensors[name].shape, self.mesh.size()
                if placement.is_shard() and size[placement.dim] % ranks:
                    raise FxwidthError(
                        f"{name!r} would have {size[placement.dim]} entries along dim {placement.dim}, which {ranks} "
                        f"ranks cannot share evenly. Ask for widths that they can: align={ranks}."
                    )


def _whole_parameter(spread: Any) -> nn.Parameter:
    with torch.no_grad():
        result = nn.Parameter(spread.full_tensor().detach().clone(), requires_grad=spread.requires_grad)
        if spread.grad is not None:
            result.grad = _whole(spread.grad)
    return result


def _whole(value: Any) -> Any:
    kind = sharded_kind()
    if kind is None or not isinstance(value, kind):
        return value
    return value.full_tensor().detach().clone()  # type: ignore[attr-defined]


def _gradient(before: Tensor, after: Tensor, spread: Callable[[Any, Any], Any]) -> None:
    if before.grad is not None:
        after.grad = spread(after, before.grad)


def _exchange(
    optimizer: Optimizers | None, successors: Mapping[Tensor, Tensor], changed: Callable[[Tensor, Any], Any]
) -> None:
    """Put other parameters in the place of those of an optimizer, and their state, changed, with them."""
    for one in optimizers_in(optimizer):
        for group in one.param_groups:
            group["params"][:] = [successors.get(parameter, parameter) for parameter in group["params"]]
        states = {}
        for key, state in one.state.items():
            new = successors.get(key)
            states[key if new is None else new] = (
                state if new is None else {name: changed(new, value) for name, value in state.items()}
            )
        one.state.clear()
        one.state.update(states)
