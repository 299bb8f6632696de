"""What `fully_shard` puts on modules, and what parallel styles do: taken off for a while, as neither torch API does."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import nn

from fxwidth.errors import FxwidthError
from fxwidth.rewriting.transaction import Transaction

_PACKAGE = "torch.distributed."
_STATES = "__composable_api_state_key"


def fsdp_modules(module: nn.Module) -> list[nn.Module]:
    """Return the parts of a module that `fully_shard` was called on."""
    return [part for part in module.modules() if _plain_class(part) is not None]


def _plain_class(part: nn.Module) -> type | None:
    """Return the class that a module had before `fully_shard`; None where it was not called on it."""
    kinds = type(part).__mro__
    is_sharding = len(kinds) > 2 and kinds[1].__name__ == "FSDPModule" and kinds[1].__module__.startswith(_PACKAGE)
    return kinds[2] if is_sharding else None


def take_hooks_off(module: nn.Module) -> dict[nn.Module, dict[str, Any]]:
    """Take off all hooks that packages of torch.distributed have put on a module, and return what was there.

    `put_hooks_back` puts them there again.
    """
    result: dict[nn.Module, dict[str, Any]] = {}
    for part in module.modules():
        for name, hooks in list(_hooks_of(part)):
            staying = OrderedDict((key, hook) for key, hook in hooks.items() if not _is_distributed(hook))
            if len(staying) < len(hooks):
                result.setdefault(part, {})[name] = hooks
                vars(part)[name] = staying
    return result


def put_hooks_back(taken: dict[nn.Module, dict[str, Any]]) -> None:
    """Put hooks back that were taken off."""
    for part, hooks in taken.items():
        vars(part).update(hooks)


def unshard_modules(module: nn.Module, transaction: Transaction) -> None:
    """Make a module what it was before `fully_shard`, but for its parameters.

    Raises:
        FxwidthError: this version of torch keeps what it knows of such modules elsewhere.
    """
    from torch.distributed import _composable_state

    known = getattr(_composable_state, "_module_state_mapping", None)
    for part in fsdp_modules(module):
        plain = _plain_class(part)
        assert plain is not None
        if known is None or part not in known:
            raise FxwidthError(
                "this version of torch does not let fully_shard be taken back, which a resize needs. Resize the graph "
                "before it is sharded."
            )
        state = known.pop(part)
        transaction.undo.callback(known.__setitem__, part, state)
        transaction.undo.callback(setattr, part, "__class__", type(part))
        if "forward" in vars(plain):
            transaction.undo.callback(setattr, plain, "forward", vars(plain)["forward"])
        for name, held in list(vars(part).items()):
            if name.startswith(_STATES) and isinstance(held, dict):
                vars(part)[name] = OrderedDict((key, one) for key, one in held.items() if not _is_of_fsdp(key))
        part.__class__ = plain


def _is_of_fsdp(key: Any) -> bool:
    return bool(getattr(key, "__name__", key) == "fully_shard")


def _hooks_of(part: nn.Module) -> Iterator[tuple[str, dict[Any, Any]]]:
    for name, held in vars(part).items():
        if isinstance(held, OrderedDict) and "hooks" in name:
            yield name, held


def _is_distributed(hook: Any) -> bool:
    for attribute in ("hook", "func", "__wrapped__"):
        hook = getattr(hook, attribute, hook)
    owner = getattr(hook, "__self__", None)
    places = (getattr(hook, "__module__", None), type(owner).__module__)
    return any(str(place).startswith(_PACKAGE) for place in places)
