"""Archives of `torch.export`, with a record and digests beside, and without what runs code when they are read.

torch reads such archives with pickle, evaluates formulas of sizes and conditions on inputs, makes code of names, and
looks operators up by any path below `torch`. What this module lets through has no pickles and no conditions, and its
names are of known kinds.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from fxwidth.errors import FxwidthError
from fxwidth.serialization.tensor_files import damaged, opened

_FOLDER, _RECORD = "archive/", "archive/extra/fxwidth.json"
MODEL, _WEIGHTS, _CONSTANTS = (
    "archive/models/model.json",
    "archive/data/weights/model_weights_config.json",
    "archive/data/constants/model_constants_config.json",
)
_SAMPLES = "archive/data/sample_inputs/model.pt"
# Of higher-order operators those that run their graphs and nothing else; of others those that read no files.
_OPERATORS = re.compile(
    r"torch\.ops\.(aten|prims|torchvision)\.(?!from_file)\w+(\.\w+)?"
    r"|torch\.ops\.higher_order\.(cond|wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|lt|le|gt|ge|eq|ne|and_|or_|not_|xor|getitem)"
    r"|math\.(ceil|floor|trunc|sqrt)|torch\._?sym_\w+"
)
_SYMBOL = re.compile(r"Symbol\('[a-z]+\d+'(, \w+=(True|False))*\)")
_FORMULA = re.compile(r"[\w\s.,()+\-*/=<>&|~]*")
# fmt: off
_FUNCTIONS = frozenset({
    "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Max", "Min", "Mod", "PythonMod", "FloorDiv", "CleanDiv",
    "CeilDiv", "CeilToInt", "FloorToInt", "ToFloat", "IntTrueDiv", "FloatTrueDiv", "ModularIndexing", "Where", "Eq",
    "Ne", "Gt", "Ge", "Lt", "Le", "Equality", "Unequality", "GreaterThan", "StrictGreaterThan", "LessThan",
    "StrictLessThan", "And", "Or", "Not", "evaluate", "True", "False",
})
# fmt: on
# What looks for classes and factories in modules that it imports.
_IMPORTING = ("__enum__", "default_factory_module")
# What is under these keys is read as JSON, and what is under that one is written as a literal.
_STRUCTURES, _LITERAL = frozenset({"in_spec", "out_spec"}), "as_string"
_NAME = re.compile(r"[\w.+\- ]*")


class UnsafeArchiveError(Exception):
    """Reading an archive would run code, or believe sizes that it does not warrant; the message says where."""


def write_archive(target: Path, exported: bytes, record: Mapping[str, Any]) -> None:
    """Write what `torch.export.save` has made, without places in code and with a record.

    Args:
        target: the file.
        exported: the archive.
        record: plain data; see `read_archive`.
    """
    with zipfile.ZipFile(io.BytesIO(exported)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    model = json.loads(entries[MODEL])
    for node in nodes_of(model):
        node["metadata"] = {}
    entries[MODEL] = json.dumps(model).encode()
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in entries.items()}
    text = json.dumps({"record": record, "sha256": digests}, allow_nan=False)
    signed = json.dumps({"text": text, "sha256": hashlib.sha256(text.encode()).hexdigest()})
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, content in {**entries, _RECORD: signed.encode()}.items():
            archive.writestr(zipfile.ZipInfo(name), content)


def read_archive(path: Path) -> tuple[bytes, dict[str, Any], dict[str, bytes]]:
    """Return an archive anew, from entries whose digests are right, with its record and its entries.

    Raises:
        FxwidthError: it is damaged, or without a record.
    """
    try:
        with opened(path) as file, zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            # What is compressed may be larger than the file warrants.
            stored = all(info.compress_type == zipfile.ZIP_STORED for info in infos)
            if not stored or sum(info.file_size for info in infos) > os.fstat(file.fileno()).st_size:
                raise damaged(path, "its entries are larger than the file")
            entries = {info.filename: archive.read(info) for info in infos}
        if _RECORD not in entries:
            raise damaged(
                path,
                "it is no archive of fxwidth.save, or has lost its record (torch.export.load reads what "
                "torch.export.save has written)",
            )
        signed = json.loads(entries.pop(_RECORD))
        if hashlib.sha256(signed["text"].encode()).hexdigest() != signed["sha256"]:
            raise damaged(path, "its record is not the one that was written")
        told = json.loads(signed["text"])
        found = {name: hashlib.sha256(content).hexdigest() for name, content in entries.items()}
        if len(entries) + 1 != len(infos) or found != told["sha256"]:
            raise damaged(path, "its entries are not those that were written")
        record: dict[str, Any] = told["record"]
        if not isinstance(record, dict) or not isinstance(record.get("versions"), dict):
            raise damaged(path, "its record does not tell what wrote it")
    except (FxwidthError, MemoryError):
        raise
    except Exception as error:
        # zipfile has an error of another class for each thing that may be wrong with an archive.
        raise damaged(path, f"it is no archive of fxwidth.save ({error!r})") from error
    clean = io.BytesIO()
    with zipfile.ZipFile(clean, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return clean.getvalue(), record, entries


def refuse_code(entries: Mapping[str, bytes]) -> None:
    """Check that reading an archive, and running what is in it, runs nothing but operators on tensors.

    Raises:
        UnsafeArchiveError: it may.
    """
    known = {MODEL, _WEIGHTS, _CONSTANTS, _SAMPLES}
    for name in entries:
        if name.startswith(f"{_FOLDER}models/") and name not in known:
            raise UnsafeArchiveError(f"it has another model, {name}")
        if name.endswith((".pt", ".so", ".cpp", ".pkl")) and (name not in known or entries[name]):
            raise UnsafeArchiveError(f"{name} is read by pickle or as code")
    for config in (_WEIGHTS, _CONSTANTS):
        folder = config.rpartition("/")[0]
        for name, payload in json.loads(entries[config])["config"].items():
            _refuse_payload(f"{folder}/{payload['path_name']}", name, payload, entries)
    _refuse_model(json.loads(entries[MODEL]))


def _refuse_payload(place: str, name: str, payload: Mapping[str, Any], entries: Mapping[str, bytes]) -> None:
    meta = payload["tensor_meta"]
    file = place.rpartition("/")[2]
    if payload["use_pickle"] or meta is None or not file.startswith(("weight_", "tensor_")):
        raise UnsafeArchiveError(f"{name} is read by pickle")
    sizes = [size.get("as_int") for size in meta["sizes"]]
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise UnsafeArchiveError(f"{name} has sizes {sizes}")
    # torch makes a tensor of these sizes where there are no bytes.
    if prod(sizes) > len(entries[place]):
        raise UnsafeArchiveError(f"{name} has sizes {sizes}, and {len(entries[place])} bytes")


def _refuse_model(model: Mapping[str, Any]) -> None:
    if model["guards_code"]:
        raise UnsafeArchiveError("it has conditions on its inputs, which are code")
    for node in nodes_of(model):
        if not _OPERATORS.fullmatch(node["target"]):
            raise UnsafeArchiveError(f"it calls {node['target']!r}")
        if node["metadata"]:
            raise UnsafeArchiveError(f"a node tells where it comes from: {sorted(node['metadata'])}")
    for key, text in _texts(model):
        if key == "expr_str":
            rest = _SYMBOL.sub("1", text)
            if not _FORMULA.fullmatch(rest) or set(re.findall(r"[^\W\d]\w*", rest)) - _FUNCTIONS:
                raise UnsafeArchiveError(f"a size is given by {text[:80]!r}")
        elif key in _STRUCTURES:
            if any(word in text for word in _IMPORTING):
                raise UnsafeArchiveError(f"it has {text[:80]!r} in it, for which modules are imported")
        elif key != _LITERAL and not _NAME.fullmatch(text):
            raise UnsafeArchiveError(f"it has the name {text[:80]!r}, and names become code")


def nodes_of(model: Any) -> Iterator[dict[str, Any]]:
    """Yield the nodes of a program and of the graphs in it, as its archive tells of them."""
    return (part for part in _parts(model) if isinstance(part, dict) and {"target", "inputs", "outputs"} <= part.keys())


def _parts(value: Any) -> Iterator[Any]:
    """Yield all values in plain data."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        yield part
        waiting += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()


def _texts(value: Any) -> Iterator[tuple[str, str]]:
    """Yield all texts in plain data with the key that they are under, and the keys themselves."""
    waiting = [("", value)]
    while waiting:
        key, part = waiting.pop()
        if isinstance(part, str):
            yield key, part
        elif isinstance(part, dict):
            waiting += [*(("", name) for name in part), *part.items()]
        elif isinstance(part, list):
            waiting += [(key, one) for one in part]
