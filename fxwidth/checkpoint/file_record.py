"""What a file of tensors tells beside them: how the graph came to be, what it is, and what trained it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxwidth.analysis.free_outputs import FreeOutputs, checked
from fxwidth.errors import FxwidthError
from fxwidth.frontends.call_signature import takes_other_sizes
from fxwidth.recording.graph_meta import FREE_OUTPUTS, HISTORY, ORIGINAL, UNTIED, notes_of
from fxwidth.runtime.tensor_slots import Slots
from fxwidth.serialization.graph_record import Fingerprint, record_of
from fxwidth.serialization.plain_trees import decoded, encoded
from fxwidth.serialization.tensor_files import TensorFile, damaged
from fxwidth.version import __version__

PREFIX = "fxwidth."
"""With it begin the names of tensors that are none of the graph's own."""

_RECORD, _VERSION = "fxwidth.record", 2
# In files of earlier versions.
_WIDTHS, _NORMS, _KEPT, _COPIES = "fxwidth.resizes", "fxwidth.norms", "fxwidth.kept", "fxwidth.copies"
_UNTIED = "fxwidth.untied"


@dataclass(frozen=True)
class Step:
    """A resize, as it is carried out again.

    Attributes:
        widths: the new widths, by group.
        norms: the variance ratios of norms, by gain; None where a file does not tell.
        kept: the channels that stayed, by group.
        copies: what copies of channels read since; None where a file does not tell.
    """

    widths: Mapping[str, int]
    norms: Mapping[str, float] | None = None
    kept: Mapping[str, Sequence[int]] = field(default_factory=dict)
    copies: Sequence[list[int]] | None = None


@dataclass(frozen=True)
class FileRecord:
    """What a file tells beside its tensors.

    Attributes:
        steps: the resizes, oldest first.
        untied: after how many of them copies of channels were untied.
        history: the same as the graph's history told it; None in files of earlier versions, as is all that follows.
        original: what the network was before.
        graph: the nodes and attributes of the graph; see `graph_record`.
        unsound: the tensors that held NaN or infinity when they were saved.
        layouts: the order of dims in memory of those tensors that do not lie row by row.
        versions: of fxwidth and torch, which have written it.
        state: of optimizer and Evolver, as trees.
        evaluates: whether the graph was in evaluation; False where a file does not tell.
        free_outputs: which outputs may change their sizes.
        takes_other_sizes: whether an export was for other sizes than the example's, beside the batch.
    """

    steps: Sequence[Step]
    untied: Sequence[int]
    history: Sequence[dict[str, Any]] | None = None
    original: Fingerprint | None = None
    graph: Mapping[str, Any] | None = None
    unsound: frozenset[str] = frozenset()
    layouts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)
    evaluates: bool = False
    free_outputs: FreeOutputs = ()
    takes_other_sizes: bool = False


def present_versions() -> dict[str, str]:
    """Return the versions of what reads and writes files."""
    return {"fxwidth": __version__, "torch": str(torch.__version__)}


def steps_of(history: Sequence[Mapping[str, Any]]) -> list[Step]:
    """Return the resizes that a history tells of."""
    return [
        Step(
            {name: new for name, (_, new) in record["widths"].items()},
            record.get("norms", {}),
            record.get("kept", {}),
            record.get("copies"),
        )
        for record in history
    ]


def written(gm: fx.GraphModule, slots: Slots, state: Mapping[str, Any]) -> dict[str, str]:
    """Return what the header of a file is to tell of a graph, and of what trains it."""
    tensors = {name: tensor for name, (tensor, _) in slots.items()}
    record = {
        **_resizes(gm),
        "graph": record_of(gm),
        "unsound": [name for name, tensor in tensors.items() if not is_finite(tensor)],
        "layouts": {name: order for name, tensor in tensors.items() if (order := _order(tensor)) is not None},
        "state": dict(state),
        "evaluates": not gm.training,
        "takes_other_sizes": takes_other_sizes(gm),
    }
    return {_RECORD: json.dumps(record, allow_nan=False)}


def resizes_as_text(gm: fx.GraphModule) -> str:
    """Return what is needed to do the resizes of a graph again on a fresh one, as JSON text."""
    return json.dumps(_resizes(gm), allow_nan=False)


