"""Which ops each part of a module runs that is called as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from fxwidth.recording.tape import TapeRecorder


@contextmanager
def watching_parts(module: Any, recorder: TapeRecorder, ran: dict[int, list[range]]) -> Iterator[None]:
    """Tell a recorder the path of the part that is at work in a module, and note which of its calls each part has run.

    Args:
        module: what is called; watched where it is a module with parts.
        recorder: the tape.
        ran: takes the places of a part's calls on the tape, by its `id`.
    """
    if not isinstance(module, nn.Module) or next(module.children(), None) is None:
        yield
        return
    names = {id(part): name for name, part in module.named_modules()}
    running = list[tuple[int, str]]()

    def enter(part: nn.Module, _: Any) -> None:
        running.append((len(recorder.calls), recorder.part))
        recorder.part = names.get(id(part), recorder.part)

    def leave(part: nn.Module, _: Any, __: Any) -> None:
        start, recorder.part = running.pop()
        ran.setdefault(id(part), []).append(range(start, len(recorder.calls)))

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
