"""A graph as a program of `torch.export`, which needs no code of its model."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxwidth.analysis.input_specs import device_of, input_specs, real_inputs
from fxwidth.analysis.result import TensorSpec
from fxwidth.checkpoint.file_record import present_versions
from fxwidth.checkpoint.other_forms import EXPORTED, other_form
from fxwidth.checkpoint.program_calls import NOT_ONE, called_alike
from fxwidth.checkpoint.program_ops import refuse_unchecked
from fxwidth.errors import FxwidthError
from fxwidth.frontends.call_signature import Inputs
from fxwidth.recording.graph_meta import HISTORY, INPUTS, notes_of
from fxwidth.runtime.atomic_files import replacing
from fxwidth.runtime.contexts import quiet
from fxwidth.runtime.module_state import restored
from fxwidth.runtime.pytrees import deep_tensors, flatten_each, rebuild_each
from fxwidth.serialization.exported_archives import UnsafeArchiveError, read_archive, refuse_code, write_archive
from fxwidth.serialization.plain_trees import decoded, encoded
from fxwidth.tracing.analyze import analyze_module
from fxwidth.tracing.trace import trace


def save_exported(gm: fx.GraphModule, path: Path) -> None:
    """Write a graph as an exported program of the mode that it is in, for any batch, with its history.

    Raises:
        FxwidthError: `torch.export` cannot write it, or the file cannot be written.
    """
    # What is noted of its inputs is of before it has been converted or moved.
    with suppress(FxwidthError):
        analyze_module(gm)
    inputs = tuple(real_inputs(gm, input_specs(gm), None))
    never_one = _never_one(gm, inputs)
    # A batch of one cannot be told from a dim that is merely broadcast.
    single = all(leaf.shape[0] == 1 for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim())
    if single:
        inputs = pytree.tree_map(_doubled, inputs)
    dynamic = pytree.tree_map(_any_batch, inputs)
    buffer = io.BytesIO()
    try:
        with restored(gm), quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(gm, inputs, dynamic_shapes=dynamic, strict=False)
            if program._guards_code:
                raise ValueError(f"the program would hold only where {program._guards_code[0]}")
            # Nobody's inputs are to be in a file, and nothing that pickle reads.
            program._example_inputs = None
            torch.export.save(program, buffer)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FxwidthError(
            f"torch.export cannot write this graph: {reason.rstrip('.')}. Save to a path that ends in "
            f"{other_form(gm, EXPORTED)!r}."
        ) from error
    record = {
        "versions": present_versions(),
        "history": encoded(list(notes_of(gm).get(HISTORY, ())), "the history of resizes"),
        "inputs": _specs_data(gm),
        "defaults": encoded(_defaults(gm), "an argument"),
        "never_one": never_one,
    }
    with replacing(path) as target:
        write_archive(target, buffer.getvalue(), record)


def load_exported(path: Path, *, trusted: bool) -> fx.GraphModule:
    """Return the graph of a program that `save_exported` has written.

    Raises:
        FxwidthError: the file is damaged, or would run code and is not trusted.
    """
    content, record, entries = read_archive(path)
    try:
        if not trusted:
            refuse_code(entries)
            refuse_unchecked(entries)
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # torch makes the tensors that it reads on the default device, though they are told to be on the CPU.
            with torch.device("cpu"):
                program = torch.export.load(io.BytesIO(content))
        module = called_alike(program, decoded(record["defaults"]), tuple(map(int, record["never_one"])))
        history = decoded(record["history"])
        if record["inputs"] is not None:
            _note_inputs(module, decoded(record["inputs"], partial(_spec, device_of(module))))
        gm = trace(module)
    except UnsafeArchiveError as error:
        raise FxwidthError(
            f"{path} may run code: {error}. Pass trusted=True if it is from someone whom you trust."
        ) from error
    except FxwidthError:
        raise
    except Exception as error:
        versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
        raise FxwidthError(
            f"{path} cannot be read ({type(error).__name__}: {error}); load it with {versions}, which wrote it."
        ) from error
    if history:
        notes_of(gm)[HISTORY] = [{**entry, "original": None} for entry in history]
    return gm


def _never_one(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[int]:
    """Return the numbers of the tensors among the inputs whose first dim must not be one; all that a graph may ask.

    Raises:
        FxwidthError: it asks for something else.
    """
    guards = {guard for part in gm.modules() if isinstance(part, Inputs) for guard in part.guards}
    numbers = [number for number in range(len(deep_tensors(inputs))) if NOT_ONE.format(number) in guards]
    is_flat = all(value is None or isinstance(value, (Tensor, bool, int, float, str)) for value in inputs)
    if len(numbers) != len(guards) or (guards and not is_flat):
        raise FxwidthError(
            f"the graph holds only for inputs with {' and '.join(sorted(guards))}, which a program does not ask. Save "
            f"to a path that ends in {other_form(gm, EXPORTED)!r}."
        )
    return numbers


def _defaults(gm: fx.GraphModule) -> dict[str, Any]:
    """Return the defaults of those arguments that have plain ones."""
    own = {str(node.target): node.args[0] for node in gm.graph.find_nodes(op="placeholder") if node.args}
    return {name: value for name, value in own.items() if value is None or type(value) in (bool, int, float, str)}


def _specs_data(gm: fx.GraphModule) -> Any:
    """Return the inputs of a graph as plain data, or None where they are of kinds that only code can make."""

    def data(value: Any, place: str) -> Any:
        return (
            {"spec": encoded([value.shape, value.dtype], place)}
            if isinstance(value, TensorSpec)
            else encoded(value, place)
        )

    try:
        return encoded(list(notes_of(gm).get(INPUTS, ())), "the inputs", data)
    except FxwidthError:
        return None


def _note_inputs(module: fx.GraphModule, specs: Sequence[Any]) -> None:
    """Note the inputs as a file tells of them, in the containers of the program, whose classes it does not tell."""
    leaves, structures = flatten_each(specs, (TensorSpec,))
    if INPUTS in notes_of(module):
        _, structures = flatten_each(notes_of(module)[INPUTS], (TensorSpec,))
    notes_of(module)[INPUTS] = rebuild_each(structures, leaves)


def _spec(device: torch.device, kind: str, content: Any) -> TensorSpec:
    if kind != "spec":
        raise ValueError(f"{kind!r} is no kind of value")
    shape, dtype = decoded(content)
    return TensorSpec(shape, dtype, device)


def _doubled(leaf: Any) -> Any:
    return leaf.repeat(2, *[1] * (leaf.dim() - 1)) if isinstance(leaf, Tensor) and leaf.dim() else leaf


def _any_batch(leaf: Any) -> Any:
    return {0: torch.export.Dim.AUTO} if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] > 1 else None
