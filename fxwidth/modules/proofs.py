"""Whether a module that has the tensors of a graph is the graph: its ops in training, its outputs on real inputs."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxwidth.analysis.input_specs import input_specs, real_inputs
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.errors import FxwidthError
from fxwidth.frontends.call_signature import invoke
from fxwidth.modules.class_runs import ClassRuns
from fxwidth.modules.split_attention import attention_in_parts
from fxwidth.recording.data_dependent import VALUE_ERRORS
from fxwidth.recording.graph_meta import EXAMPLES, notes_of
from fxwidth.rewriting.graph_calls import arguments_of_graph
from fxwidth.runtime.contexts import evaluating, quiet, training
from fxwidth.runtime.module_state import restored
from fxwidth.runtime.pytrees import deep_tensors, flatten_each, map_leaves, rebuild_each
from fxwidth.runtime.random_states import same_randomness
from fxwidth.runtime.tensor_slots import copies_of, substituted, tensor_slots
from fxwidth.verification.replay_oracle import largest_difference

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
_COARSE = 2e-2
# Beyond so many parameters outputs are compared in evaluation alone.
_MANY = 10**9


def training_failure(runs: ClassRuns, maps: IndexMaps) -> str | None:
    """Return what a model does otherwise than the graph in training; None where the graph does not run there either.

    A graph may do there the same by other ops: where there are values, these are compared later.
    """
    analysis = runs.analysis
    graph = ClassRuns(analysis, analysis.module, arguments_of_graph(analysis.module))
    # Before a resize the graph has its present widths alone.
    with attention_in_parts():
        ops, error = graph.seen(IndexMaps(analysis.space, {}), mode=training(graph.model))
    if error is not None:
        return None
    with attention_in_parts():
        own, own_error = runs.seen(maps, mode=training(runs.model))
    if isinstance(own_error, VALUE_ERRORS):
        # It looks at values there: it is run on some later.
        runs.looks_at_values_in_training = True
        return None
    if own_error is not None:
        return f"in training it fails: {str(own_error).strip().partition(chr(10))[0]}"
    is_resized = all(
        tuple(map(maps.size, entry.axes)) == tuple(entry.fake.shape) for entry in analysis.parameters.values()
    )
    if not (is_resized and any(tensor.is_meta for tensor, _ in tensor_slots(graph.model).values())):
        return None
    # A graph of both modes may do the ops of one in another order.
    wanted, found = (Counter(op.signature for op in some if op.signature[0] not in _AS_MADE) for some in (ops, own))
    if more := found - wanted:
        return f"in training it does {next(iter(more))}, and the graph does not"
    return f"in training it does not do {next(iter(wanted - found))}" if wanted - found else None


# What a constant is made by, which in a graph is there already.
_AS_MADE = frozenset({"lift_fresh", "empty_like", "zeros_like", "ones_like", "bernoulli", "copy"})


def eager_failure(runs: ClassRuns, maps: IndexMaps) -> str | None:
    """Return why a model cannot run at some widths, on tensors of these sizes with values; None where it has none.

    It is asked of models of which stand-ins show another way than the one that they go: kernels have conditions of
    their own.
    """
    analysis, slots = runs.analysis, runs.slots
    tensors = copies_of(slots)
    if not runs.goes_as_exported or any(tensor.is_meta for tensor in tensors.values()):
        return None
    for name, in_graph in runs.entries.items():
        entry = analysis.parameters[in_graph]
        old = tensors[name]
        sizes = tuple(map(maps.size, entry.axes))
        tensors[name] = old if sizes == tuple(old.shape) else torch.zeros(sizes, dtype=old.dtype, device=old.device)
    with substituted(runs.model, tensors, slots, restored), evaluating(runs.model), torch.no_grad(), quiet():
        try:
            invoke(runs.model, arguments_of_graph(analysis.module), _inputs(analysis.module))
        except Exception as error:
            return f"it fails at these sizes: {str(error).strip().partition(chr(10))[0]}"
    return None


def refuse_other_values(gm: fx.GraphModule, model: nn.Module, runs: ClassRuns) -> None:
    """Check that outputs are equal on real inputs: as traced, of another batch size and of another length.

    Raises:
        FxwidthError: they are not.
    """
    tensors = [tensor for one in (gm, model) for tensor, _ in tensor_slots(one).values()]
    if any(tensor.is_meta for tensor in tensors):
        return
    inputs = _inputs(gm)
    modes = (evaluating, training) if sum(tensor.numel() for tensor in tensors) < _MANY else (evaluating,)
    for mode in modes:
        for values in (inputs, _longer(inputs, runs), _shorter(inputs)):
            expected = _outputs(gm, values, runs, mode)
            if expected is None:
                continue
            actual = _outputs(model, values, runs, mode)
            word = "in training" if mode is training else "in evaluation"
            if mode is training and actual:
                # There a model may leave out the caches that a graph, which is of one form, returns behind the rest.
                both = min(len(actual), len(expected))
                actual, expected = actual[:both], expected[:both]
            if actual is None or [t.shape for t in actual] != [t.shape for t in expected]:
                raise FxwidthError(
                    f"{type(model).__name__} does not give what the graph gives {word} on inputs of shapes "
                    f"{[tuple(t.shape) for t in deep_tensors(tuple(values))]}; please report this gap of fxwidth."
                )
            if mode is training and runs.looks_at_values_in_training:
                continue
            found = largest_difference(actual, expected)
            if found > max(_TOLERANCE.get(t.dtype, _COARSE) for t in [*expected, *actual] or [torch.zeros(())]):
                raise FxwidthError(
                    f"the outputs of {type(model).__name__} differ by {found:.1e} of their size from those of the "
                    f"graph {word}. Plan by fxwidth.plan(width_graph, ..., for_module=model)."
                )


def _inputs(gm: fx.GraphModule) -> list[Any]:
    values = real_inputs(gm, input_specs(gm), None)
    leaves, structures = flatten_each(tuple(values), (Tensor,))
    examples = notes_of(gm).get(EXAMPLES) or [None] * len(leaves)
    generator = torch.Generator().manual_seed(1)
    drawn = []
    for leaf, example in zip(leaves, examples, strict=False):
        if example is not None and example.shape[1:] == leaf.shape[1:] and len(example):
            places = torch.arange(len(leaf)) % len(example)
            drawn.append(example[places].to(leaf))
        elif leaf.is_floating_point():
            drawn.append(torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf))
        else:
            drawn.append(leaf)
    return list(rebuild_each(structures, [*drawn, *leaves[len(drawn) :]]))


def _longer(inputs: Sequence[Any], runs: ClassRuns) -> list[Any]:
    """Return inputs of a batch that is larger by one."""
    size = None if runs.analysis.batch is None else runs.analysis.batch.size
    rows = lambda t: torch.cat([t, t[:1]]) if t.dim() and t.shape[0] == size else t  # noqa: E731
    return [map_leaves(rows, value) for value in inputs]


def _shorter(inputs: Sequence[Any]) -> list[Any]:
    """Return inputs of another length: the second dim of all that have the same."""
    sizes = {t.shape[1] for t in deep_tensors(tuple(inputs)) if t.dim() == 2 and not t.is_floating_point()}
    if len(sizes) != 1:
        return list(inputs)
    (size,) = sizes
    cut = lambda t: t[:, : size - 1] if t.dim() > 1 and t.shape[1] == size > 2 else t  # noqa: E731
    return [map_leaves(cut, value) for value in inputs]


def _outputs(module: nn.Module, values: Sequence[Any], runs: ClassRuns, mode: Any) -> list[Tensor] | None:
    """Return what a module gives, on copies of its tensors; None where it does not run."""
    slots = tensor_slots(module)
    with substituted(module, copies_of(slots), slots, restored), mode(module), torch.no_grad(), quiet(), _same_noise():
        try:
            given = [map_leaves(Tensor.clone, value) for value in values]
            found = deep_tensors(invoke(module, arguments_of_graph(runs.analysis.module), given))
        except Exception:
            return None
        return [one.detach().clone() for one in found]


@contextmanager
def _same_noise() -> Iterator[None]:
    """Let every call that draws random numbers draw the same, in whatever order the calls come."""
    with same_randomness():
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - models draw from the global state
        with _SteadyNoise():
            yield


class _SteadyNoise(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an op."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            torch.manual_seed(0)
        return func(*args, **(kwargs or {}))
