"""Files of tensors with a record in their header, checked as a whole before anything in them is believed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from safetensors.torch import save_file
from torch import Tensor

from fxwidth.errors import FxwidthError
from fxwidth.runtime.atomic_files import replacing, unreadable, unwritable

# Under this key a header has texts, and others are names of tensors.
_TEXTS = "__metadata__"
_DIGEST, _PAIRS = "fxwidth.sha256", "fxwidth.real_pairs"
_UNKNOWN = "0" * 64
_AS_PAIRS = frozenset({torch.complex32, torch.complex64, torch.complex128})
_BLOCK = 2**20


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and texts to a file, as a whole or not at all, with a digest of all its bytes.

    Raises:
        FxwidthError: a tensor is of a kind that such a file does not hold, or the file cannot be written.
    """
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    pairs: list[str] = []
    for name, tensor in tensors.items():
        if name == _TEXTS or name.encode(errors="replace") != name.encode(errors="surrogatepass"):
            raise FxwidthError(f"no tensor in a .safetensors file can be called {name!r}; give it another name.")
        values = _plain(name, tensor)
        pairs += [name] if tensor.is_complex() and not values.is_complex() else []
        # A file holds no memory twice.
        values = values.clone() if values.untyped_storage().data_ptr() in seen else values
        seen.add(values.untyped_storage().data_ptr())
        plain[name] = values
    texts = {**metadata, _PAIRS: json.dumps(pairs), _DIGEST: _UNKNOWN}
    with replacing(path) as target:
        try:
            save_file(plain, target, metadata=texts)
        except SafetensorError as error:
            raise unwritable(path, error) from error
        with target.open("rb+") as file:
            place = _place_of_digest(file)
            digest = _digest(file, place)
            file.seek(place)
            file.write(digest.encode("ascii"))


def _plain(name: str, tensor: Tensor) -> Tensor:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "on the meta device" if tensor.is_meta else "quantized" if tensor.is_quantized else tensor.layout
        raise FxwidthError(
            f"{name} is {kind}, which a .safetensors file does not hold; save to another path, or make it a dense "
            "tensor first."
        )
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    if tensor.dtype in _AS_PAIRS and not _is_known(tensor.dtype):
        plain = torch.view_as_real(plain)
    if not _is_known(plain.dtype):
        raise FxwidthError(
            f"{name} is of {tensor.dtype}, which a .safetensors file does not hold; save to another path, or make "
            "it a tensor of another dtype first."
        )
    return plain


@cache
def _is_known(dtype: torch.dtype) -> bool:
    """Tell whether a file of tensors can hold those of a dtype, and give them back."""
    try:
        return load_bytes(save_bytes({"": torch.zeros(1, dtype=dtype, device="cpu")}))[""].dtype == dtype
    except Exception:
        return False


@dataclass(frozen=True)
class Entry:
    """A tensor as a header tells of it: its dtype in the words of the format, its shape, and where its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """A file of tensors that is open, whose header fits its size, and whose digest is that of its bytes.

    All is read through one handle: whatever takes the place of the file meanwhile does not matter.

    Attributes:
        path: of the file, for messages.
        size: in bytes.
        entries: the tensors, by name.
        metadata: the texts in the header.
        has_digest: whether it has a digest; files of earlier versions do not.
    """

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self._file = path, file
        self.size = os.fstat(file.fileno()).st_size
        header = _header(path, file, self.size)
        self.metadata: dict[str, str] = header.pop(_TEXTS, {})
        self._start = self.size - max((one["data_offsets"][1] for one in header.values()), default=0)
        self.entries = {
            name: Entry(one["dtype"], tuple(one["shape"]), *one["data_offsets"]) for name, one in header.items()
        }
        self._pairs = frozenset(json.loads(self.metadata.get(_PAIRS, "[]")))
        self.has_digest = _DIGEST in self.metadata

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        shape = self.entries[name].shape
        return shape[:-1] if name in self._pairs else shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        dtype = _dtype_named(self.entries[name].dtype)
        return dtype.to_complex() if name in self._pairs else dtype

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, on the CPU.

        Raises:
            FxwidthError: its bytes are not there.
        """
        entry = self.entries[name]
        self._file.seek(self._start + entry.begin)
        content = self._file.read(entry.end - entry.begin)
        try:
            values = load_bytes(_alone(entry.dtype, entry.shape, content))[""]
        except (SafetensorError, ValueError, TypeError, RuntimeError, ArithmeticError) as error:
            raise damaged(self.path, f"{name} cannot be read: {error}") from error
        return torch.view_as_complex(values) if name in self._pairs else values


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a file of tensors, and check it as a whole.

    Raises:
        FxwidthError: it is no such file, or is not as it was written.
    """
    with opened(path) as file:
        try:
            found = TensorFile(path, file)
            if found.has_digest and _digest(file, _place_of_digest(file)) != found.metadata[_DIGEST]:
                raise damaged(path, "its bytes are not those that were written")
        except OSError as error:
            raise unreadable(path, error) from error
        except (ValueError, TypeError, KeyError, LookupError, RecursionError, AttributeError) as error:
            raise damaged(path, f"its header says {error!r}") from error
        yield found


def opened(path: Path) -> IO[bytes]:
    """Return a file, open for reading.

    Raises:
        FxwidthError: it cannot be opened.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise unreadable(path, error) from error


