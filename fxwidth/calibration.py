"""The inputs that evidence is taken from: batches of any form fitted to a graph's placeholders, and noise."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxwidth.analysis import Analysis
from fxwidth.errors import FxwidthError
from fxwidth.input_shapes import VALUES
from fxwidth.probes import Measure, Probe
from fxwidth.structures import deep_tensors, difference, flatten, map_leaves, rebuild
from fxwidth.tape import OpCall

# How many rows a covariance of n channels should come from: enough of them, and several times n.
_ROWS, _ROWS_PER_CHANNEL = 1024, 4
_LARGEST_ACTIVATION = 2**25
# How often an example whose integers must stay is run.
_MOST_EXAMPLES = 64
# From this size on the last two dims of an input with four or more are taken for those of an image.
_SMALLEST_IMAGE = 4


def placeholder_names(analysis: Analysis) -> list[str]:
    """Return the names of a graph's placeholders, in order."""
    return [node.name for node in analysis.module.graph.nodes if node.op == "placeholder"]


def batches_from(analysis: Analysis, data: Iterable[Any], limit: int | None) -> Iterator[list[Any]]:
    """Yield one value per placeholder for each batch of data, until there are as many samples as wanted.

    Raises:
        FxwidthError: data is no iterable, a batch lacks inputs, or one has the wrong shape or dtype or is not finite.
    """
    if isinstance(data, Tensor):
        data = [data]
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes, Mapping)):
        raise FxwidthError(f"data is a {type(data).__name__}; pass an iterable of batches, such as a DataLoader.")
    left = limit
    for number, batch in enumerate(data):
        values = _fitted(analysis, batch, number)
        size = max((len(tensor) for tensor in deep_tensors(values) if tensor.dim()), default=1)
        if left is not None and size > left:
            values = [map_leaves(partial(_first, size, left), value) for value in values]
        if size:
            yield values
        if left is not None and (left := left - size) <= 0:
            return


def _first(size: int, left: int, tensor: Tensor) -> Tensor:
    return tensor[:left] if tensor.dim() and len(tensor) == size else tensor


def _fitted(analysis: Analysis, batch: Any, number: int) -> list[Any]:
    """Return one value per placeholder, taken from a batch."""
    names = placeholder_names(analysis)
    wanted = [i for i, value in enumerate(analysis.inputs) if deep_tensors(value)]
    if isinstance(batch, Mapping) and not _is_argument(batch, analysis.inputs):
        missing = [names[i] for i in wanted if not deep_tensors(batch.get(names[i]))]
        if missing:
            raise FxwidthError(
                f"batch {number} of data holds {sorted(map(str, batch))} but no tensor {missing[0]!r}; "
                f"pass dicts with the graph's inputs by name: {[names[i] for i in wanted]}."
            )
        given = [batch[names[i]] for i in wanted]
    else:
        parts = (
            list(batch) if isinstance(batch, (tuple, list)) and not _is_argument(batch, analysis.inputs) else [batch]
        )
        if parts and isinstance(parts[0], Mapping) and not _is_argument(parts[0], analysis.inputs):
            return _fitted(analysis, parts[0], number)  # inputs by name, then targets
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


