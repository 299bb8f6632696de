"""The inputs that evidence is taken from: batches of any form, fitted to a graph's placeholders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxwidth.analysis.result import Analysis
from fxwidth.errors import FxwidthError
from fxwidth.recording.batch_dim import takes_larger
from fxwidth.runtime.pytree_differences import difference
from fxwidth.runtime.pytrees import deep_tensors, flatten, map_leaves, rebuild
from fxwidth.statistics.allowed_batches import AllowedBatches
from fxwidth.statistics.integer_inputs import Offsets, integer_sources

# The bytes that the largest result of an op may take for a batch that is cut anew.
_MEMORY = 2**28


class UnfitBatchError(FxwidthError):
    """A batch has other sizes than the example, or values that are not finite, which others may not have."""


def input_names(analysis: Analysis) -> list[str]:
    """Return the names of a graph's inputs, as arguments of a call, in order."""
    # The name of a node may differ: where an argument's hides a builtin, as "input" does.
    return [str(node.target) for node in analysis.module.graph.find_nodes(op="placeholder")]


def refuse_other_than_batches(data: Any) -> None:
    """Check that data, if there are any, can be gone through batch by batch.

    Raises:
        FxwidthError: they cannot.
    """
    if data is not None and (not isinstance(data, Iterable) or isinstance(data, (str, bytes, Mapping))):
        raise FxwidthError(f"data is a {type(data).__name__}; pass an iterable of batches, such as a DataLoader.")


def batches_from(analysis: Analysis, data: Iterable[Any], limit: int | None) -> Iterator[list[Any]]:
    """Yield one value per placeholder for each batch of data, until there are as many samples as wanted.

    Raises:
        FxwidthError: data is no iterable, a batch lacks inputs, or one has the wrong shape or dtype or is not finite.
    """
    if isinstance(data, Tensor):
        data = [data]
    refuse_other_than_batches(data)
    left, allowed = limit, AllowedBatches(analysis)
    for number, batch in enumerate(data):
        values = _fitted(analysis, batch, number)
        # Lists hold whole samples: their tensors have none to be left out.
        is_whole = analysis.takes_lists or _has_bags(analysis)
        size = analysis.samples_in(values) if analysis.takes_lists or analysis.is_single else _longest(values)
        if left is not None and size > left and not is_whole and left in allowed:
            values = [map_leaves(partial(_first, size, left), value) for value in values]
        if size:
            yield values
        if left is not None and (left := left - size) <= 0:
            return


def refusal_of(analysis: Analysis, batch: Any, number: int) -> UnfitBatchError | None:
    """Return why a batch cannot be looked at, where others of its kind may be.

    Raises:
        FxwidthError: it is of another kind than the graph takes.
    """
    try:
        _fitted(analysis, batch, number)
    except UnfitBatchError as error:
        return error
    return None


def cut_anew(analysis: Analysis, batches: Iterable[Sequence[Any]], most: int) -> Iterator[list[Any]]:
    """Yield the samples of batches in batches whose sizes do not depend on how the data came.

    What is computed from each batch by itself is then the same however data are cut, and a single sample, for which
    some ops take another way, is not run alone. There are as many samples in each batch as the largest result of an op
    allows in memory, at most 512. Batches stay as they are where inputs have no batch, where the graph does not take
    every other batch size, and where what it does depends on values, or values tell where each of some bags begins.

    Args:
        analysis: the graph that takes them.
        batches: one value per placeholder each.
        most: about how many samples a batch may have; fewer where the results of ops would take too much memory.
    """
    is_fixed = analysis.record is not None or _has_bags(analysis)
    if analysis.batch is None or is_fixed or not _takes_larger_batches(analysis):
        yield from map(list, batches)
        return
    most = min(most, _samples_at_once(analysis, analysis.batch.size))
    if not AllowedBatches(analysis).all_in(range(2, 2 * most + 1)):
        yield from map(list, batches)
        return
    waiting: list[Sequence[Any]] = []
    for values in batches:
        if _common_length(values) is None:
            yield from _cut(waiting, most)
            yield list(values)
            waiting = []
            continue
        waiting.append(values)
        if sum(map(_length, waiting)) >= 2 * most:
            *whole, rest = _pieces(waiting, most)
            yield from whole
            waiting = [rest]
    yield from _cut(waiting, most)


def _longest(values: Sequence[Any]) -> int:
    return max((len(tensor) for tensor in deep_tensors(list(values)) if tensor.dim()), default=1)


