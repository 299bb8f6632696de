"""What of a model no front end can trace."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from fxwidth.errors import FxwidthError


def refuse_scripts(model: nn.Module) -> None:
    """Check that no part of a model is a module of TorchScript.

    Raises:
        FxwidthError: one is.
    """
    for name, part in model.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            place = f"{name!r} of the model" if name else "the model"
            raise FxwidthError(
                f"{place} is a module of TorchScript ({part.original_name}), whose code and parameters are out of "
                "reach; pass the model with the module that it was made of."
            )


def refuse_names(model: nn.Module) -> None:
    """Check that nothing of a model goes by a name that graphs have for something of their own.

    Raises:
        FxwidthError: something does.
    """
    taken = set(dir(fx.GraphModule(nn.Module(), fx.Graph()))) - set(dir(nn.Module()))
    for name in (*model._modules, *model._parameters, *model._buffers):
        if name in taken:
            raise FxwidthError(
                f"{type(model).__name__} holds {name!r}, which is the name of something else in every fx graph; rename "
                "it, or trace a module that holds the model, as torch.nn.Sequential(model) does."
            )


def refuse_unmade(model: nn.Module) -> None:
    """Check that all parameters and buffers have a shape.

    Raises:
        FxwidthError: one has none yet.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise FxwidthError(
                f"{name} has no shape before its lazy layer has been called; run the model on a batch, then trace it."
            )


def refuse_sharded(model: nn.Module) -> None:
    """Check that the weights of a model are whole, and not in parts on several processes.

    Raises:
        FxwidthError: they are sharded.
    """
    for name, tensor in model.named_parameters():
        if type(tensor).__name__ in _SHARDED:
            raise FxwidthError(f"{name} is sharded over processes ({type(tensor).__name__}), {_WHOLE}")
    for name, part in model.named_modules():
        # Between two steps the weights of such a module may be whole for a while.
        if any(kind.__name__ in _SHARDING and kind.__module__.startswith(_FSDP) for kind in type(part).__mro__):
            raise FxwidthError(f"{name or 'the model'!r} is sharded over processes ({type(part).__name__}), {_WHOLE}")


def refuse_packed(model: nn.Module) -> None:
    """Check that the weights of a model are there as numbers, and not packed.

    Raises:
        FxwidthError: all layers with weights are quantized.
    """
    packed = [name for name, part in model.named_modules() if type(part).__module__.startswith(_QUANTIZED)]
    if packed and not any(parameter.is_floating_point() for parameter in model.parameters()):
        raise FxwidthError(
            f"{packed[0] or type(model).__name__!r} is quantized, as all layers with weights are: their 8-bit integers "
            "are packed and cannot change widths; resize the float model, and quantize the result."
        )


_WHOLE = (
    "so that no process has all its channels; resize the model before it is sharded, and shard the result. A graph "
    "that is sharded is taken by fxwidth.resize, fxwidth.evolve and an Evolver, with shard= where fully_shard did it."
)
_SHARDING, _FSDP = frozenset({"FSDPModule", "FullyShardedDataParallel"}), "torch.distributed."
_SHARDED = frozenset({"DTensor", "FlatParameter", "ShardedTensor"})
_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
