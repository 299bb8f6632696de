"""What may be given for options: the checks of their values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
from torch import fx, nn

from fxwidth.costs.budget import Budget
from fxwidth.errors import FxwidthError
from fxwidth.plain_numbers import is_integer

_LARGEST_RATIO = 100
# How deep in wrappers a graph may be.
_DEEPEST = 4
HOW_TO_COPY = "Make it from the graph: copy.deepcopy(gm), or torch.optim.swa_utils.AveragedModel(gm)."


def check_budget(budget: Any, shorthands: Mapping[str, Any]) -> None:
    """Check that there is one budget at most, as such or by short forms of its bounds, and that it is one."""
    if budget is not None and not isinstance(budget, Budget):
        raise FxwidthError(f"budget={budget!r} must be a fxwidth.Budget, such as Budget(params=0.5).")
    if shorthands and budget is not None:
        given = ", ".join(f"{name}={bound}" for name, bound in shorthands.items())
        raise FxwidthError(f"{given} is short for a budget; put it into budget={budget}.")
    if shorthands:
        Budget(**shorthands)


def check_ratio(ratio: Any, target: Budget | None) -> None:
    """Check that a ratio of widths, if there is one, is one, and is given without a budget."""
    if ratio is None:
        return
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= _LARGEST_RATIO:
        raise FxwidthError(
            f"ratio={ratio!r} must be a number in (0, {_LARGEST_RATIO}]: the part of its channels that a group keeps."
        )
    if target is not None:
        raise FxwidthError(f"ratio={ratio} sets all widths, and leaves nothing to {target}; give one of them.")


def check_module(module: Any, option: str) -> None:
    """Check that what is to hold the widths of a graph is a module of another class, if anything."""
    if isinstance(module, fx.GraphModule):
        raise FxwidthError(f"{option}= takes a module of the class that was traced, but received a GraphModule.")
    if module is not None and not isinstance(module, nn.Module):
        raise FxwidthError(f"{option}= takes a module of the class that was traced, but received {module!r}.")


def check_limits(least: Any, most: Any, align: Any) -> None:
    """Check bounds of widths."""
    above = () if most is None else (("max_width", most),)
    is_share = isinstance(least, float)
    if is_share and not 0 < least <= 1:
        raise FxwidthError(
            f"min_width={least!r} must be an integer of at least 1, or a float in (0, 1]: a part of the width that a "
            "group had first."
        )
    for name, value in (("align", align), *above, *(() if is_share else (("min_width", least),))):
        if not is_integer(value) or value < 1:
            raise FxwidthError(f"{name}={value!r} must be an integer of at least 1.")
    if most is not None and not is_share and most < -(-least // align) * align:
        raise FxwidthError(
            f"no width lies between min_width={least} and max_width={most} with align={align}; "
            "widen the range or lower align."
        )


def check_thresholds(shrink: Any, grow: Any, step: Any) -> None:
    """Check shares of a spectrum, and how many channels are added."""
    if not isinstance(shrink, (int, float)) or not 0 <= shrink < 1:
        raise FxwidthError(f"shrink_energy={shrink!r} must lie in [0, 1): a share of the spectrum.")
    if not isinstance(grow, (int, float)) or not 0 <= grow <= 1:
        raise FxwidthError(f"grow_energy={grow!r} must lie in [0, 1]: a share of the spectrum.")
    if not is_integer(step) or step < 0:
        raise FxwidthError(f"grow_step={step!r} must be an integer of at least 0: channels to add.")


def check_switches(switches: Mapping[str, Any]) -> None:
    """Check options that are true or false, by their names."""
    for name, value in switches.items():
        if not isinstance(value, (bool, int, np.bool_)) or value not in (0, 1):
            raise FxwidthError(f"{name}={value!r} must be True or False.")


def patterns(given: Any, option: str, *, modules: bool = True) -> Any:
    """Return one pattern or module, or several as a list."""
    # Some modules can be gone through themselves.
    if given is None or isinstance(given, str) or (modules and isinstance(given, nn.Module)):
        return given
    what = "names or patterns of groups, or modules" if modules else "names or patterns of groups"
    if not isinstance(given, Iterable):
        raise FxwidthError(f"{option}= takes {what}, but received {given!r}.")
    found = list(given)
    for one in found:
        if not isinstance(one, str) and not (modules and isinstance(one, nn.Module)):
            raise FxwidthError(f"{option}= takes {what}, but received {one!r}.")
    return found


def width_classes(given: Any) -> str | list[Any] | None:
    """Return what groups get one width, as strings and lists of them."""
    if given is None or isinstance(given, str):
        return given
    if not isinstance(given, Iterable):
        raise FxwidthError(f"same_width= takes patterns of groups, but received {given!r}.")
    return list(map(partial(patterns, option="same_width", modules=False), given))


def graphs_in(given: Any, option: str) -> tuple[fx.GraphModule, ...]:
    """Return the graphs that one module or several are, or wrap as their `module`.

    Raises:
        FxwidthError: one has none.
    """
    modules = (given,) if isinstance(given, nn.Module) else tuple(given) if isinstance(given, Iterable) else (given,)
    return tuple(_graph_in(module, option) for module in modules)


def _graph_in(given: Any, option: str) -> fx.GraphModule:
    if not isinstance(given, nn.Module):
        raise FxwidthError(f"{option}= takes a module, or a list of them, but received {type(given).__name__}.")
    module: Any = given
    for _ in range(_DEEPEST):
        if isinstance(module, fx.GraphModule):
            return module
        module = getattr(module, "module", None)
    raise FxwidthError(f"{option}= takes copies of the graph, but received {type(given).__name__}. {HOW_TO_COPY}")
