"""The one error a user meets, and the one warning."""

from __future__ import annotations

import sys
import warnings


class FxwidthError(Exception):
    """Something fxwidth was given cannot be used; the message names the place, what was received and the remedy.

    Example:
        >>> fxwidth.trace(3)
        Traceback (most recent call last):
        fxwidth.errors.FxwidthError: trace takes an nn.Module or a GraphModule, but received int.
    """


class FxwidthWarning(UserWarning):
    """Something fxwidth made does less than what it was made from; the message names the place and what helps.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", fxwidth.FxwidthWarning)  # to have such a trace refused
        >>> warnings.resetwarnings()
    """


def warn(message: str) -> None:
    """Give an `FxwidthWarning` that points at the line outside of fxwidth which led to it."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "fxwidth":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, FxwidthWarning, stacklevel=level + 1)
