"""DistributedDataParallel around a network that is resized: it goes on once its reducer is made anew."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from typing import Any

from torch import distributed, fx, nn
from torch.nn.parallel import DistributedDataParallel

from fxwidth.errors import FxwidthError
from fxwidth.runtime.compiled_modules import uncompiled

_BY_HAND = (
    "Delete the wrapper before the resize, and make it again after it:\n"
    "    del ddp\n"
    "    ddp = DistributedDataParallel(gm)\n"
    "and pass process_group= to fxwidth, as no wrapper tells it then."
)


def unwrapped(model: Any) -> Any:
    """Return the graph in a DistributedDataParallel, the module in a wrapper of torch.compile; anything else as it is.

    Raises:
        FxwidthError: what is in the wrapper is no graph.
    """
    model = uncompiled(model)
    if not isinstance(model, DistributedDataParallel):
        return model
    if not isinstance(model.module, fx.GraphModule):
        raise FxwidthError(
            f"the DistributedDataParallel holds a {type(model.module).__name__} and no graph, so that its code could "
            "not follow a resize. Trace the model before it is wrapped: gm = fxwidth.trace(model, inputs), then "
            "DistributedDataParallel(gm)."
        )
    return model.module


def wrappers_of(module: nn.Module, known: Iterable[DistributedDataParallel] = ()) -> list[DistributedDataParallel]:
    """Return all DistributedDataParallel that hold parameters of a module.

    Nothing leads from a module to its wrappers, so all objects are looked through; in a process without process groups
    there are none, and nothing is looked at.

    Args:
        module: the module.
        known: wrappers of it, which may be hidden from Python's garbage collector (`gc.freeze`).
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return []
    found = {id(one): one for one in known}
    more = [one for one in _holding(module) if id(one) not in found]
    if more:
        # A wrapper that nobody has any more may be in a cycle.
        del more
        gc.collect()
        more = [one for one in _holding(module) if id(one) not in found]
    return [*found.values(), *more]


def _holding(module: nn.Module) -> list[DistributedDataParallel]:
    own = set(map(id, module.parameters()))
    kinds = set(_kinds(DistributedDataParallel))
    # By its type: asking an object for its class may run code of its own.
    wrappers = [one for one in gc.get_objects() if type(one) in kinds]
    return [one for one in wrappers if not own.isdisjoint(map(id, one.parameters()))]


def _kinds(kind: type) -> Iterator[type]:
    yield kind
    inner: list[type] = kind.__subclasses__()
    for one in inner:
        yield from _kinds(one)


def refuse_what_cannot_be_renewed(wrapper: DistributedDataParallel) -> None:
    """Check that the reducer of a wrapper can be made anew with all that was set on it.

    Raises:
        FxwidthError: it cannot, with the two lines that do it.
    """
    held = vars(wrapper)
    odd = {
        "mixed_precision=": held.get("mixed_precision"),
        "delay_all_reduce_named_params=": held.get("_delay_all_reduce_params"),
        "torch._dynamo.config.optimize_ddp='python_reducer'": held.get("_use_python_reducer"),
        "a communication hook": held.get("_comm_hooks"),
        "a buffer hook": held.get("buffer_hook"),
    }
    for what, value in odd.items():
        if value:
            raise FxwidthError(
                f"the graph is in a DistributedDataParallel with {what}, whose reducer cannot be made anew for the "
                f"resized parameters. {_BY_HAND}"
            )


def renew(wrapper: DistributedDataParallel) -> None:
    """Make the reducer of a wrapper anew, for the parameters that its module has now; all ranks do it together."""
    # What pickle calls: it makes the reducer from the options that the wrapper holds, its process group among them.
    wrapper.__setstate__({"process_group": wrapper.process_group})
    ignored = wrapper.parameters_to_ignore
    parameters = [one for name, one in wrapper.module.named_parameters() if name not in ignored]
    vars(wrapper).update(_module_parameters=parameters, _has_rebuilt_buckets=False)
