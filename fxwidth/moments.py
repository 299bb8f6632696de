"""Means and second moments of channels as their readers see them: the evidence for what can be removed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from fxwidth.analysis import Analysis
from fxwidth.calibration import batches_from, noise_batches
from fxwidth.errors import FxwidthError
from fxwidth.groups import WidthGraph
from fxwidth.probes import Key, Measure, Probe, find_probes
from fxwidth.readers import BATCH_NORMS, Reader, accumulation_dtype
from fxwidth.rules.registry import keeps
from fxwidth.tape import OpCall, TapeRecorder, bind, evaluating, functional_name, plain_kernels

ROWS_PER_BATCH = 65_536

_OTHER_OPS = "it ran other ops than when it was analysed"
_NOT_FINITE = "its inputs are not finite"


@dataclass(frozen=True)
class Moment:
    """The first two moments of one activation's channels.

    Attributes:
        mean: E h, [channels].
        covariance: Cov h, [channels, channels].
        rows: how many vectors h they were taken from; pixels and tokens are vectors of their own.
        samples: how many inputs these came from.
        precision: the rounding unit of the numbers they were computed from.
    """

    mean: Tensor
    covariance: Tensor
    rows: int
    samples: int
    precision: float

    @property
    def second(self) -> Tensor:
        """E h h^T, [channels, channels]."""
        return torch.addr(self.covariance, self.mean, self.mean)


@dataclass(frozen=True)
class Moments:
    """What one pass over data, or over noise, showed of a width graph's activations.

    Attributes:
        source: where the evidence is from, for reports: "data" or "noise".
        samples: how many inputs were seen.
        contracted: the moment of the contracted dim of an activation, by (op index, argument); shared where it is read
            several times.
        squares: E h_j^2 of the contracted dim of each side of a contraction of two activations, likewise.
        deviations: E (x - mean x)^2 for layer norm, E x^2 for RMS norm, of the normalised dims, by op index.
        missed: fx nodes of which nothing is known, and why.
    """

    source: str
    samples: int
    contracted: Mapping[Key, Moment] = field(repr=False)
    squares: Mapping[Key, Tensor] = field(repr=False)
    deviations: Mapping[int, Tensor] = field(repr=False)
    missed: Mapping[str, str] = field(default_factory=dict)

    def of(self, reader: Reader) -> Moment | None:
        """Return what is known of the channels that a reader reads."""
        return self.contracted.get(reader.key)


def moments_from_data(width_graph: WidthGraph, data: Iterable[Any], limit: int | None = 1024) -> Moments | None:
    """Return the moments of a graph's activations on real inputs; None for a model without values (meta device).

    Args:
        width_graph: the graph; it is run in eval mode and left as it was.
        data: batches, each a tensor, a tuple that begins with the inputs, or a dict of them by placeholder name;
            it is iterated once.
        limit: how many samples are enough; None for all of them.

    Raises:
        FxwidthError: the data are empty, do not fit the graph or are not finite, or the parameters are not.
    """
    if not _has_values(width_graph.analysis):
        return None
    moments = collect_moments(width_graph, batches_from(width_graph.analysis, data, limit), source="data")
    for node, reason in moments.missed.items():
        if reason == _NOT_FINITE:
            raise FxwidthError(
                f"the inputs of node {node!r} are not finite for these data; "
                "check the model's parameters and the scale of the data."
            )
    return moments


def moments_from_noise(width_graph: WidthGraph, *, seed: int = 0, work: float = 2e10) -> Moments | None:
    """Return the moments of a graph's activations on Gaussian inputs; None for a model without values (meta device).

    Every batch norm normalises by the statistics of the noise itself, so that its channels have the mean and deviation
    they were trained to have, and only their correlations depend on the inputs: those the weights give to white noise.

    Args:
        width_graph: the graph; it is run in eval mode and left as it was, running statistics included.
        seed: what the noise is made from.
        work: about how many multiplications may be spent; fewer inputs are drawn for a network that needs more.

    Raises:
        FxwidthError: the parameters are not finite.
    """
    analysis = width_graph.analysis
    if not _has_values(analysis):
        return None
    batches = noise_batches(analysis, find_probes(width_graph), seed, work)
    with _OwnStatistics():  # type: ignore[no-untyped-call]
        return collect_moments(width_graph, batches, source="noise")


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
    observer = _Observer(analysis, find_probes(width_graph))
    recorder = TapeRecorder(keeps, observer.see)
    interpreter = _Walker(analysis.module, observer, recorder)
    samples = 0
    with evaluating(analysis.module), plain_kernels():
        for number, values in enumerate(batches):
            size = next((len(value) for value in values if isinstance(value, Tensor) and value.dim()), 1)
            observer.samples = size
            try:
                with recorder:
                    interpreter.run(*values, enable_io_processing=False)
            except FxwidthError:
                raise
            except Exception as error:
                shapes = [tuple(value.shape) for value in values if isinstance(value, Tensor)]
                raise FxwidthError(
                    f"batch {number} of {source}, of shapes {shapes}, fails at node {observer.node!r}: {error}. "
                    "Pass batches like the example_inputs the graph was analysed with."
                ) from error
            samples += size
    if samples == 0:
        raise FxwidthError("data gave no batches; pass at least one (a generator can be gone through only once).")
    return observer.moments(source, samples)


def _has_values(analysis: Analysis) -> bool:
    return all(entry.tensor.device.type != "meta" for entry in analysis.parameters.values())


def _check_parameters(analysis: Analysis) -> None:
    for name, entry in analysis.parameters.items():
        if entry.tensor.is_floating_point() and not bool(entry.tensor.isfinite().all()):
            raise FxwidthError(f"{name} holds NaN or infinite values; load a checkpoint without them.")


class _Sum:
    """Mean and covariance of rows, accumulated batch by batch about the first batch's mean, for precision."""

    def __init__(self) -> None:
        self.rows = 0
        self.samples = 0
        self._origin: Tensor | None = None

    def add(self, rows: Tensor, samples: int) -> None:
        """Take in rows, [rows, channels], of so many samples."""
        wide = accumulation_dtype(rows)
        work = rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
        if self._origin is None:
            self._precision = torch.finfo(work.dtype).eps
            self._origin = work.to(wide).mean(0)
            self._first = torch.zeros_like(self._origin)
            self._second = self._first.new_zeros(len(self._origin), len(self._origin))
        shifted = work - self._origin.to(work.dtype)
        self._first += shifted.to(wide).sum(0)
        self._second += (shifted.T @ shifted).to(wide)
        self.rows += len(rows)
        self.samples += samples

    def moment(self) -> Moment:
        """Return the moments of all rows so far."""
        assert self._origin is not None
        shift = self._first / self.rows
        covariance = torch.addr(self._second / self.rows, shift, shift, alpha=-1)
        return Moment(self._origin + shift, covariance, self.rows, self.samples, self._precision)


