"""Noise to send through a network in the place of inputs: enough of it, and like what networks are given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from fxwidth.analysis.result import Analysis
from fxwidth.errors import FxwidthError
from fxwidth.recording.graph_meta import VALUES, notes_of
from fxwidth.recording.tape import OpCall
from fxwidth.rules.family_table import as_family
from fxwidth.rules.op_families import Convolution
from fxwidth.runtime.pytrees import Structure, flatten, rebuild
from fxwidth.statistics.allowed_batches import AllowedBatches
from fxwidth.statistics.integer_inputs import Between, Offsets, Rows, Source, has_batch, integer_sources, is_image
from fxwidth.statistics.integer_uses import uses_of
from fxwidth.statistics.observation_points import Measure, Probe

# How many rows a covariance of n channels should come from: enough of them, and several times n. Moving them takes ten
# times as long as a look at them; what stays as it is drawn may be as much more.
_ROWS, _ROWS_PER_CHANNEL = 1024, 4
_MORE = 16
# As how many rows the places of one smooth image count at most: neighbours are alike.
_ROWS_PER_IMAGE = 8
# How many numbers there may be in the largest activation of a batch, and in all that is kept: the inputs, and what a
# gradient needs of a batch.
_LARGEST_ACTIVATION, _KEPT = 2**25, 2**27
# How many samples a batch of noise has at least, where the graph is free to take so many.
_LEAST_BATCH = 16
# How often an example whose integers must stay is run.
_MOST_EXAMPLES = 64


@dataclass(frozen=True)
class Draw:
    """White noise drawn for one batch, and what makes inputs of it.

    Attributes:
        samples: how many samples it is for.
        white: the noise, and the integers, one per tensor among the inputs.
        smooth: which of these are to be smoothed.
        levels: of noise that is for an image of whole numbers, what these are; None for all else.
        movable: whether images of floating-point numbers may be moved: nothing has a weight for each of their places.
        structure: where they belong.
    """

    samples: int
    white: tuple[Tensor, ...]
    smooth: tuple[bool, ...]
    levels: tuple[Levels | None, ...]
    movable: bool
    structure: Structure

    @property
    def moving(self) -> tuple[bool, ...]:
        """Tell which of the noise is to be moved where anything is."""
        return tuple(smooth and levels is None for smooth, levels in zip(self.smooth, self.levels, strict=True))

    def batch(self, white: Sequence[Tensor] | None = None) -> list[Any]:
        """Return one value per placeholder, of this noise or of other in its place."""
        leaves = zip(self.white if white is None else white, self.smooth, self.levels, strict=True)
        return list(rebuild(self.structure, [_finished(*leaf) for leaf in leaves]))


@dataclass(frozen=True)
class Draws:
    """Batches of inputs, drawn as they are gone through, which is done once.

    Attributes:
        count: how many there are.
        draws: the batches.
    """

    count: int
    draws: Iterator[Draw]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Draw]:
        return self.draws


@dataclass(frozen=True)
class Levels:
    """What whole numbers Gaussian noise stands for: its quantiles are theirs."""

    source: Between
    dtype: torch.dtype

    def of(self, noise: Tensor) -> Tensor:
        """Return the numbers for noise of variance one."""
        return self.source.at(torch.special.ndtr(noise)).to(self.dtype)


@dataclass(frozen=True)
class _Leaf:
    """One tensor among the inputs: what stands for it on the tape, and where its values come from.

    Attributes:
        example: the tensor on the tape.
        source: where integers come from; None for noise.
        is_image: whether it is an image.
        has_places: whether something has a weight for each place of this image.
    """

    example: Tensor
    source: Source | None
    is_image: bool
    has_places: bool

    @property
    def levels(self) -> Levels | None:
        """What whole numbers noise stands for in an image of these."""
        return Levels(self.source, self.example.dtype) if self.is_image and isinstance(self.source, Between) else None

    def white(self, batch: int | None, generator: torch.Generator) -> Tensor:
        """Return noise, or integers, for so many samples, None for those of the tape."""
        shape = tuple(self.example.shape) if batch is None else (batch, *self.example.shape[1:])
        dtype = self.example.dtype
        if self.levels is not None:
            return torch.randn(shape, generator=generator, dtype=torch.float32, device=generator.device)
        if self.source is not None:
            return self.source.drawn(shape, generator).to(dtype)
        return torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)


def noise_draws(
    analysis: Analysis, probes: Sequence[Probe], seed: int, work: float, *, cautious: bool = False
) -> Draws:
    """Return Gaussian inputs: enough for the covariances the probes ask for, within a number of products.

    Images are smooth as natural ones are; all other inputs are white. Where weights belong to places of an image, as in
    a dense layer on all of it, every other batch is white too: patches of images are alike, whole images are not, and
    what serves both kinds of noise is likely to serve them. Integers are such as the network takes. A graph that looks
    at values is given the integers of the example that it was traced with, such as the lengths of sequences.

    Args:
        analysis: the graph.
        probes: what is to be measured.
        seed: what the noise is made from.
        work: about how many multiplications it may take.
        cautious: whether integers are those of the example wherever they are known.

    Raises:
        FxwidthError: the graph was traced without a sample.
    """
    examples, structure = flatten(tuple(analysis.inputs), (Tensor,))
    has_counts = any(count is not None for count in _counts(analysis))
    leaves = [_leaf(analysis, *pair) for pair in zip(examples, _sources(analysis, cautious), strict=True)]
    bags = _bags(leaves)
    recorded = bags or _recorded(analysis)
    smooth = tuple(leaf.is_image for leaf in leaves)
    places = tuple(leaf.has_places for leaf in leaves)
    kinds = 2 if any(places) else 1
    movable = any(leaf.is_image and leaf.levels is None for leaf in leaves) and not any(places)
    guarded = any(node.target == "_guards_fn" for node in analysis.module.graph.nodes)
    allowed = AllowedBatches(analysis)
    is_free = bool(analysis.batch) and not guarded and not has_counts and bags is None
    is_free = is_free and allowed.largest(_LEAST_BATCH) >= _LEAST_BATCH
    wanted = _samples_wanted(probes, recorded, _ROWS_PER_IMAGE if any(smooth) else None)
    # Batches as small as the example's take long for what they tell.
    has_more = is_free and not movable
    held = _KEPT * recorded // max(1, sum(map(torch.numel, examples)))
    affordable = int(work / _products_in_all(analysis, probes))
    samples = max(16, min(_MORE * wanted if has_more else wanted, affordable, held))
    most = _largest_batch(analysis) if is_free else recorded
    runs = kinds * -(-samples // (kinds * most))
    size = max(_LEAST_BATCH, -(-samples // runs)) if is_free else recorded
    if is_free and size not in allowed:
        size = allowed.largest(size)
        runs = kinds * -(-samples // (kinds * size))
    generators: dict[torch.device, torch.Generator] = {}

    def drawn(leaf: _Leaf) -> Tensor:
        device = leaf.example.device
        generator = generators.setdefault(device, torch.Generator(device).manual_seed(seed))
        return leaf.white(size if is_free and has_batch(analysis, leaf.example) else None, generator)

    levels = tuple(leaf.levels for leaf in leaves)
    count = min(runs, _MOST_EXAMPLES) if has_counts else runs

    def draws() -> Iterator[Draw]:
        now = smooth
        for _ in range(count):
            yield Draw(size, tuple(map(drawn, leaves)), now, levels, movable, structure)
            now = tuple(one ^ swaps for one, swaps in zip(now, places, strict=True))

    return Draws(count, draws())


def _sources(analysis: Analysis, cautious: bool) -> list[Source | None]:
    """Return where the values of integers come from: where a graph looks at values, from those that it was traced with.

    Lengths and counts fit each other, which what is drawn would not; what is looked up by number alone need not.
    """
    sources = integer_sources(analysis, cautious=cautious)
    counts = _counts(analysis) or [None] * len(sources)
    examples = flatten(tuple(analysis.inputs), (Tensor,))[0]
    return [
        source if count is None or uses_of(analysis, example).is_lookup_alone else Rows(count)
        for source, count, example in zip(sources, counts, examples, strict=True)
    ]


def _leaf(analysis: Analysis, example: Tensor, source: Source | None) -> _Leaf:
    of_numbers = example.is_floating_point() or (isinstance(source, Between) and source.is_image)
    image = of_numbers and is_image(example)
    return _Leaf(example, source, image, image and _has_places(analysis, example))


def _bags(leaves: Sequence[_Leaf]) -> int | None:
    """Return how many bags the inputs tell apart in one run, None where they tell none."""
    bags = [len(leaf.example) - leaf.source.tells_end for leaf in leaves if isinstance(leaf.source, Offsets)]
    return max(1, *bags) if bags else None


def _finished(white: Tensor, smooth: bool, levels: Levels | None) -> Tensor:
    noise = _smooth(white) if smooth else white
    return levels.of(noise) if levels is not None else noise if smooth else noise.clone()


def _largest_batch(analysis: Analysis) -> int:
    """Return of how many samples all activations can be kept at once."""
    recorded = _recorded(analysis)
    sizes = [max(1, tensor.numel() // recorded) for call in analysis.calls for tensor in call.outputs] or [1]
    return max(16, min(_LARGEST_ACTIVATION // max(sizes), _KEPT // sum(sizes)))


def _recorded(analysis: Analysis) -> int:
    """Return how many samples the example holds."""
    samples = analysis.samples_in(analysis.inputs)
    if not samples:
        raise FxwidthError(
            "the graph was traced with a batch of 0 samples, which tell nothing of what one of them takes; trace the "
            "model with one or more."
        )
    return samples


def products_per_sample(analysis: Analysis) -> float:
    """Return how many multiplications the contractions of a graph take for one sample."""
    return sum(map(_products, analysis.calls)) / _recorded(analysis)


def _counts(analysis: Analysis) -> list[Tensor | None]:
    """Return the integers among the inputs that a graph which looks at values was traced with, None for the others."""
    known: list[Tensor | None] = notes_of(analysis.module).get(VALUES, (None, None, []))[2]
    return known if analysis.record is not None else []


def _samples_wanted(probes: Sequence[Probe], recorded: int, most: int | None) -> int:
    """Return how many samples the covariances want, of which none gives more than `most` rows."""
    wanted = 16
    for probe in probes:
        tensor = probe.call.arguments[probe.argument]
        if probe.measure == Measure.MOMENT:
            channels = tensor.shape[probe.dims[0]] // probe.minor
            rows = max(1, probe.places * tensor.numel() // channels // recorded)
            wanted = max(wanted, -(-max(_ROWS, _ROWS_PER_CHANNEL * channels) // min(rows, most or rows)))
    return wanted


def _products_in_all(analysis: Analysis, probes: Sequence[Probe]) -> float:
    """Return how many multiplications a sample takes, with the second moments that are asked for; one at least."""
    moments = sum(map(_products_of_moment, probes)) / _recorded(analysis)
    return max(1.0, products_per_sample(analysis) + moments)


def _products(call: OpCall) -> int:
    """Return how many multiplications an op's contractions take."""
    total = 0
    for contraction in call.contractions:
        weight = contraction.right
        per_output = weight.numel() // max(1, weight.shape[0]) if _is_convolution(call) else 0
        per_output = per_output or contraction.left.shape[contraction.left_dims[0]]
        total += call.outputs[0].numel() * per_output
    return total


