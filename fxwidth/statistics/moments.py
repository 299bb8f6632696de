"""Means and second moments of channels as their readers see them: the evidence for what can be removed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from fxwidth.analysis.result import Analysis
from fxwidth.bases.linear_groups import linear_norms
from fxwidth.errors import FxwidthError
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.recording.readonly_runs import copies, looking_on
from fxwidth.recording.tape import TapeRecorder, bind
from fxwidth.rules.family_table import running_norm
from fxwidth.rules.registry import keeps
from fxwidth.runtime.finiteness import is_sound
from fxwidth.runtime.process_groups import ranks_at_work
from fxwidth.runtime.pytrees import deep_tensors, map_leaves
from fxwidth.statistics.calibration_data import batches_from, cut_anew
from fxwidth.statistics.constant_evidence import constant_inputs, without_constants
from fxwidth.statistics.data_impressions import impressions
from fxwidth.statistics.gathered_batches import Gathered
from fxwidth.statistics.integer_inputs import integer_sources
from fxwidth.statistics.moment import Moment
from fxwidth.statistics.observation_points import Key, find_probes
from fxwidth.statistics.observers import NOT_FINITE, OTHER_OPS, TOO_LARGE, Observer, Walker
from fxwidth.statistics.synthetic_inputs import noise_draws
from fxwidth.weights.readers import Reader
from fxwidth.work_progress import each

__all__ = ["Moment", "Moments", "collect_moments", "has_values", "moments_from_data", "moments_from_noise"]

# Samples that are run together: of larger batches not all rows are looked at, and their sums are less precise.
_AT_ONCE = 64


@dataclass(frozen=True)
class Moments:
    """What one pass over data, or over noise, showed of a width graph's activations.

    Attributes:
        source: where the evidence is from, for reports: "data", "training" (batches that an Evolver has gathered),
            "noise" sent through the network, or "weights".
        samples: how many inputs were seen.
        contracted: the moment of the contracted dim of an activation, by (op index, argument); shared where it is read
            several times.
        squares: E h_j^2 of the contracted dim of each side of a contraction of two activations, likewise.
        deviations: E (x - mean x)^2 for layer norm, E x^2 for RMS norm, of the normalised dims, by op index.
        products: E h h^T of each head of such a side, [heads, channels, channels], where any basis would do.
        missed: fx nodes of which nothing is known, and why.
        inputs: the first batch of them, where they were noise.
    """

    source: str
    samples: int
    contracted: Mapping[Key, Moment] = field(repr=False)
    squares: Mapping[Key, Tensor] = field(repr=False)
    deviations: Mapping[int, Tensor] = field(repr=False)
    products: Mapping[Key, Tensor] = field(default_factory=dict, repr=False)
    missed: Mapping[str, str] = field(default_factory=dict)
    inputs: Sequence[Any] = field(default=(), repr=False)

    def of(self, reader: Reader) -> Moment | None:
        """Return what is known of the channels that a reader reads."""
        return self.contracted.get(reader.key)


def has_values(analysis: Analysis) -> bool:
    """Tell whether the parameters have numbers in them, which they do not on the meta device."""
    return all(entry.tensor.device.type != "meta" for entry in analysis.parameters.values())


def moments_from_data(width_graph: WidthGraph, data: Iterable[Any], limit: int | None = 1024) -> Moments | None:
    """Return the moments of a graph's activations on real inputs; None for a model without values (meta device).

    Args:
        width_graph: the graph; it is run in eval mode and left as it was.
        data: batches, each a tensor, a tuple that begins with the inputs, or a dict of them by argument name;
            it is iterated once.
        limit: how many samples are enough; None for all of them.

    Raises:
        FxwidthError: the data are empty, do not fit the graph or are not finite, or the parameters are not.
    """
    if not has_values(width_graph.analysis):
        return None
    source = "training" if isinstance(data, Gathered) else "data"
    batches = cut_anew(width_graph.analysis, batches_from(width_graph.analysis, data, limit), _AT_ONCE)
    moments = collect_moments(width_graph, batches, source=source)
    for node, reason in moments.missed.items():
        if reason == NOT_FINITE:
            raise FxwidthError(
                f"the inputs of node {node!r} are not finite for these data; "
                "check the model's parameters and the scale of the data."
            )
        if reason == TOO_LARGE:
            raise FxwidthError(
                f"the inputs of node {node!r} are finite for these data, but so large that their squares are beyond "
                "the range of their precision, and no second moments can be taken. Bring the weights of the layers "
                'before it to a common scale, scale the data down, or choose by selection="magnitude" with fold=False.'
            )
    probes = find_probes(width_graph)
    if source == "data" and probes and not (moments.contracted or moments.squares or moments.deviations):
        node, reason = next(iter(moments.missed.items()), (probes[0].call.node, OTHER_OPS))
        raise FxwidthError(
            f"the data show nothing of what can be resized: at node {node!r}, {reason}. "
            "Call fxwidth.analyze(gm, example_inputs) with inputs like the data, or leave out data=."
        )
    return moments


def moments_from_noise(width_graph: WidthGraph, *, seed: int = 0, work: float = 2e10) -> Moments | None:
    """Return the moments of a graph's activations on Gaussian inputs; None for a model without values (meta device).

    Those that stand for images are moved to where the network's outputs differ, as `data_impressions` does it.

    Every batch norm normalises by the statistics of the noise itself, so that its channels have the mean and deviation
    they were trained to have, and only their correlations depend on the inputs: those the weights give to noise.
    In linear groups, where channels that depend on each other do so after the batch norm's own scales alone, the noise
    decides the mean variance of all channels together, and the running statistics that of each among them.

    Args:
        width_graph: the graph; it is run in eval mode and left as it was, running statistics included.
        seed: what the noise is made from.
        work: about how many multiplications the inputs may take, fewer of which are drawn for a network that needs
            more; moving them may take some dozens of times that.

    Raises:
        FxwidthError: the parameters are not finite.
    """
    analysis = width_graph.analysis
    if not has_values(analysis):
        return None
    drawn = partial(_moments_of_draws, width_graph, seed, work)
    try:
        moments = drawn(cautious=False)
    except FxwidthError:
        if not any(integer_sources(analysis)):
            raise
        return drawn(cautious=True)
    if NOT_FINITE in moments.missed.values() and any(integer_sources(analysis)):
        # Masks that were drawn may leave nothing over beside those of the network's own.
        return min(moments, drawn(cautious=True), key=lambda found: len(found.missed))
    return moments


def _moments_of_draws(width_graph: WidthGraph, seed: int, work: float, *, cautious: bool) -> Moments:
    analysis = width_graph.analysis
    draws = noise_draws(analysis, find_probes(width_graph), seed, work, cautious=cautious)
    with statistics_of_noise(width_graph):
        # All of them at once: the ops that moments are collected on have no gradients.
        batches = list(impressions(analysis, draws, work, seed))
        # A model may write to its inputs.
        first = [map_leaves(torch.clone, value) for value in batches[0]]
        constant = constant_inputs(batches)
        moments = collect_moments(width_graph, batches, source="noise")
    contracted, untold = without_constants(analysis, moments.contracted, constant)
    return replace(moments, contracted=contracted, missed={**moments.missed, **untold}, inputs=first)


def statistics_of_noise(width_graph: WidthGraph) -> AbstractContextManager[object]:
    """Have the batch norms of a graph normalise by the statistics of the noise that is sent through it."""
    parameters = width_graph.analysis.parameters
    norms = [norm for norm in linear_norms(width_graph) if bool((parameters[norm.variance].tensor >= 0).all())]
    return _OwnStatistics(frozenset(parameters[norm.weight].tensor.data_ptr() for norm in norms))


def collect_moments(width_graph: WidthGraph, batches: Iterable[Sequence[Any]], *, source: str) -> Moments:
    """Run a graph on batches and return the moments of its activations, in memory that does not grow with the data.

    Args:
        width_graph: the graph; its module is run in eval mode, without gradients.
        batches: one value per placeholder each.
        source: what the batches are, for reports.

    Raises:
        FxwidthError: there are no batches, the graph does not run on one, or parameters or activations are not finite.
    """
    analysis = width_graph.analysis
    _check_parameters(analysis)
    observer = Observer(analysis, find_probes(width_graph))
    recorder = TapeRecorder(keeps, observer.see)
    interpreter = Walker(analysis.module, observer, recorder)
    samples = 0
    with looking_on(analysis.module):
        for number, values in enumerate(each(batches, f"running {source}")):
            size = analysis.samples_in(values)
            observer.samples = size
            try:
                own = copies(values)
                with recorder:
                    interpreter.run(*own, enable_io_processing=False)
            except FxwidthError:
                raise
            except Exception as error:
                shapes = [tuple(tensor.shape) for tensor in deep_tensors(values)]
                raise FxwidthError(
                    f"batch {number} of {source}, of shapes {shapes}, fails at node {observer.node!r}: {error}. "
                    "Pass batches like the example_inputs the graph was analysed with; where it takes other dtypes, "
                    "devices or shapes now, call fxwidth.analyze(gm, example_inputs) first, by which later calls go."
                ) from error
            samples += size
    ranks = ranks_at_work()
    # Of noise all ranks see the same.
    if ranks is not None and source != "noise":
        observer.pool(ranks)
        told = ranks.gather("the samples", samples)
        samples = sum(told) if ranks.is_data_parallel else told[0]
    if samples == 0:
        raise FxwidthError("data gave no batches; pass at least one (a generator can be gone through only once).")
    seen = observer.seen()
    return Moments(source, samples, seen.contracted, seen.squares, seen.deviations, seen.products, seen.missed)


def _check_parameters(analysis: Analysis) -> None:
    for name, entry in analysis.parameters.items():
        if not is_sound(entry.tensor):
            raise FxwidthError(f"{name} holds NaN or infinite values; load a checkpoint without them.")


class _OwnStatistics(TorchDispatchMode):
    """Lets every batch norm normalise by the statistics of its own batch, its running ones untouched.

    Args:
        linear: the addresses of the gains of those whose channels keep their running variances among each other.
    """

    def __init__(self, linear: frozenset[int] = frozenset()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._linear = linear

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one op."""
        result = func(*args, **(kwargs or {}))
        norm = running_norm(func)
        if norm is None:
            return result
        arguments = bind(func, args, kwargs or {})
        signal, weight, bias = (arguments[name] for name in ("input", "weight", norm.bias))
        dims = [dim for dim in range(signal.dim()) if dim != 1]
        if signal.numel() // signal.shape[1] < 2:
            return result
        variance, mean = torch.var_mean(signal, dims, correction=0)
        eps = arguments[norm.eps]
        if (running := arguments[norm.variance]) is not None:
            # As small against the noise as it is against what the network was trained on.
            ratio = variance.mean() / running.mean()
            eps = eps * ratio
            if weight is not None and weight.data_ptr() in self._linear and float(running.mean()) > 0:
                variance = running * ratio
        gain = (variance + eps).clamp_min(1e-30).rsqrt() * (1.0 if weight is None else weight)
        shift = (0.0 if bias is None else bias) - mean * gain
        shape = [-1, *[1] * (signal.dim() - 2)]
        return (torch.addcmul(shift.view(shape), signal, gain.view(shape)), *result[1:])
