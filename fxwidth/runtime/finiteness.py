"""Whether parameters are finite, and in which precision sums over them are taken."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxwidth.errors import FxwidthError
from fxwidth.runtime.tensor_slots import tensor_slots


def is_sound(tensor: Tensor) -> bool:
    """Tell whether a parameter is finite; a buffer may be infinite in places, as masks and bounds are."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.device.type == "meta":
        return True
    # A sum is finite only if all its terms are, and costs a fraction of looking at each.
    if bool(tensor.detach().sum().isfinite()):
        return True
    sound = tensor.isfinite() if isinstance(tensor, nn.Parameter) else ~tensor.isnan()
    return bool(sound.all())


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Return the widest floating dtype that a tensor's device computes in."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def refuse_nan(module: nn.Module) -> None:
    """Check that every parameter of a module is finite; tensors without values (on the meta device) pass.

    Raises:
        FxwidthError: a parameter or buffer holds NaN or infinity.
    """
    for name, (tensor, _) in tensor_slots(module).items():
        if not is_sound(tensor):
            raise FxwidthError(
                f"{name} holds values that are not finite (NaN or infinity); its directions cannot be judged. "
                "Go back to a checkpoint from before training diverged, or lower the learning rate."
            )