def damaged(path: Path, what: str) -> FxwidthError:
    """Return the error that tells that a file is not as it was written."""
    return FxwidthError(f"{path} is damaged: {what}. Use another copy of the file, or save the graph again.")


def _header(path: Path, file: IO[bytes], size: int) -> dict[str, Any]:
    """Return the header of a file, checked against its size before anything is made that it tells of."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise damaged(path, f"its header would be {length} bytes long, and the file is of {size}")
    header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise damaged(path, "its header is no mapping")
    texts = header.get(_TEXTS, {})
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise damaged(path, "its header has other than texts in it")
    end = 0
    tensors = {name: one for name, one in header.items() if name != _TEXTS}
    for name, one in sorted(tensors.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        begin, new_end = one["data_offsets"]
        sizes = [*one["shape"], begin, new_end]
        if not all(type(number) is int and number >= 0 for number in sizes) or begin != end:
            raise damaged(path, f"{name} of shape {one['shape']} is at bytes {one['data_offsets']}")
        bits = 8 * (new_end - begin)
        if bits != prod(one["shape"]) * _bits(one["dtype"]):
            raise damaged(path, f"{name} of shape {one['shape']} and dtype {one['dtype']} has {bits // 8} bytes")
        end = new_end
    if 8 + length + end != size:
        raise damaged(path, f"its header tells of {8 + length + end} bytes, and the file is of {size}")
    return header


@cache
def _dtype_named(name: str) -> torch.dtype:
    """Return what safetensors calls by a name.

    Raises:
        ValueError: nothing.
    """
    try:
        return load_bytes(_alone(name, (0,), b""))[""].dtype
    except Exception as error:
        raise ValueError(f"{name!r} is no dtype that torch has") from error


def _bits(name: str) -> int:
    return 8 * _dtype_named(name).itemsize


def _alone(dtype: str, shape: tuple[int, ...], content: bytes) -> bytes:
    """Return a file of one tensor."""
    header = json.dumps({"": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(content)]}}).encode()
    return len(header).to_bytes(8, "little") + header + content


def _place_of_digest(file: IO[bytes]) -> int:
    """Return where in a file its digest stands. As a key it is there once: within texts quotes are escaped."""
    file.seek(0)
    header = file.read(int.from_bytes(file.read(8), "little"))
    key = f'"{_DIGEST}":"'.encode()
    if header.count(key) != 1:
        raise ValueError("its digest cannot be found")
    return 8 + header.index(key) + len(key)


def _digest(file: IO[bytes], place: int) -> str:
    """Return the digest of a file, in which that itself counts as zeros."""
    file.seek(0)
    digest, position = hashlib.sha256(), 0
    while block := file.read(_BLOCK):
        lower, upper = max(place - position, 0), min(place + len(_UNKNOWN) - position, len(block))
        if lower < upper:
            block = block[:lower] + _UNKNOWN[: upper - lower].encode() + block[upper:]
        digest.update(block)
        position += len(block)
    return digest.hexdigest()