def _products_of_moment(probe: Probe) -> int:
    """Return how many multiplications a second moment takes."""
    tensor = probe.call.arguments[probe.argument]
    channels = tensor.shape[probe.dims[0]] // probe.minor
    return tensor.numel() * channels if probe.measure == Measure.MOMENT else 0


def _is_convolution(call: OpCall) -> bool:
    return as_family(call.func, Convolution) is not None


def _has_places(analysis: Analysis, example: Tensor) -> bool:
    """Tell whether something sums over all places of an image at once, each with a weight of its own."""
    places = prod(example.shape[-2:])
    for call, derived in _followed(analysis, example, lambda call: [] if call.contractions else call.outputs):
        for contraction in call.contractions:
            summed = prod(contraction.left.shape[dim] for dim in contraction.left_dims)
            if contraction.left in derived and summed % places == 0 and not _is_convolution(call):
                return True
    return False


def _followed(
    analysis: Analysis, example: Tensor, passes_on: Callable[[OpCall], Iterable[Tensor]]
) -> Iterator[tuple[OpCall, set[Tensor]]]:
    """Yield the ops that take an input, or what they pass on of it, and the ids of all such tensors before each."""
    derived = {example}
    for call in analysis.calls:
        if any(tensor in derived for tensor in call.inputs):
            yield call, derived
            derived |= set(passes_on(call))


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
    return (smooth / smooth.std()).to(noise.dtype)
