"""Working as outside of whatever the caller has switched on around the call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_DEVICES = ("cpu", "cuda", "mps", "xpu", "mtia", "hpu")


@contextmanager
def plain_surroundings() -> Iterator[None]:
    """Switch autocast and inference mode off for a while.

    Under autocast a model is other ops, in other precision; in inference mode ops are not taken apart, and what is made
    can never be trained.
    """
    casting = [device for device in _DEVICES if torch.is_autocast_enabled(device)]
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        for device in casting:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
    if casting:
        # Autocast keeps the weights that it has cast, and some of them may have been written to.
        torch.clear_autocast_cache()
