"""Saving an evolved graph and getting it back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import torch
from safetensors import safe_open
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from fxwidth.errors import FxwidthError
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.options import ResizeOptions
from fxwidth.recording.graph_meta import HISTORY, NOTES, UNTIED, notes_of
from fxwidth.resizing.resize import resize_analyzed
from fxwidth.runtime.contexts import plain_surroundings
from fxwidth.runtime.tensor_slots import named_tensors, tensor_slots
from fxwidth.serialization import earlier_files
from fxwidth.serialization.graph_pickling import unpicklable
from fxwidth.tracing.analyze import analyze_module
from fxwidth.tracing.trace import trace
from fxwidth.untying.untie_copies import untie_copies

_FORMAT, _NORMS, _KEPT, _PAIRS = "fxwidth.resizes", "fxwidth.norms", "fxwidth.kept", "fxwidth.real_pairs"
_COPIES, _UNTIED = "fxwidth.copies", "fxwidth.untied"
_AS_PAIRS = frozenset({torch.complex32, torch.complex64, torch.complex128})


def save(gm: fx.GraphModule, path: str | Path) -> None:
    """Write an evolved graph to a file.

    A path that ends in ".safetensors" gets the tensors, the widths, which channels were kept, and what resizes have
    made of the scales of norms, and is loaded into a fresh model of the original architecture; any other gets the whole
    module as Python's pickle, which `load` brings back as the same graph, without the model's code. A file that is
    there already is replaced once the new one is complete, and stays as it is if that fails.

    Raises:
        FxwidthError: there is no folder for it, or the file cannot hold a part of the module, which is named.

    Example:
        >>> import tempfile, pathlib
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> fxwidth.resize(gm, {"0": 10}).get_parameter("0.weight").shape
        torch.Size([10, 8])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fxwidth.save(gm, pathlib.Path(folder) / "narrow.safetensors")
    """
    path = Path(path)
    if not path.resolve().parent.is_dir():
        raise FxwidthError(f"there is no folder {path.parent} to write {path.name} to; make it first.")
    if path.suffix == ".safetensors":
        _save_tensors(gm, path)
    else:
        _save_module(gm, path)


def packed(gm: fx.GraphModule) -> Tensor:
    """Return what `save` writes as bytes, for a checkpoint that holds more than the graph."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "graph.pt"
        save(gm, path)
        return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def unpacked(graph: Tensor) -> fx.GraphModule:
    """Return the graph that `packed` was given."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "graph.pt"
        path.write_bytes(graph.cpu().numpy().tobytes())
        return load(path)


def _save_module(gm: fx.GraphModule, path: Path) -> None:
    _refuse_parametrized(gm)
    notes = notes_of(gm)
    with _beside(path) as target:
        try:
            torch.save({"module": gm, "meta": {key: notes[key] for key in NOTES if key in notes}}, target)
        except Exception as error:
            found = unpicklable(gm)
            if found is None:
                raise
            raise FxwidthError(
                f"{found} cannot be pickled; define it at the top of a module that can be imported, or save to a "
                "path that ends in '.safetensors'."
            ) from error


def _save_tensors(gm: fx.GraphModule, path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    pairs: list[str] = []
    for name, (tensor, _) in tensor_slots(gm).items():
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            kind = "on the meta device" if tensor.is_meta else "quantized" if tensor.is_quantized else tensor.layout
            raise FxwidthError(
                f"{name} is {kind}, which a .safetensors file does not hold; save to another path, or make it a dense "
                "tensor first."
            )
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
        if tensor.dtype in _AS_PAIRS and not _is_known(tensor.dtype):
            plain = torch.view_as_real(plain)
            pairs.append(name)
        if not _is_known(plain.dtype):
            raise FxwidthError(
                f"{name} is of {tensor.dtype}, which a .safetensors file does not hold; save to another path, or make "
                "it a tensor of another dtype first."
            )
        # A file holds no memory twice.
        plain = plain.clone() if plain.untyped_storage().data_ptr() in seen else plain
        seen.add(plain.untyped_storage().data_ptr())
        tensors[name] = plain
    history = notes_of(gm).get(HISTORY, [])
    widths = [{name: new for name, (_, new) in record["widths"].items()} for record in history]
    norms = [record.get("norms", {}) for record in history]
    kept = [record.get("kept", {}) for record in history]
    copies, untied = [record.get("copies") for record in history], list(notes_of(gm).get(UNTIED, ()))
    told = {_FORMAT: widths, _NORMS: norms, _KEPT: kept, _COPIES: copies, _UNTIED: untied}
    metadata = {key: json.dumps(value) for key, value in told.items()}
    metadata |= {_PAIRS: json.dumps(pairs)} if pairs else {}
    with _beside(path) as target:
        save_file(tensors, target, metadata=metadata)


@cache
def _is_known(dtype: torch.dtype) -> bool:
    """Tell whether a file of tensors can hold those of a dtype, and give them back."""
    try:
        return load_bytes(save_bytes({"": torch.zeros(1, dtype=dtype, device="cpu")}))[""].dtype == dtype
    except Exception:
        return False


def _refuse_parametrized(gm: fx.GraphModule) -> None:
    name = next((name for name, part in gm.named_modules() if parametrize.is_parametrized(part)), None)
    if name is not None:
        raise FxwidthError(
            f"torch does not pickle modules with parametrizations, as {name!r} has them; save to a path that ends in "
            "'.safetensors'."
        )


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yield the path of a new file that takes the place of another once it is complete."""
    path = path.resolve()
    if path.exists() and not path.is_file():
        # A pipe or a device cannot be replaced.
        yield path
        return
    target = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        yield target
        with target.open("rb+") as file:
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, target)
        target.replace(path)
    finally:
        target.unlink(missing_ok=True)