class _Average:
    """The mean of arrays, weighted by what they are themselves averages of."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.weight = 0

    def add(self, values: Tensor, weight: int) -> None:
        """Take in one array that is the sum of so many."""
        self.total = values if self.total is None else self.total + values
        self.weight += weight

    def value(self) -> Tensor:
        """Return the mean so far."""
        assert self.total is not None
        return self.total / self.weight


class _Observer:
    """Watches the ops of a run, finds each one's place on the analysis tape, and sums what the probes ask for."""

    def __init__(self, analysis: Analysis, probes: Sequence[Probe]) -> None:
        self.node = ""
        self.samples = 0
        self.missed: dict[str, str] = {}
        self._analysis = analysis
        self._probes: dict[int, list[Probe]] = {}
        for probe in probes:
            self._probes.setdefault(probe.call.index, []).append(probe)
        self._sums: dict[Probe, _Sum | _Average] = {}
        self._expected: deque[OpCall] = deque()

    def begin(self, node: str) -> None:
        """Expect the ops of a node."""
        self.node = node
        self._expected = deque(self._analysis.calls_of(node))

    def end(self) -> None:
        """Check that all the ops of the node have come."""
        if self._expected:
            self.missed[self.node] = _OTHER_OPS

    def see(self, call: OpCall) -> None:
        """Take in one op that has just run."""
        expected = self._expected.popleft() if self._expected else None
        if expected is None or expected.name != call.name:
            self.missed[self.node] = _OTHER_OPS
            self._expected.clear()
            return
        for probe in self._probes.get(expected.index, ()):
            self._measure(probe, call.arguments[probe.argument])

    def moments(self, source: str, samples: int) -> Moments:
        """Return all that was seen."""
        contracted: dict[Key, Moment] = {}
        squares: dict[Key, Tensor] = {}
        deviations: dict[int, Tensor] = {}
        for probe, total in self._sums.items():
            if probe.call.node in self.missed:
                continue
            value = total.moment() if isinstance(total, _Sum) else total.value()
            if not bool((value.covariance if isinstance(value, Moment) else value).isfinite().all()):
                self.missed[probe.call.node] = _NOT_FINITE
            elif isinstance(value, Moment):
                contracted.update(dict.fromkeys(probe.keys, value))
            elif probe.measure == Measure.SQUARES:
                squares[probe.keys[0]] = value
            else:
                deviations[probe.call.index] = value
        return Moments(source, samples, contracted, squares, deviations, self.missed)

    def _measure(self, probe: Probe, tensor: Tensor) -> None:
        if probe.measure == Measure.MOMENT:
            total = self._sums.setdefault(probe, _Sum())
            assert isinstance(total, _Sum)
            total.add(probe.rows(tensor, ROWS_PER_BATCH), self.samples)
        else:
            average = self._sums.setdefault(probe, _Average())
            assert isinstance(average, _Average)
            average.add(*probe.squares(tensor))


class _Walker(fx.Interpreter):
    """Runs a graph, telling an observer which node is at work; values are freed as soon as they are used up."""

    def __init__(self, module: fx.GraphModule, observer: _Observer, recorder: TapeRecorder) -> None:
        super().__init__(module)
        self._observer = observer
        self._recorder = recorder

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        self._observer.begin(n.name)
        value = super().run_node(n)
        self._observer.end()
        # The tape would keep every activation alive.
        self._recorder.calls.clear()
        return value


class _OwnStatistics(TorchDispatchMode):
    """Lets every batch norm normalise by the statistics of its own batch, its running ones untouched."""

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one op."""
        result = func(*args, **(kwargs or {}))
        if functional_name(func) not in BATCH_NORMS:
            return result
        arguments = bind(func, args, kwargs or {})
        signal, weight, bias = (arguments[name] for name in ("input", "weight", "bias"))
        dims = [dim for dim in range(signal.dim()) if dim != 1]
        if signal.numel() // signal.shape[1] < 2:
            return result
        variance, mean = torch.var_mean(signal, dims, correction=0)
        eps = arguments["epsilon" if "epsilon" in arguments else "eps"]
        if arguments["running_var"] is not None:
            # As small against the noise as it is against what the network was trained on.
            eps = eps * variance.mean() / arguments["running_var"].mean()
        gain = (variance + eps).clamp_min(1e-30).rsqrt() * (1.0 if weight is None else weight)
        shift = (0.0 if bias is None else bias) - mean * gain
        shape = [-1, *[1] * (signal.dim() - 2)]
        return (torch.addcmul(shift.view(shape), signal, gain.view(shape)), *result[1:])
