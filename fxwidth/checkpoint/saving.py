"""Writing an evolved graph to a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.nn.utils import parametrize

from fxwidth.checkpoint.exported import save_exported
from fxwidth.checkpoint.extra_state import extra_state_of
from fxwidth.checkpoint.file_record import PREFIX, written
from fxwidth.checkpoint.other_forms import EXPORTED, TENSORS, other_form
from fxwidth.checkpoint.training_state import FURTHER, Evolving, state_of
from fxwidth.errors import FxwidthError
from fxwidth.recording.graph_meta import NOTES, REBUILT, notes_of
from fxwidth.rewriting.optimizers import Optimizers
from fxwidth.runtime.atomic_files import path_of, replacing, unwritable
from fxwidth.runtime.tensor_slots import tensor_slots
from fxwidth.serialization.graph_pickling import unpicklable
from fxwidth.serialization.plain_trees import TensorsBeside, encoded
from fxwidth.serialization.tensor_files import write_tensors


def save(
    gm: fx.GraphModule,
    path: str | Path,
    *,
    optimizer: Optimizers | None = None,
    evolver: Evolving | None = None,
) -> None:
    """Write an evolved graph to a file.

    The end of the path chooses the form:

    - ".safetensors": tensors, and a record of all resizes, literals and attributes. `load` makes the graph again from a
      fresh model of the original architecture, equal to the bit: with the order of dims in memory too where a function
      makes the model, while a model that is given keeps its own, as its device. Data alone; a digest tells damaged
      files.
    - ".pt2": what `torch.export` makes of the graph in the mode that it is in, with the history. It needs no code of
      the model, and other tools read it too; dropout and batch norm stay in that mode. Graphs whose nodes a pass has
      changed, such as `fxwidth.passes.FoldBatchNorm`, go into such a file or the next one alone.
    - any other: the whole graph as Python's pickle, which `load` reads with `trusted=True` alone.

    A file that is there already is replaced once the new one is complete and on the disk, and stays as it is if that
    fails, or the process ends.

    Args:
        gm: a graph from `fxwidth.trace`, or any GraphModule.
        path: of the file.
        optimizer: what trains the graph, one or several; its state is written too, by the names of parameters, to a
            ".safetensors" file. `load` takes it back.
        evolver: the graph's `fxwidth.Evolver`, likewise; with the batches of data that it has kept.

    Raises:
        FxwidthError: there is no folder for it, it cannot be written, or the file cannot hold a part of the module or
            of the optimizer's state, which is named.

    Example:
        >>> import tempfile, pathlib
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> fxwidth.resize(gm, {"0": 10}).get_parameter("0.weight").shape
        torch.Size([10, 8])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fxwidth.save(gm, pathlib.Path(folder) / "narrow.safetensors")
    """
    path = path_of(path)
    if not isinstance(gm, fx.GraphModule):
        raise FxwidthError(
            f"save takes a torch.fx.GraphModule, but received {type(gm).__name__}; pass what fxwidth.trace or "
            "fxwidth.evolve returned."
        )
    form = path.suffix.lower()
    if form == TENSORS:
        save_tensors(gm, path, optimizer, evolver)
        return
    if optimizer is not None or evolver is not None:
        raise FxwidthError(
            f"optimizer= and evolver= go into a file of tensors, and {path.name} is none; save to a path that ends in "
            f"{TENSORS!r}, or write their state dicts by torch.save."
        )
    if form == EXPORTED:
        save_exported(gm, path)
    else:
        save_pickled(gm, path)


def save_tensors(
    gm: fx.GraphModule,
    path: Path,
    optimizer: Optimizers | None = None,
    evolver: Evolving | None = None,
    *,
    further: Mapping[str, Any] | None = None,
) -> None:
    """Write a graph as tensors with a record.

    Args:
        gm: the graph.
        path: of the file.
        optimizer: as for `save`.
        evolver: likewise.
        further: what else is to be in the file, as plain data and tensors; `further_in` reads it.

    Raises:
        FxwidthError: as of `save`.
    """
    rebuilt = notes_of(gm).get(REBUILT)
    if rebuilt:
        passes = ", ".join(dict.fromkeys(rebuilt))
        raise FxwidthError(
            f"{passes} changed the nodes of this graph, and a file of tensors is loaded into a graph that is traced "
            f"anew, which would have others. Save to a path that ends in {EXPORTED!r}, or in '.pt', Python's pickle."
        )
    slots = tensor_slots(gm)
    if taken := next((name for name in slots if name.startswith(PREFIX)), None):
        raise FxwidthError(
            f"{taken} begins as the names that files keep for other tensors; give that part another name."
        )
    beside = TensorsBeside(f"{PREFIX}state.")
    state = {**state_of(gm, optimizer, evolver, beside), **extra_state_of(gm, beside)}
    if further is not None:
        state[FURTHER] = encoded(further, "what is to be kept", beside.leaf)
    tensors = {name: tensor for name, (tensor, _) in slots.items()} | beside.tensors
    write_tensors(path, tensors, written(gm, slots, state))


def save_pickled(gm: fx.GraphModule, path: Path) -> None:
    """Write a graph as Python's pickle."""
    name = next((name for name, part in gm.named_modules() if parametrize.is_parametrized(part)), None)
    if name is not None:
        raise FxwidthError(
            f"torch does not pickle modules with parametrizations, as {name!r} has them; save to a path that ends in "
            f"{other_form(gm)!r}."
        )
    notes = notes_of(gm)
    content: dict[str, Any] = {"module": gm, "meta": {key: notes[key] for key in NOTES if key in notes}}
    with replacing(path) as target:
        try:
            torch.save(content, target)
        except Exception as error:
            found = unpicklable(gm)
            if found is None:
                raise unwritable(path, error) from error
            raise FxwidthError(
                f"{found} cannot be pickled; define it at the top of a module that can be imported, or save to a "
                f"path that ends in {other_form(gm)!r}."
            ) from error
