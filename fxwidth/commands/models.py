"""A model by what is typed for it: in a library, in a file, or made by a function of the user's."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fxwidth
from fxwidth.commands.faults import InputError, did_you_mean
from fxwidth.commands.input_texts import as_typed, example_inputs
from fxwidth.commands.zoos import ZOOS, Found
from fxwidth.errors import FxwidthError

if TYPE_CHECKING:
    from torch import fx, nn

TRAINED = "default"
_FORMS = (
    "A model is torchvision:resnet18, timm:NAME, hf:NAME or hf:config.json, ultralytics:yolo11n.yaml, a file of "
    "fxwidth.save such as small.pt2, or package.module:function."
)
_FILES = (".pt2", ".safetensors", ".pt", ".pth")
_SEED = 0


@dataclass(frozen=True)
class Source:
    """How a model is named on the command line.

    Attributes:
        name: what was typed for it.
        shapes: those of its inputs, as text, where they are given.
        weights: `TRAINED` for those of the library, a file of a state dict, or None.
        architecture: the model that a file of tensors belongs to.
        trusted: whether a file may be read that can run code.
    """

    name: str
    shapes: Sequence[str] = ()
    weights: str | None = None
    architecture: str | None = None
    trusted: bool = False


@dataclass(frozen=True)
class Opened:
    """A model with an example of its inputs.

    Attributes:
        name: what was typed for it.
        module: the model, in evaluation mode.
        inputs: an example; None where a graph goes by the shapes that it carries.
        has_values: whether its weights are such that one can learn from their numbers.
        shapes: those of the inputs, as text, where they were typed.
        is_graph: whether it is a graph already, from a file.
    """

    name: str
    module: nn.Module
    inputs: Any
    has_values: bool
    shapes: Sequence[str] = ()
    is_graph: bool = False

    def trace(self) -> fx.GraphModule:
        """Return the model as a graph.

        Raises:
            InputError: the shapes that were typed are not those of inputs that it takes.
            FxwidthError: it cannot be traced.
        """
        from fxwidth.frontends.input_misfits import misfit_of

        if self.is_graph:
            gm = fxwidth.trace(self.module)
            if self.inputs is not None:
                # It goes by these from now on.
                fxwidth.analyze(gm, self.inputs)
            return gm
        try:
            return fxwidth.trace(self.module, self.inputs)
        except FxwidthError as error:
            values = list(self.inputs.values()) if isinstance(self.inputs, dict) else self.inputs
            misfit = misfit_of(self.module, values) if self.shapes else None
            # Where the model takes other arguments, that is what is told.
            if misfit is None or misfit.told[1:] not in str(error):
                raise
            typed = " ".join(f"--input {shape}" for shape in self.shapes)
            name = f"{next(iter(self.inputs))}=" if isinstance(self.inputs, dict) else ""
            wanted = as_typed(misfit.shape, misfit.dtype)
            raise InputError(f"{typed}: {misfit.told}; try --input {name}{wanted}.") from error


def open_model(source: Source, *, for_values: bool = False) -> Opened:
    """Return the model that is named.

    Args:
        source: how it is named.
        for_values: whether it is to have weights in any case, random ones where there are no others; otherwise those
            that nobody has trained are not made, which takes neither memory nor time.

    Raises:
        InputError: there is none of this name, a package is missing, or what it takes is not known.
    """
    name = source.name
    if name.endswith(_FILES) and ":" not in name:
        return _from_file(source)
    if source.architecture is not None:
        raise InputError(f"--architecture tells what a file of tensors belongs to, and {name!r} is no such file.")
    zoo, colon, own = name.partition(":")
    if not colon or not own:
        raise InputError(f"{name!r} names no model{_hint(name)} {_FORMS}")
    if zoo in ZOOS:
        return _from_zoo(source, ZOOS[zoo](own), for_values)
    return _from_function(source, zoo, own)


def _hint(name: str) -> str:
    try:
        from torchvision import models
    except ImportError:
        return "."
    known = models.list_models()
    return did_you_mean(f"torchvision:{name}", [f"torchvision:{one}" for one in known])


def _from_zoo(source: Source, found: Found, for_values: bool) -> Opened:
    import torch

    is_real = for_values or source.weights is not None or found.needs_values
    torch.manual_seed(_SEED)
    module = found.make(source.weights == TRAINED) if is_real else _without_values(lambda: found.make(False))
    if source.weights not in (None, TRAINED):
        _load_state(module, str(source.weights))
    if source.shapes:
        inputs = example_inputs(source.shapes, on_meta=not is_real)
    else:
        inputs = found.inputs(module)
        if not is_real:
            inputs = torch.utils._pytree.tree_map(lambda leaf: leaf.to("meta"), inputs)
    return Opened(source.name, module.eval(), inputs, source.weights is not None, source.shapes)


def _without_values(make: Callable[[], nn.Module]) -> nn.Module:
    import torch

    try:
        with torch.device("meta"):
            return make()
    except (NotImplementedError, RuntimeError):
        # Some compute numbers of layers with tensors, which then have none.
        return make().to("meta")


def _load_state(module: nn.Module, path: str) -> None:
    import torch
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise InputError(f"--weights {path}: there is no such file; give one of a state dict, or {TRAINED!r}.")
    try:
        state = load_file(path) if path.endswith(".safetensors") else torch.load(path, weights_only=True)
        module.load_state_dict(state)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()][:3]
        raise InputError(f"--weights {path} does not hold the state dict of this model: {' '.join(lines)}") from error


def _from_file(source: Source) -> Opened:
    path = Path(source.name)
    if not path.is_file():
        raise InputError(f"there is no file {path}. {_FORMS}")
    if source.weights is not None:
        raise InputError(f"{path} has its own weights; leave out --weights.")
    if path.suffix != ".safetensors":
        if source.architecture is not None:
            raise InputError(f"{path} holds the whole graph; leave out --architecture.")
        loaded: nn.Module = fxwidth.load(path, trusted=source.trusted)
        inputs = example_inputs(source.shapes, on_meta=False) if source.shapes else None
        return Opened(source.name, loaded.eval(), inputs, has_values=True, shapes=source.shapes, is_graph=True)
    if source.architecture is None:
        raise InputError(f"{path} holds tensors only; say of which model, as in --architecture torchvision:resnet18.")
    # The values come from the file.
    fresh = open_model(Source(source.architecture, source.shapes), for_values=True)
    loaded = fxwidth.load(path, fresh.module, fresh.inputs, trusted=source.trusted)
    return Opened(source.name, loaded.eval(), fresh.inputs, has_values=True, shapes=source.shapes, is_graph=True)


def _from_function(source: Source, module_name: str, attribute: str) -> Opened:
    from torch import nn

    function = imported(module_name, attribute, source.name)
    result = _called(function, source.name) if not isinstance(function, nn.Module) else function
    model, inputs = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{source.name} returns {type(model).__name__}; return an nn.Module, or one with its example inputs."
        )
    if source.shapes:
        on_meta = any(parameter.is_meta for parameter in model.parameters())
        inputs = example_inputs(source.shapes, on_meta=on_meta)
    if source.weights == TRAINED:
        raise InputError(f"{source.name} is of no library; give --weights a file.")
    if source.weights is not None:
        _load_state(model, source.weights)
    if inputs is None:
        raise InputError(f"what {source.name} takes is not known; give its shape, as in --input 1x3x224x224.")
    return Opened(source.name, model.eval(), inputs, True, source.shapes)


def imported(module_name: str, attribute: str, typed: str) -> Any:
    """Return what a module holds under a name, the present folder being searched too.

    Raises:
        InputError: there is no such module, or it fails or holds no such thing.
    """
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        is_part_of_it = module_name == missing or module_name.startswith(f"{missing}.")
        hint = did_you_mean(module_name, ZOOS) if is_part_of_it else "."
        told = f"there is no library or module {missing!r}" if is_part_of_it else f"{module_name} needs {missing!r}"
        raise InputError(f"{typed}: {told}{hint} {_FORMS if is_part_of_it else f'pip install {missing}'}") from error
    except Exception as error:
        raise InputError(f"{typed}: importing {module_name} fails: {_where(error)}") from error
    finally:
        sys.path.pop(0)
    if not hasattr(module, attribute):
        raise InputError(f"{module_name} has no {attribute!r}{did_you_mean(attribute, vars(module))}")
    return getattr(module, attribute)


def _called(function: Any, typed: str) -> Any:
    if not callable(function):
        raise InputError(f"{typed} is {type(function).__name__}; it must be a model or a function that makes one.")
    try:
        return function()
    except FxwidthError:
        raise
    except Exception as error:
        raise InputError(f"{typed}() fails: {_where(error)}") from error


def _where(error: Exception) -> str:
    """Return an error with the line of code that raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