class Gathered:
    """Batches of training, a few of them kept such that each had the same chance: those that are kept can be iterated.

    Args:
        samples: about how many inputs are kept.

    Source: algorithm R of J. S. Vitter, Random Sampling with a Reservoir (1985).
    """

    def __init__(self, samples: int = 512) -> None:
        self.batches: list[Any] = []
        self._samples = samples
        self._seen = 0
        self._random = random.Random(0)

    def add(self, batch: Any) -> None:
        """Take in one batch."""
        self._seen += 1
        size = next((len(tensor) for tensor in deep_tensors(batch) if tensor.dim()), 1)
        if len(self.batches) < max(4, -(-self._samples // max(1, size))):
            self.batches.append(batch)
            return
        place = self._random.randrange(self._seen)
        if place < len(self.batches):
            self.batches[place] = batch

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches that are kept."""
        return iter(self.batches)


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
    checked = [_checked(*pair, place) for pair in zip(given, expected, strict=True)]
    return rebuild(flatten(example, (Tensor,))[1], checked)


def _checked(tensor: Tensor, example: Tensor, place: str) -> Tensor:
    shape, expected = tuple(tensor.shape), tuple(example.shape)
    if len(shape) != len(expected) or shape[1:] != expected[1:]:
        raise FxwidthError(
            f"{place} has shape {shape}, the graph was analysed with {expected}; "
            "pass batches of that shape (only the first dim, the batch, may differ)."
        )
    return _of_kind(tensor, example, place)


def _of_kind(tensor: Tensor, example: Tensor, place: str) -> Tensor:
    if tensor.dtype != example.dtype and tensor.is_floating_point() != example.is_floating_point():
        raise FxwidthError(f"{place} is {tensor.dtype}, the graph was analysed with {example.dtype}; convert it.")
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise FxwidthError(f"{place} holds NaN or infinite values; leave such samples out.")
    return tensor.detach().to(example.device, example.dtype)


def noise_batches(analysis: Analysis, probes: Sequence[Probe], seed: int, work: float) -> Iterator[list[Any]]:
    """Yield batches of Gaussian inputs: enough for the covariances the probes ask for, within a number of products.

    Images are smooth as natural ones are; all other inputs are white. A graph that looks at values is given the
    integers of the example that it was traced with, such as the lengths of sequences.
    """
    leaves, structure = flatten(tuple(analysis.inputs), (Tensor,))
    known = _counts(analysis) or [None] * len(leaves)
    has_counts = any(count is not None for count in known)
    recorded = next((len(tensor) for tensor in deep_tensors(analysis.inputs) if tensor.dim()), 1)
    samples = _samples_wanted(probes, recorded)
    products = (sum(map(_products, analysis.calls)) + sum(map(_products_of_moment, probes))) / recorded
    samples = int(max(16, min(samples, work / max(1.0, products))))
    largest = max((tensor.numel() for call in analysis.calls for tensor in call.outputs), default=1) // recorded
    guarded = any(node.target == "_guards_fn" for node in analysis.module.graph.nodes)
    is_free = analysis.batch and not guarded and not has_counts
    size = min(samples, max(16, _LARGEST_ACTIVATION // max(1, largest))) if is_free else recorded
    generators: dict[torch.device, torch.Generator] = {}

    def noise(example: Tensor, count: Tensor | None) -> Tensor:
        if count is not None:
            return count.to(example.device)
        generator = generators.setdefault(example.device, torch.Generator(example.device).manual_seed(seed))
        return _noise(analysis, example, size if is_free else None, generator)

    runs = -(-samples // size)
    for _ in range(min(runs, _MOST_EXAMPLES) if has_counts else runs):
        yield list(rebuild(structure, list(map(noise, leaves, known))))


def _counts(analysis: Analysis) -> list[Tensor | None]:
    """Return the integers among the inputs that a graph which looks at values was traced with, None for the others."""
    known: list[Tensor | None] = analysis.module.meta.get(VALUES, (None, None, []))[2]
    return known if analysis.record is not None else []


def _samples_wanted(probes: Sequence[Probe], recorded: int) -> int:
    wanted = 16
    for probe in probes:
        tensor = probe.call.arguments[probe.argument]
        if probe.measure == Measure.MOMENT:
            channels = tensor.shape[probe.dims[0]] // probe.minor
            rows = max(1, probe.places * tensor.numel() // channels // recorded)
            wanted = max(wanted, -(-max(_ROWS, _ROWS_PER_CHANNEL * channels) // rows))
    return wanted


def _products(call: OpCall) -> int:
    """Return how many multiplications an op's contractions take."""
    total = 0
    for contraction in call.contractions:
        weight = contraction.right
        per_output = weight.numel() // max(1, weight.shape[0]) if call.name.endswith("convolution") else 0
        per_output = per_output or contraction.left.shape[contraction.left_dims[0]]
        total += call.outputs[0].numel() * per_output
    return total


def _products_of_moment(probe: Probe) -> int:
    """Return how many multiplications a second moment takes."""
    tensor = probe.call.arguments[probe.argument]
    channels = tensor.shape[probe.dims[0]] // probe.minor
    return tensor.numel() * channels if probe.measure == Measure.MOMENT else 0


def _noise(analysis: Analysis, example: Tensor, batch: int | None, generator: torch.Generator) -> Tensor:
    shape = list(example.shape)
    if batch is not None and shape and any(f.is_batch for f in analysis.space.factors(analysis.axes_of(example)[0])):
        shape[0] = batch
    device = example.device
    if example.is_floating_point() or example.is_complex():
        noise = torch.randn(shape, generator=generator, dtype=example.dtype, device=device)
        return _smooth(noise) if _is_image(example) else noise
    high = _vocabulary(analysis, example)
    if high is None:
        # A mask or a type: whatever it selects, one is within its range.
        return torch.ones(shape, dtype=example.dtype, device=device)
    return torch.randint(high, shape, generator=generator, device=device, dtype=example.dtype)


def _is_image(example: Tensor) -> bool:
    return example.is_floating_point() and example.dim() >= 4 and min(example.shape[-2:]) >= _SMALLEST_IMAGE


def _smooth(noise: Tensor) -> Tensor:
    """Return noise with amplitudes in inverse proportion to the frequency in its last two dims, of variance one.

    Source: D. J. Field, Relations between the Statistics of Natural Images and the Response Properties of Cortical
        Cells (1987): so are those of images.
    """
    height, width = noise.shape[-2:]
    wide = noise if noise.dtype == torch.float64 else noise.float()
    rows = torch.fft.fftfreq(height, dtype=wide.dtype, device=wide.device)
    columns = torch.fft.rfftfreq(width, dtype=wide.dtype, device=wide.device)
    frequency = torch.hypot(rows[:, None], columns[None]).clamp_min(1 / max(height, width))
    smooth: Tensor = torch.fft.irfft2(torch.fft.rfft2(wide) / frequency, s=(height, width))
    smooth /= smooth.std()
    return smooth.to(noise.dtype)


def _vocabulary(analysis: Analysis, example: Tensor) -> int | None:
    """Return the size of the smallest table that an integer input, or integers made from it, index."""
    derived = {id(example)}
    sizes = []
    for call in analysis.calls:
        if not any(id(tensor) in derived for tensor in call.inputs):
            continue
        if call.name == "embedding" and id(call.arguments["indices"]) in derived:
            sizes.append(call.arguments["weight"].shape[0])
        elif call.name == "index":
            pairs = zip(call.arguments["self"].shape, call.arguments["indices"], strict=False)
            sizes += [size for size, index in pairs if index is not None and id(index) in derived]
        derived |= {id(out) for out in call.outputs if not out.is_floating_point() and out.dtype != torch.bool}
    return min(sizes, default=None)
