"""What is amiss with example inputs, as far as the first layer of a network tells."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxwidth.frontends.call_signature import INPUTS_MODULE
from fxwidth.runtime.pytrees import deep_tensors

_POSITIONS = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}
_CONVOLUTIONS: dict[type[nn.Module], int] = {
    nn.Conv1d: 1,
    nn.Conv2d: 2,
    nn.Conv3d: 3,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 2,
    nn.ConvTranspose3d: 3,
}
_KNOWN: tuple[type[nn.Module], ...] = (*_CONVOLUTIONS, nn.Linear, nn.Embedding)
_Found = tuple[str, tuple[int, ...], torch.dtype]
# Of an input that has no dims for them: sizes that most networks take.
_USUAL_SIZE, _USUAL_LENGTH = 64, 16


@dataclass(frozen=True)
class Misfit:
    """Why an input cannot be what a network takes.

    Attributes:
        told: what was received, and what the first layer takes.
        shape: an example of what it takes.
        dtype: likewise.
    """

    told: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def example(self) -> str:
        """The example as Python makes it."""
        sizes = ", ".join(map(str, self.shape))
        dtype = "" if self.dtype == torch.float32 else f", dtype={self.dtype}"
        return f"torch.{'randn' if self.dtype.is_floating_point else 'zeros'}({sizes}{dtype})"


def misfit_of(module: nn.Module, values: Sequence[Any]) -> Misfit | None:
    """Return why inputs do not fit the first layer of a network; None where they do, or where nothing tells.

    Args:
        module: a graph, whose inputs are known by their placeholders, or another module, of one input alone.
        values: its inputs.
    """
    for name, layer, value in _first_layers(module, values):
        found = _misfit(layer, value)
        if found is not None:
            takes, shape, dtype = found
            label = f"{type(layer).__name__} {name!r}" if name else type(layer).__name__
            given = f"the input has shape {tuple(value.shape)}"
            given += "" if value.dtype == dtype else f" and dtype {value.dtype}"
            return Misfit(f"{given}, but the first layer, {label}, takes {takes}", shape, dtype)
    return None


def _first_layers(module: nn.Module, values: Sequence[Any]) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yield the layers that read inputs, with these; of a module that is no graph the first that is registered."""
    alone = _alone(values)
    if isinstance(module, fx.GraphModule):
        places = dict(zip(module.graph.find_nodes(op="placeholder"), values, strict=False))
        for node in module.graph.find_nodes(op="call_module"):
            source = node.args[0] if node.args else None
            if isinstance(source, fx.Node):
                # Where inputs are taken apart, one that is alone is meant.
                value = alone if _is_taken_out(source) else places.get(source)
                if isinstance(value, Tensor):
                    yield str(node.target), module.get_submodule(str(node.target)), value
    elif alone is not None:
        known = ((name, part) for name, part in module.named_modules() if isinstance(part, _KNOWN))
        for name, part in islice(known, 1):
            yield name, part, alone


def _alone(values: Sequence[Any]) -> Tensor | None:
    tensors = deep_tensors(list(values))
    return tensors[0] if len(tensors) == 1 else None


def _is_taken_out(node: fx.Node) -> bool:
    return any(one.op == "call_module" and one.target == INPUTS_MODULE for one in node.all_input_nodes)


def _misfit(layer: nn.Module, value: Tensor) -> _Found | None:
    """Return what a layer takes, with an example, if it cannot take a value."""
    shape = tuple(value.shape)
    if isinstance(layer, nn.Embedding):
        wanted = shape if len(shape) > 1 else (1, *(shape or (_USUAL_LENGTH,)))
        is_whole = not (value.is_floating_point() or value.is_complex())
        return None if is_whole else ("whole numbers, (batch, length)", wanted, torch.int64)
    dtype = next((one.dtype for one in layer.parameters()), torch.float32)
    rank = next((rank for kind, rank in _CONVOLUTIONS.items() if isinstance(layer, kind)), None)
    if rank is not None:
        channels = int(layer.in_channels)  # type: ignore[arg-type]
        form = f"(batch, {channels}, {', '.join(_POSITIONS[rank])})"
        wanted = _like_images(shape, channels, rank)
    elif isinstance(layer, nn.Linear):
        form = f"(batch, {layer.in_features})"
        wanted = _like_rows(shape, layer.in_features)
    else:
        return None
    if value.dtype != dtype:
        return f"{dtype} of shape {form}", wanted, dtype
    return None if wanted == shape else (form, wanted, dtype)


def _like_images(shape: tuple[int, ...], channels: int, rank: int) -> tuple[int, ...]:
    """Return the shape that was meant by one, if it is not that of a batch of images."""
    if len(shape) == rank + 2 and shape[1] == channels:
        return shape
    if len(shape) == rank + 2:
        # Channels that stand last, or others.
        return (shape[0], channels, *(shape[1:-1] if shape[-1] == channels else shape[2:]))
    if len(shape) == rank + 1 and shape[-1] == channels != shape[0]:
        return (1, channels, *shape[:-1])
    sizes = shape[-rank:] if len(shape) in (rank, rank + 1) else (_USUAL_SIZE,) * rank
    return (1, channels, *sizes)


def _like_rows(shape: tuple[int, ...], features: int) -> tuple[int, ...]:
    """Return the shape that was meant by one, if it is not that of a batch of rows, which may be flattened."""
    if len(shape) > 1 and features in (shape[-1], math.prod(shape[1:])):
        return shape
    if math.prod(shape) == features:
        return (1, *shape)
    return (*shape[:-1], features) if len(shape) > 1 else (1, features)