def _has_bags(analysis: Analysis) -> bool:
    """Tell whether some inputs are entries of bags, and another tells where each of these begins."""
    return any(isinstance(source, Offsets) for source in integer_sources(analysis))


def _takes_larger_batches(analysis: Analysis) -> bool:
    fakes = {name: entry.fake for name, entry in analysis.parameters.items()}
    return takes_larger(analysis.module, analysis.inputs, fakes, analysis.mode)


def _samples_at_once(analysis: Analysis, batch: int) -> int:
    largest = max((t.numel() * t.element_size() for call in analysis.calls for t in call.outputs), default=1)
    return max(2, _MEMORY * batch // max(1, largest))


def _pieces(batches: Sequence[Sequence[Any]], most: int) -> list[list[Any]]:
    """Return batches of a size, and what is left over: at least so many samples, and less than twice."""
    count = sum(map(_length, batches))
    return _between(batches, [*range(0, count - most + 1, most), count])


def _cut(batches: Sequence[Sequence[Any]], most: int) -> list[list[Any]]:
    """Return nearly equal batches of at most a size."""
    count = sum(map(_length, batches))
    pieces = -(-count // most)
    return _between(batches, [count * i // pieces for i in range(pieces + 1)]) if pieces else []


def _between(batches: Sequence[Sequence[Any]], borders: Sequence[int]) -> list[list[Any]]:
    """Return the batches between some numbers of samples."""
    opened = [flatten(tuple(values), (Tensor,)) for values in batches]
    places = zip(*(tensors for tensors, _ in opened), strict=True)
    whole = [torch.cat(parts) if parts[0].dim() else parts[0] for parts in places]
    return [
        list(rebuild(opened[0][1], [part[start:end] if part.dim() else part for part in whole]))
        for start, end in pairwise(borders)
    ]


def _common_length(values: Sequence[Any]) -> int | None:
    """Return the size of the first dim that all tensors share."""
    lengths = {len(tensor) for tensor in deep_tensors(tuple(values)) if tensor.dim()}
    return lengths.pop() if len(lengths) == 1 else None


def _length(values: Sequence[Any]) -> int:
    return _common_length(values) or 0


def _first(size: int, left: int, tensor: Tensor) -> Tensor:
    return tensor[:left] if tensor.dim() and len(tensor) == size else tensor


def _fitted(analysis: Analysis, batch: Any, number: int) -> list[Any]:
    """Return one value per placeholder, taken from a batch."""
    names = input_names(analysis)
    wanted = [i for i, value in enumerate(analysis.inputs) if deep_tensors(value)]
    if isinstance(batch, Mapping) and not _is_argument(batch, analysis.inputs):
        _refuse_arrays([batch.get(names[i]) for i in wanted], number)
        missing = [names[i] for i in wanted if not deep_tensors(batch.get(names[i]))]
        if missing:
            raise FxwidthError(
                f"batch {number} of data holds {sorted(map(str, batch))} but no tensor {missing[0]!r}; "
                f"pass dicts with the graph's inputs by name: {[names[i] for i in wanted]}."
                f"{_of_dict(batch, names, analysis.inputs)}"
            )
        given = [batch[names[i]] for i in wanted]
    else:
        parts = (
            list(batch) if isinstance(batch, (tuple, list)) and not _is_argument(batch, analysis.inputs) else [batch]
        )
        if parts and isinstance(parts[0], Mapping) and not _is_argument(parts[0], analysis.inputs):
            return _fitted(analysis, parts[0], number)  # inputs by name, then targets
        _refuse_arrays(parts[: len(wanted)], number)
        given = [part for part in parts if deep_tensors(part)][: len(wanted)]
        if len(given) < len(wanted):
            raise FxwidthError(
                f"batch {number} of data has {len(given)} tensors, the graph takes {len(wanted)} "
                f"({', '.join(names[i] for i in wanted)}); pass tuples that begin with the inputs."
            )
    values = list(analysis.inputs)
    for i, value in zip(wanted, given, strict=True):
        values[i] = _all_checked(analysis, value, analysis.inputs[i], f"input {names[i]!r} in batch {number} of data")
    return values


class Replayed:
    """Batches that can be gone through more than once: what an iterator gives is kept, all else is asked again."""

    def __init__(self, data: Iterable[Any]) -> None:
        self._kept: list[Any] = []
        self._data = data

    def __iter__(self) -> Iterator[Any]:
        """Yield all batches from the first."""
        if not isinstance(self._data, Iterator):
            yield from self._data
            return
        place = 0
        while True:
            while place < len(self._kept):
                yield self._kept[place]
                place += 1
            try:
                self._kept.append(next(self._data))
            except StopIteration:
                return


def replayed(data: Iterable[Any] | None) -> Iterable[Any] | None:
    """Return data such that a generator can be gone through several times; other objects as they are."""
    return Replayed(data) if isinstance(data, Iterator) else data


def _of_dict(batch: Mapping[Any, Any], names: Sequence[str], inputs: Sequence[Any]) -> str:
    """Return what helps where a dict with more in it than an input that is a dict was given for this."""
    for name, example in zip(names, inputs, strict=True):
        if isinstance(example, Mapping) and example.keys() < batch.keys():
            more = sorted(map(str, batch.keys() - example.keys()))
            return (
                f" The input {name!r} is itself a dict, of {sorted(map(str, example))}: leave {more} out of it, and "
                "pass targets behind it, (inputs, targets)."
            )
    return ""


def _refuse_arrays(parts: Sequence[Any], number: int) -> None:
    if any(flatten(part, (np.ndarray,))[0] for part in parts):
        raise FxwidthError(
            f"batch {number} of data holds a numpy array, where the graph takes tensors; pass torch.from_numpy(array)."
        )


def targets_of(analysis: Analysis, batch: Any) -> tuple[Any, ...]:
    """Return what a batch holds beside the graph's inputs: what follows them, or a dict as a whole."""
    if _is_argument(batch, analysis.inputs):
        return ()
    if isinstance(batch, Mapping):
        return (batch,)
    parts = list(batch) if isinstance(batch, (tuple, list)) else [batch]
    if parts and isinstance(parts[0], Mapping) and not _is_argument(parts[0], analysis.inputs):
        return tuple(parts[1:])
    wanted = sum(bool(deep_tensors(value)) for value in analysis.inputs)
    places = [place for place, part in enumerate(parts) if deep_tensors(part)][:wanted]
    return tuple(parts[places[-1] + 1 :]) if places else ()


def _is_argument(value: Any, inputs: Sequence[Any]) -> bool:
    """Tell whether a list or dict is itself one of the inputs."""
    structure = flatten(value)[1]
    return any(deep_tensors(example) and difference(flatten(example)[1], structure) is None for example in inputs)


def _all_checked(analysis: Analysis, value: Any, example: Any, place: str) -> Any:
    given, expected = deep_tensors(value), deep_tensors(example)
    if analysis.record is not None and isinstance(value, list) and isinstance(example, list):
        # A list of samples, each of its own size, for a model that looks at values anyway.
        return [_of_kind(tensor, expected[0], place) for tensor in given]
    if len(given) != len(expected):
        raise FxwidthError(
            f"{place} holds {len(given)} tensors, the graph was analysed with {len(expected)}; pass inputs like those."
        )
    checked = [_checked(analysis, *pair, place) for pair in zip(given, expected, strict=True)]
    return rebuild(flatten(example, (Tensor,))[1], checked)


def _checked(analysis: Analysis, tensor: Tensor, example: Tensor, place: str) -> Tensor:
    shape, expected = tuple(tensor.shape), tuple(example.shape)
    if analysis.is_single and shape != expected:
        raise UnfitBatchError(
            f"{place} has shape {shape}, the graph takes one sample of shape {expected} at a time; pass an iterable of "
            "such samples."
        )
    if len(shape) != len(expected) or shape[1:] != expected[1:]:
        raise UnfitBatchError(
            f"{place} has shape {shape}, the graph was analysed with {expected}; "
            "pass batches of that shape (only the first dim, the batch, may differ)."
        )
    return _of_kind(tensor, example, place)


def _of_kind(tensor: Tensor, example: Tensor, place: str) -> Tensor:
    if tensor.dtype != example.dtype and tensor.is_floating_point() != example.is_floating_point():
        raise FxwidthError(f"{place} is {tensor.dtype}, the graph was analysed with {example.dtype}; convert it.")
    if tensor.is_meta:
        raise FxwidthError(f"{place} is on the meta device and has no values; pass tensors with numbers in them.")
    entries = tensor if tensor.layout is torch.strided else tensor.to_sparse_coo().coalesce().values()
    if tensor.is_floating_point() and not bool(entries.isfinite().all()):
        raise UnfitBatchError(f"{place} holds NaN or infinite values; leave such samples out.")
    return tensor.detach().to(example.device, example.dtype)
