"""Where modules keep their parameters and buffers, and other tensors put there for a while."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fxwidth.runtime.module_state import undisturbed, walk

Slots = dict[str, tuple[Tensor, list[tuple[nn.Module, str]]]]


def tensor_slots(module: nn.Module) -> Slots:
    """Return each distinct parameter or buffer: its first name, the tensor, and every (module, attribute) it is in."""
    first_name: dict[int, str] = {}
    slots: Slots = {}
    for path, submodule in walk(module):
        for attribute, tensor in (*submodule._parameters.items(), *submodule._buffers.items()):
            if tensor is None:
                continue
            name = first_name.setdefault(id(tensor), f"{path}.{attribute}" if path else attribute)
            slots.setdefault(name, (tensor, []))[1].append((submodule, attribute))
    return slots


def copies_of(slots: Slots) -> dict[str, Tensor]:
    """Return a copy of each parameter and buffer, of the same class, by its name."""
    tensors = {name: tensor for name, (tensor, _) in slots.items()}
    return {name: copy.deepcopy(one) if one.is_leaf else one.detach().clone() for name, one in tensors.items()}


def real_rows(matrices: Tensor) -> Tensor:
    """Return the rows of complex matrices [..., rows, columns] as two real ones each; real matrices as they are."""
    if not matrices.is_complex():
        return matrices
    parts = torch.view_as_real(matrices.resolve_conj()).movedim(-1, -2)
    return parts.reshape(*matrices.shape[:-2], 2 * matrices.shape[-2], matrices.shape[-1])


def complex_rows(matrices: Tensor) -> Tensor:
    """Return the complex matrices of which `real_rows` has made these."""
    parts = matrices.reshape(*matrices.shape[:-2], matrices.shape[-2] // 2, 2, matrices.shape[-1])
    return torch.view_as_complex(parts.movedim(-2, -1).contiguous())


def set_slot(module: nn.Module, attribute: str, tensor: Tensor) -> None:
    """Put a tensor where a module keeps its parameter or buffer, without the checks meant for users."""
    holder = module._parameters if attribute in module._parameters else module._buffers
    holder[attribute] = tensor  # type: ignore[assignment]
    if isinstance(module, nn.RNNBase) and attribute in module._flat_weights_names:
        # It keeps its parameters in a list besides, and looks for new ones only when it is called.
        module._flat_weights[module._flat_weights_names.index(attribute)] = tensor


def overwrite(tensor: Tensor, values: Tensor) -> None:
    """Give a tensor other values, in place."""
    # What was made in inference mode may be written to there alone.
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(values)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers, those with several names by each of them."""
    parameters, buffers = module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    return {**dict(parameters), **dict(buffers)}


def register_at(module: nn.Module, path: str, tensor: Tensor, persistent: bool = True) -> object:
    """Put a parameter or buffer at a path of a module where there is nothing yet; return what is there then."""
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(module, parent):
            module.add_module(parent, nn.Module())
        module = getattr(module, parent)
    if not hasattr(module, name):
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(name, tensor)
        else:
            module.register_buffer(name, tensor, persistent=persistent)
    found: object = getattr(module, name)
    return found


@contextmanager
def substituted(
    module: nn.Module,
    replacements: Mapping[str, Tensor],
    slots: Slots | None = None,
    restoring: Callable[[nn.Module], AbstractContextManager[Any]] = undisturbed,
) -> Iterator[Any]:
    """Run a module with other tensors in the place of its parameters and buffers, named as by `tensor_slots`.

    Yields what `restoring` does.
    """
    slots = tensor_slots(module) if slots is None else slots
    with restoring(module) as held:
        try:
            for name, replacement in replacements.items():
                for holder, attribute in slots[name][1]:
                    set_slot(holder, attribute, replacement)
            yield held
        finally:
            for name in replacements:
                original, places = slots[name]
                for holder, attribute in places:
                    set_slot(holder, attribute, original)
