"""Noise to send through a network in the place of inputs: enough of it, and like what networks are given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from fxwidth.analysis.result import Analysis
from fxwidth.recording.graph_meta import VALUES, notes_of
from fxwidth.recording.tape import OpCall
from fxwidth.runtime.pytrees import Structure, flatten, rebuild
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
# How often an example whose integers must stay is run.
_MOST_EXAMPLES = 64
# From this size on the last two dims of an input with four or more are taken for those of an image.
_SMALLEST_IMAGE = 4


@dataclass(frozen=True)
class Draw:
    """White noise drawn for one batch, and what makes inputs of it.

    Attributes:
        samples: how many samples it is for.
        white: the noise, and the integers, one per tensor among the inputs.
        smooth: which of these are to be smoothed.
        movable: whether these may be moved: images of which nothing has a weight for each place.
        structure: where they belong.
    """

    samples: int
    white: tuple[Tensor, ...]
    smooth: tuple[bool, ...]
    movable: bool
    structure: Structure

    def batch(self, white: Sequence[Tensor] | None = None) -> list[Any]:
        """Return one value per placeholder, of this noise or of other in its place."""
        leaves = zip(self.white if white is None else white, self.smooth, strict=True)
        return list(rebuild(self.structure, [_smooth(leaf) if smooth else leaf.clone() for leaf, smooth in leaves]))


def noise_draws(analysis: Analysis, probes: Sequence[Probe], seed: int, work: float) -> Iterator[Draw]:
    """Yield Gaussian inputs: enough for the covariances the probes ask for, within a number of products.

    Images are smooth as natural ones are; all other inputs are white. Where weights belong to places of an image, as in
    a dense layer on all of it, every other batch is white too: patches of images are alike, whole images are not, and
    what serves both kinds of noise is likely to serve them. A graph that looks at values is given the integers of the
    example that it was traced with, such as the lengths of sequences.
    """
    leaves, structure = flatten(tuple(analysis.inputs), (Tensor,))
    known = _counts(analysis) or [None] * len(leaves)
    has_counts = any(count is not None for count in known)
    recorded = analysis.samples_in(analysis.inputs)
    smooth = tuple(map(_is_image, leaves))
    places = tuple(
        is_image and _has_places(analysis, example) for is_image, example in zip(smooth, leaves, strict=True)
    )
    kinds = 2 if any(places) else 1
    movable = any(smooth) and not any(places)
    guarded = any(node.target == "_guards_fn" for node in analysis.module.graph.nodes)
    is_free = analysis.batch and not guarded and not has_counts
    wanted = _samples_wanted(probes, recorded, _ROWS_PER_IMAGE if any(smooth) else None)
    # Batches as small as the example's take long for what they tell.
    has_more = is_free and not movable
    held = _KEPT * recorded // max(1, sum(map(torch.numel, leaves)))
    affordable = int(work / _products_in_all(analysis, probes))
    samples = max(16, min(_MORE * wanted if has_more else wanted, affordable, held))
    most = _largest_batch(analysis) if is_free else recorded
    runs = kinds * -(-samples // (kinds * most))
    size = max(16, -(-samples // runs)) if is_free else recorded
    generators: dict[torch.device, torch.Generator] = {}

    def drawn(example: Tensor, count: Tensor | None) -> Tensor:
        if count is not None:
            return count.to(example.device)
        generator = generators.setdefault(example.device, torch.Generator(example.device).manual_seed(seed))
        return _noise(analysis, example, size if is_free else None, generator)

    for _ in range(min(runs, _MOST_EXAMPLES) if has_counts else runs):
        yield Draw(size, tuple(map(drawn, leaves, known)), smooth, movable, structure)
        smooth = tuple(now ^ swaps for now, swaps in zip(smooth, places, strict=True))


def _largest_batch(analysis: Analysis) -> int:
    """Return of how many samples all activations can be kept at once."""
    recorded = analysis.samples_in(analysis.inputs)
    sizes = [max(1, tensor.numel() // recorded) for call in analysis.calls for tensor in call.outputs] or [1]
    return max(16, min(_LARGEST_ACTIVATION // max(sizes), _KEPT // sum(sizes)))


def products_per_sample(analysis: Analysis) -> float:
    """Return how many multiplications the contractions of a graph take for one sample."""
    return sum(map(_products, analysis.calls)) / analysis.samples_in(analysis.inputs)


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
    moments = sum(map(_products_of_moment, probes)) / analysis.samples_in(analysis.inputs)
    return max(1.0, products_per_sample(analysis) + moments)


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
        return torch.randn(shape, generator=generator, dtype=example.dtype, device=device)
    high = _vocabulary(analysis, example)
    if high is None:
        # A mask or a type: whatever it selects, one is within its range.
        return torch.ones(shape, dtype=example.dtype, device=device)
    return torch.randint(high, shape, generator=generator, device=device, dtype=example.dtype)


def _is_image(example: Tensor) -> bool:
    return example.is_floating_point() and example.dim() >= 4 and min(example.shape[-2:]) >= _SMALLEST_IMAGE


def _has_places(analysis: Analysis, example: Tensor) -> bool:
    """Tell whether something sums over all places of an image at once, each with a weight of its own."""
    places = prod(example.shape[-2:])
    for call, derived in _followed(analysis, example, lambda call: [] if call.contractions else call.outputs):
        for contraction in call.contractions:
            summed = prod(contraction.left.shape[dim] for dim in contraction.left_dims)
            if id(contraction.left) in derived and summed % places == 0 and not call.name.endswith("convolution"):
                return True
    return False


def _followed(
    analysis: Analysis, example: Tensor, passes_on: Callable[[OpCall], Iterable[Tensor]]
) -> Iterator[tuple[OpCall, set[int]]]:
    """Yield the ops that take an input, or what they pass on of it, and the ids of all such tensors before each."""
    derived = {id(example)}
    for call in analysis.calls:
        if any(id(tensor) in derived for tensor in call.inputs):
            yield call, derived
            derived |= {id(tensor) for tensor in passes_on(call)}


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


def _vocabulary(analysis: Analysis, example: Tensor) -> int | None:
    """Return the size of the smallest table that an integer input, or integers made from it, index."""

    def integers(call: OpCall) -> list[Tensor]:
        return [out for out in call.outputs if not out.is_floating_point() and out.dtype != torch.bool]

    sizes = []
    for call, derived in _followed(analysis, example, integers):
        if call.name == "embedding" and id(call.arguments["indices"]) in derived:
            sizes.append(call.arguments["weight"].shape[0])
        elif call.name == "index":
            pairs = zip(call.arguments["self"].shape, call.arguments["indices"], strict=False)
            sizes += [size for size, index in pairs if index is not None and id(index) in derived]
    return min(sizes, default=None)
