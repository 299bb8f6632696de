"""Graphs as Python's pickle: read from trusted files whose bytes are those that were written."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from fxwidth.checkpoint.other_forms import EXPORTED, TENSORS
from fxwidth.errors import FxwidthError
from fxwidth.recording.graph_meta import notes_of
from fxwidth.runtime.atomic_files import unreadable
from fxwidth.serialization import earlier_files
from fxwidth.serialization.tensor_files import damaged


def refuse_untrusted(path: str | Path, *, trusted: bool) -> None:
    """Check that what is to be unpickled is trusted.

    Raises:
        FxwidthError: it is not.
    """
    if not trusted:
        raise FxwidthError(
            f"{path} is read as Python's pickle, which can run any code. Pass trusted=True if it is from someone whom "
            f"you trust; paths that end in {TENSORS!r} or {EXPORTED!r} get files that need no trust."
        )


def refuse_plain(path: Path) -> None:
    """Check that a file does not hold what is no graph for sure, a state dict above all; no code of it is run.

    Raises:
        FxwidthError: it does.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        # It may be a graph, whose classes such a reader does not know, or damaged.
        return
    raise _no_graph(path, found)


def load_pickled(path: Path, *, trusted: bool) -> fx.GraphModule:
    """Read a graph that was written as Python's pickle.

    Raises:
        FxwidthError: it is not trusted, damaged, or no such file.
    """
    if not trusted:
        refuse_plain(path)
    refuse_untrusted(path, trusted=trusted)
    _refuse_damaged(path)
    try:
        saved = torch.load(path, weights_only=False, pickle_module=earlier_files)
    except FxwidthError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    except Exception as error:
        # What is read is code, and may fail by any exception.
        raise FxwidthError(
            f"{path} cannot be read ({type(error).__name__}: {error}): it is damaged, or other versions of torch or of "
            "the model's code have written it. Use another copy of the file, or those versions."
        ) from error
    if not isinstance(saved, dict) or not isinstance(saved.get("module"), fx.GraphModule):
        raise _no_graph(path, saved)
    module: fx.GraphModule = saved["module"]
    if not isinstance(saved.get("meta"), Mapping):
        raise damaged(path, "it does not tell how the graph came to be")
    notes_of(module).update(saved["meta"])
    return module


def _refuse_damaged(path: Path) -> None:
    """Check the checksums of a file before pickle believes its bytes.

    Files in which torch was told to write none, and those of the form before, have no such thing.
    """
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            has_checksums = any(info.CRC for info in archive.infolist())
            wrong = archive.testzip() if has_checksums else None
    except Exception as error:
        raise damaged(path, f"it is no archive of torch.save ({error!r})") from error
    if wrong is not None:
        raise damaged(path, f"the bytes of {wrong} are not those that were written")


def _no_graph(path: Path, found: Any) -> FxwidthError:
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        return FxwidthError(
            f"{path} holds a {type(found).__name__}, not a graph written by fxwidth.save; read it by torch.load."
        )
    return FxwidthError(
        f"{path} holds a state dict, not a graph written by fxwidth.save, and does not tell of resizes. If the model "
        "has its widths, load it by model.load_state_dict(torch.load(path)) and pass the model to fxwidth.trace. A "
        f"resized graph is saved by fxwidth.save(gm, path) to a path that ends in {TENSORS!r}, and loaded with model=."
    )
