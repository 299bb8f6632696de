"""Stacks of modes are put back as they were, whatever has been put on or taken off."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.overrides import BaseTorchFunctionMode, _get_current_function_mode_stack
from torch.overrides import _pop_mode as pop_function_mode
from torch.overrides import _push_mode as push_function_mode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._python_dispatch import _pop_mode as pop_dispatch_mode
from torch.utils._python_dispatch import _push_mode as push_dispatch_mode

from fxwidth.runtime.fake_tensors import fake_mode
from fxwidth.runtime.global_state import GlobalState


class Dispatch(TorchDispatchMode):
    """Does nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


def stacks() -> list[list[int]]:
    return [list(map(id, stack())) for stack in (_get_current_function_mode_stack, _get_current_dispatch_mode_stack)]


def put_on() -> None:
    push_function_mode(BaseTorchFunctionMode())
    push_dispatch_mode(Dispatch())
    push_dispatch_mode(fake_mode())


def taken_off() -> None:
    pop_function_mode()
    pop_dispatch_mode()


def exchanged() -> None:
    taken_off()
    put_on()


@pytest.mark.parametrize("change", [put_on, taken_off, exchanged])
def test_modes_are_put_back(change: Callable[[], None]) -> None:
    with torch.device("cpu"), BaseTorchFunctionMode(), Dispatch(), Dispatch():
        before, state = stacks(), GlobalState()
        change()
        changed = stacks() != before
        state.put_back()
        assert stacks() == before
    assert changed
    assert stacks() == [[], []]