def _resizes(gm: fx.GraphModule) -> dict[str, Any]:
    notes = notes_of(gm)
    return {
        "version": _VERSION,
        "versions": present_versions(),
        "original": notes.get(ORIGINAL),
        "history": encoded(list(notes.get(HISTORY, ())), "the history of resizes"),
        "untied": list(notes.get(UNTIED, ())),
        "free_outputs": notes.get(FREE_OUTPUTS, ()),
    }


def resizes_in(text: str) -> FileRecord:
    """Return what `resizes_as_text` has written.

    Raises:
        FxwidthError: it is something else, or of a later version.
    """
    try:
        data = json.loads(text)
        if data["version"] != _VERSION:
            raise FxwidthError(f"the record is of version {data['version']}, and this fxwidth reads {_VERSION}.")
        history = decoded(data["history"])
        original = None if data["original"] is None else Fingerprint.of_data(data["original"])
        free = checked(data.get("free_outputs", False))
        return FileRecord(steps_of(history), list(data["untied"]), history, original, free_outputs=free)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise FxwidthError(f"this is no record of resizes ({error!r}); pass what resizes_of has returned.") from error


def read(file: TensorFile) -> FileRecord:
    """Return what a file tells beside its tensors.

    Raises:
        FxwidthError: it is not one of ours, or of a later version.
    """
    texts = file.metadata
    try:
        if _RECORD in texts:
            return _present(file, json.loads(texts[_RECORD]))
        if _WIDTHS in texts:
            return _earlier(texts)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise damaged(file.path, f"its record says {error!r}") from error
    raise FxwidthError(
        f"{file.path} was not written by fxwidth.save. Load a state dict by load_state_dict, before the model is "
        "traced and resized."
    )


def _present(file: TensorFile, data: Mapping[str, Any]) -> FileRecord:
    if data["version"] != _VERSION:
        raise FxwidthError(
            f"{file.path} is of version {data['version']}, and this fxwidth reads {_VERSION}; use one as new as that "
            f"which wrote it, {data['versions']['fxwidth']}."
        )
    if not file.has_digest:
        raise damaged(file.path, "it has lost its digest")
    history = decoded(data["history"])
    return FileRecord(
        steps_of(history),
        list(data["untied"]),
        history,
        None if data["original"] is None else Fingerprint.of_data(data["original"]),
        data["graph"],
        frozenset(data["unsound"]),
        data["layouts"],
        data["versions"],
        data["state"],
        bool(data.get("evaluates", False)),
        checked(data.get("free_outputs", False)),
        bool(data.get("takes_other_sizes", False)),
    )


def _earlier(texts: Mapping[str, str]) -> FileRecord:
    widths = json.loads(texts[_WIDTHS])
    count = len(widths)
    # Files from before norms were noted lack them; the sizes alone tell then.
    norms = json.loads(texts[_NORMS]) if _NORMS in texts else [None] * count
    kept = json.loads(texts[_KEPT]) if _KEPT in texts else [{}] * count
    copies = json.loads(texts[_COPIES]) if _COPIES in texts else [None] * count
    steps = [Step(*step) for step in zip(widths, norms, kept, copies, strict=True)]
    return FileRecord(steps, json.loads(texts.get(_UNTIED, "[]")))


def is_finite(tensor: Tensor) -> bool:
    """Tell whether all entries of a tensor are finite numbers, as whole numbers are."""
    is_number = tensor.is_floating_point() or tensor.is_complex()
    if tensor.is_meta or tensor.layout is not torch.strided or not is_number:
        return True
    # Small dtypes lack kernels.
    for convert in (Tensor.detach, Tensor.float):
        with suppress(NotImplementedError):
            return bool(convert(tensor.detach()).isfinite().all())
    return True  # torch cannot tell, as of four bits, which have neither NaN nor infinity


def _order(tensor: Tensor) -> list[int] | None:
    """Return the dims of a tensor by their strides, where it does not lie row by row."""
    if tensor.layout is not torch.strided or tensor.is_contiguous():
        return None
    return sorted(range(tensor.dim()), key=tensor.stride().__getitem__, reverse=True)