@plain_surroundings()
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

    Example:
        >>> import copy, tempfile, pathlib
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(copy.deepcopy(net), torch.randn(2, 8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "narrow.safetensors"
        ...     fxwidth.save(fxwidth.resize(gm, {"0": 10}), path)
        ...     again = fxwidth.load(path, net, torch.randn(2, 8))
        >>> torch.equal(again.get_parameter("0.weight"), gm.get_parameter("0.weight"))
        True
    """
    path = Path(path)
    if not path.is_file():
        raise FxwidthError(f"there is no file {path}; pass the path that fxwidth.save was given.")
    if path.suffix != ".safetensors":
        saved = torch.load(path, weights_only=False, pickle_module=earlier_files)
        if not isinstance(saved, dict) or not isinstance(saved.get("module"), fx.GraphModule):
            raise FxwidthError(f"{path} holds a {type(saved).__name__}, not a graph written by fxwidth.save.")
        module: fx.GraphModule = saved["module"]
        notes_of(module).update(saved["meta"])
        return module
    if model is None:
        raise FxwidthError(f"{path} holds tensors only; pass model=, a fresh model of the original architecture.")
    return _load_tensors(path, trace(model, example_inputs, example_kwargs))


def _load_tensors(path: Path, module: fx.GraphModule) -> fx.GraphModule:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if _FORMAT not in metadata:
            raise FxwidthError(f"{path} was not written by fxwidth.save.")
        widths, untied = json.loads(metadata[_FORMAT]), json.loads(metadata.get(_UNTIED, "[]"))
        # Files from before norms were noted lack them; the sizes alone tell then.
        norms = json.loads(metadata[_NORMS]) if _NORMS in metadata else [None] * len(widths)
        kept = json.loads(metadata[_KEPT]) if _KEPT in metadata else [{}] * len(widths)
        pairs = set(json.loads(metadata.get(_PAIRS, "[]")))
        copies = json.loads(metadata[_COPIES]) if _COPIES in metadata else [None] * len(widths)
        for number, (plan, ratios, channels, tables) in enumerate(zip(widths, norms, kept, copies, strict=True)):
            if number in untied:
                untie_copies(module)
            graph = WidthGraph(analyze_module(module))
            plan = {_present_name(graph, name): width for name, width in plan.items()}
            resize_analyzed(
                graph, plan, ResizeOptions(exact=False), blind=True, norms=ratios, kept=channels, copies=tables
            )
        if len(widths) in untied:
            untie_copies(module)
        tensors = named_tensors(module)
        names = set(file.keys())
        filled = {id(tensor) for name, tensor in tensors.items() if name in names}
        lacking = {name for name, tensor in _used(module).items() if id(tensor) not in filled}
        if odd := sorted(lacking | (names - tensors.keys()))[:3]:
            raise FxwidthError(f"{path} does not fit this model: {', '.join(odd)} occur in only one of them.")
        with torch.no_grad():
            for name in (name for name in tensors if name in names):
                saved, tensor = file.get_tensor(name), tensors[name]
                saved = torch.view_as_complex(saved) if name in pairs else saved
                if saved.shape != tensor.shape:
                    raise FxwidthError(
                        f"{path} does not fit this model: {name} has shape {tuple(saved.shape)} in the file and "
                        f"{tuple(tensor.shape)} here."
                    )
                tensor.copy_(saved)
    return module


def _present_name(graph: WidthGraph, name: str) -> str:
    """Return what a group is called now; in earlier versions all names of a graph that is one call began with it."""
    without = name.removeprefix("model.")
    return without if name not in graph and without in graph else name


def _used(module: fx.GraphModule) -> dict[str, Tensor]:
    """Return the parameters and buffers that a graph works with; files of earlier versions have no others."""
    attributes = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    called = [f"{node.target}." for node in module.graph.find_nodes(op="call_module")]
    return {
        name: tensor
        for name, tensor in named_tensors(module).items()
        if name in attributes or any(name.startswith(prefix) for prefix in called)
    }
