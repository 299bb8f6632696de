"""One resize on all ranks that train a network together: what each of them does, in one transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fxwidth.distributed.agreement import agree_after, agree_before
from fxwidth.distributed.sharded import Shard, Sharding
from fxwidth.distributed.wrappers import refuse_what_cannot_be_renewed, renew, wrappers_of
from fxwidth.errors import FxwidthError
from fxwidth.rewriting.optimizers import Optimizers
from fxwidth.rewriting.originals import resize_transaction
from fxwidth.rewriting.transaction import Transaction
from fxwidth.runtime.held_interrupts import uninterrupted
from fxwidth.runtime.process_groups import Ranks

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Replicas:
    """The ranks that hold a network, and what wraps it in this process.

    Attributes:
        group: their process group; None where this process is by itself.
        wrappers: those that hold its parameters.
        sharding: how its parameters are spread over the ranks.
    """

    group: distributed.ProcessGroup | None = None
    wrappers: Sequence[DistributedDataParallel] = ()
    sharding: Sharding = field(default_factory=Sharding)

    @classmethod
    def of(
        cls,
        module: Any,
        process_group: distributed.ProcessGroup | None = None,
        known: Iterable[DistributedDataParallel] = (),
        shard: Shard | None = None,
    ) -> Replicas:
        """Return those of a module: a wrapper or sharded parameters tell who they are, or else the caller.

        Raises:
            FxwidthError: a wrapper cannot be renewed, or parameters cannot be spread anew, or they are of another
                process group than is given.
        """
        check_process_group(process_group)
        if not isinstance(module, nn.Module):
            return cls()
        sharding, wrappers = Sharding.of(module, shard), wrappers_of(module, known)
        told = [wrapper.process_group for wrapper in wrappers]
        if sharding.group is not None:
            told.append(sharding.group)
        if wrappers and sharding.group is not None:
            raise FxwidthError(
                "the parameters of the graph are sharded, and a DistributedDataParallel is around it; of the two "
                "fxwidth resizes one alone."
            )
        group = process_group
        for wrapper in wrappers:
            refuse_what_cannot_be_renewed(wrapper)
        for own in told:
            if group is not None and _members(own) != _members(group):
                raise FxwidthError(
                    f"process_group= has the ranks {_members(group)}, and the graph is trained by {_members(own)}; "
                    "leave process_group= out, as the wrapper or the mesh tells it."
                )
            group = own
        is_alone = not told and (group is None or distributed.get_world_size(group) == 1)
        return cls(None if is_alone else group, wrappers, sharding)

    def looked_at(self, module: nn.Module, look: Callable[[], _Result]) -> _Result:
        """Return what is found in a network whose parameters are whole for the while; all ranks do it together."""
        if self.sharding.mesh is None:
            return look()
        transaction = Transaction(module)

        def work() -> _Result:
            self.sharding.make_whole(module, None, transaction)
            found = look()
            transaction.roll_back()
            return found

        return transaction.run(work)

    def run(
        self,
        work: Callable[[Transaction], _Result],
        modules: Sequence[nn.Module],
        changed: Callable[[_Result], Sequence[nn.Module]],
        *,
        optimizer: Optimizers | None,
        objects: Iterable[object] = (),
    ) -> _Result:
        """Return what the work returns, which has been done on all ranks; if it fails on one, nothing has changed.

        Args:
            work: what is done, the same on each rank.
            modules: all that may change, first the network.
            changed: what has changed, by what the work returns.
            optimizer: that of the network.
            objects: others of which attributes may change.

        Raises:
            FxwidthError: the ranks begin or end with different networks, or one has failed.
        """
        if self.group is None:
            transaction = resize_transaction(*modules, optimizer=optimizer, objects=objects)
            return transaction.run(lambda: work(transaction))
        sharding = self.sharding
        # Parts of one network see the same data.
        ranks = Ranks(self.group, is_data_parallel=sharding.mesh is None or sharding.shard is not None)
        # What ends this process alone must not come between the agreement of all and the end of the transaction.
        with ExitStack() as held:

            def whole() -> _Result:
                own = resize_transaction(*modules, optimizer=optimizer, objects=(*objects, *self.wrappers))
                return own.run(lambda: agreed(own))

            def agreed(own: Transaction) -> _Result:
                taken = sharding.make_whole(modules[0], optimizer, own)
                agree_before(ranks, modules, optimizer, own)
                result = work(own)
                agree_after(ranks, changed(result), optimizer)
                sharding.spread(modules[0], optimizer, taken)
                for wrapper in self.wrappers:
                    renew(wrapper)
                held.enter_context(uninterrupted())
                ranks.end()
                return result

            return ranks.run(whole)


def check_process_group(process_group: Any) -> None:
    """Check that a process group, if there is one, is one of this process.

    Raises:
        FxwidthError: it is something else.
    """
    if process_group is None:
        return
    is_group = distributed.is_available() and isinstance(process_group, distributed.ProcessGroup)
    if not is_group or distributed.get_rank(process_group) < 0:
        raise FxwidthError(
            f"process_group= takes a group of torch.distributed to which this process belongs, such as "
            f"torch.distributed.group.WORLD after init_process_group(), but received {process_group!r}."
        )


def _members(group: distributed.ProcessGroup) -> list[int]:
    return list(distributed.get_process_group_ranks(group))
