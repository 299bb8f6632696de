"""Noise moved to where a network's outputs differ, since the inputs that it was trained on are such inputs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx

from fxwidth.analysis.result import Analysis
from fxwidth.recording.readonly_runs import copies, left_as_it_is
from fxwidth.runtime.finiteness import accumulation_dtype
from fxwidth.runtime.pytrees import deep_tensors
from fxwidth.runtime.tensor_slots import substituted, tensor_slots
from fxwidth.statistics.synthetic_inputs import Draw, Draws, products_per_sample
from fxwidth.work_progress import each

# How far noise is moved, in its standard deviations, in how many steps at most and at least.
_DISTANCE, _STEPS, _FEWEST = 0.5, 5, 2
# How many times the work that noise is meant to take may be spent on moving it.
_EFFORT = 60


def impressions(analysis: Analysis, draws: Draws | Sequence[Draw], work: float, seed: int) -> Iterator[list[Any]]:
    """Yield batches of noise, of which what stands for images is moved to where the network's outputs differ.

    What a trained network has kept of its data is what it answers by. Noise is moved a little, within its own spectrum
    and at its own variance, so that the outputs of each sample leave the mean of all by a way of their own, drawn at
    random. What cannot be differentiated stays as it was drawn, and so does what would take too long, and whole images
    that a dense layer reads: these would be moved pixel by pixel, into patterns that are like no image. Batch norms may
    normalise by what they see meanwhile: gradients are those of their running statistics.

    Args:
        analysis: the graph.
        draws: the noise.
        work: about how many multiplications the noise is meant to take.
        seed: what the ways are drawn from.

    Source: G. K. Nayak et al., Zero-Shot Knowledge Distillation in Deep Networks (2019), where such inputs stand for
        data; H. Yin et al., Dreaming to Distill (2020), where they are kept like images.
    """
    generator = torch.Generator().manual_seed(seed)
    # A run, and the gradient with respect to its inputs.
    affordable = _EFFORT * work / max(1.0, 2 * products_per_sample(analysis))
    for number, draw in enumerate(draws):
        steps = int(min(_STEPS, affordable // draw.samples))
        moves = draw.movable and analysis.record is None and steps >= _FEWEST
        told = each(range(steps if moves else 1), "drawing inputs", part=(number, len(draws)))
        batch = _moved(analysis, draw, told, steps, generator) if moves else draw.batch()
        # Where there is no gradient, steps are left over.
        deque(told, maxlen=0)
        yield batch


def _moved(analysis: Analysis, draw: Draw, told: Iterable[int], steps: int, generator: torch.Generator) -> list[Any]:
    """Return the inputs made of moved noise, or those of the noise as it was where there is no gradient."""
    ways = _OutputDirections(generator)
    with torch.inference_mode(False), left_as_it_is(analysis.module), _without_gradients(analysis):
        white = [leaf.clone() for leaf in draw.white]
        moving = [leaf.requires_grad_() for leaf, moves in zip(white, draw.moving, strict=True) if moves]
        optimizer = torch.optim.Adam(moving, lr=_DISTANCE / steps)
        for _ in told:
            with torch.enable_grad():
                values = draw.batch(white)
                gradients = _gradients(analysis, values, moving, ways)
            if gradients is None:
                return draw.batch()
            for leaf, gradient in zip(moving, gradients, strict=True):
                leaf.grad = gradient
            # Older versions of torch count steps in a tensor on the default device, and take its number.
            with torch.device("cpu"):
                optimizer.step()
    return draw.batch([leaf.detach() for leaf in white])


def _without_gradients(analysis: Analysis) -> AbstractContextManager[None]:
    """Run with parameters and buffers of which no gradient is taken: less is kept for it."""
    slots = tensor_slots(analysis.module)
    # What was made in inference mode cannot be kept for a gradient.
    tensors = {name: t.clone() if t.is_inference() else t.detach() for name, (t, _) in slots.items()}
    return substituted(analysis.module, tensors, slots)


class _OutputDirections:
    """By which way the outputs of each sample are to leave the mean.

    Args:
        generator: what the ways are drawn with, for each output when it is first seen.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._drawn: dict[int, Tensor] = {}

    def lost(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return minus how far outputs have gone, in units of how much they differ between samples."""
        lost = torch.zeros((), dtype=torch.float32, device="cpu")
        for place, output in enumerate(output for output in outputs if output.is_floating_point()):
            if place not in self._drawn:
                self._drawn[place] = torch.randn(
                    output.shape, generator=self._generator, dtype=torch.float32, device="cpu"
                ).to(output.device)
            spread = output.detach().to(accumulation_dtype(output)).std(0, correction=0)
            # What never differs has no unit to go by.
            weights = torch.where(spread > 0, self._drawn[place] / spread, 0.0)
            lost = lost.to(output.device) - (weights * output).mean()
        return lost


def _gradients(
    analysis: Analysis, values: Sequence[Any], moving: Sequence[Tensor], ways: _OutputDirections
) -> Sequence[Tensor] | None:
    """Return the gradients of what is lost; None where there are none, or none that are finite."""
    try:
        result = fx.Interpreter(analysis.module).run(*copies(values), enable_io_processing=False)
        lost = ways.lost(deep_tensors(result))
        found = torch.autograd.grad(lost, moving, allow_unused=True, materialize_grads=True)
    except Exception:
        # An op without a gradient, or too little memory for it; what fails without it too is told of later.
        return None
    return found if all(bool(gradient.isfinite().all()) for gradient in found) else None
