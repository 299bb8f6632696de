"""Saving an evolved graph and getting it back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import fx, nn

from fxwidth.errors import FxwidthError
from fxwidth.groups import WidthGraph
from fxwidth.input_shapes import INPUTS, VALUES
from fxwidth.resizing import HISTORY, resize_analyzed
from fxwidth.tensor_slots import tensor_slots
from fxwidth.tracing import analyze_module, trace

_FORMAT = "fxwidth.resizes"


def save(gm: fx.GraphModule, path: str | Path) -> None:
    """Write an evolved graph to a file.

    A path that ends in ".safetensors" gets the tensors and the widths, and is loaded into a fresh model of the
    original architecture; any other gets the whole module as Python's pickle, which `load` brings back without the
    model's code.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        # Pickling a GraphModule keeps its code but not its notes: shapes and history travel beside it.
        torch.save(
            {"module": gm, "meta": {key: gm.meta[key] for key in (INPUTS, VALUES, HISTORY) if key in gm.meta}}, path
        )
        return
    tensors = {name: tensor.detach().contiguous() for name, (tensor, _) in tensor_slots(gm).items()}
    widths = [{name: new for name, (_, new) in record["widths"].items()} for record in gm.meta.get(HISTORY, [])]
    save_file(tensors, path, metadata={_FORMAT: json.dumps(widths)})


def load(
    path: str | Path,
    model: nn.Module | None = None,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> fx.GraphModule:
    """Read a graph written by `save`.

    Args:
        path: the file. Only unpickle files you trust; a ".safetensors" file holds data alone.
        model: for ".safetensors", a fresh model of the original architecture; it is resized if it can be,
            as by `fxwidth.resize`.
        example_inputs: for the tracing of `model`, as for `fxwidth.trace`.
        example_kwargs: likewise.

    Raises:
        FxwidthError: the file is missing, is not one of ours, or does not fit the model.
    """
    path = Path(path)
    if not path.is_file():
        raise FxwidthError(f"there is no file {path}; pass the path that fxwidth.save was given.")
    if path.suffix != ".safetensors":
        saved = torch.load(path, weights_only=False)
        if not isinstance(saved, dict) or not isinstance(saved.get("module"), fx.GraphModule):
            raise FxwidthError(f"{path} holds a {type(saved).__name__}, not a graph written by fxwidth.save.")
        module: fx.GraphModule = saved["module"]
        module.meta.update(saved["meta"])
        return module
    if model is None:
        raise FxwidthError(f"{path} holds tensors only; pass model=, a fresh model of the original architecture.")
    return _load_tensors(path, trace(model, example_inputs, example_kwargs))


def _load_tensors(path: Path, module: fx.GraphModule) -> fx.GraphModule:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if _FORMAT not in metadata:
            raise FxwidthError(f"{path} was not written by fxwidth.save.")
        for widths in json.loads(metadata[_FORMAT]):
            resize_analyzed(WidthGraph(analyze_module(module)), widths, exact=False, blind=True)
        slots = tensor_slots(module)
        if set(slots) != set(file.keys()):
            odd = sorted(set(slots) ^ set(file.keys()))[:3]
            raise FxwidthError(f"{path} does not fit this model: {', '.join(odd)} occur in only one of them.")
        with torch.no_grad():
            for name, (tensor, _) in slots.items():
                saved = file.get_tensor(name)
                if saved.shape != tensor.shape:
                    raise FxwidthError(
                        f"{path} does not fit this model: {name} has shape {tuple(saved.shape)} in the file and "
                        f"{tuple(tensor.shape)} here."
                    )
                tensor.copy_(saved)
    return module
