"""Weights that are computed from a parameter and a norm of it: weight norm and spectral norm.

What counts is the weight that the network uses. Resizing works on that, as if it were the parameter; afterwards the
parameter, and the length or the singular vector beside it, are chosen so that the computed weight is the wanted one.
Nothing of what stays then notices that a norm runs over fewer entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxwidth.analysis.def_use import def_use
from fxwidth.analysis.result import Analysis
from fxwidth.axes.index_maps import NEW, IndexMaps
from fxwidth.memo import per_graph
from fxwidth.recording import whole_op_gradients  # noqa: F401  (whole ops have gradients by it)
from fxwidth.recording.tape import OpCall, plain_kernels, tensors_in, unbind
from fxwidth.rules.family_table import as_family, is_arithmetic, is_move
from fxwidth.rules.normalization import weight_norm_dim
from fxwidth.rules.op_families import Arithmetic, Move, Product, WeightNorm
from fxwidth.rules.registry import resized_call
from fxwidth.runtime.finiteness import accumulation_dtype

# The cosine from which on a singular vector counts as one.
_ALIGNED = 1e-3


@dataclass(frozen=True)
class NormedWeight:
    """A weight that is a parameter times a length over its norm.

    Attributes:
        parameter: the parameter that gives the direction.
        companion: the parameter that holds lengths (weight norm), or the left singular vector (spectral norm).
        calls: the ops that make the weight, one for each time that the module is called.
        product: for a spectral norm, the product of the weight with its right singular vector, [rows].
        inner: the indices of all ops that only serve to compute the weight.
    """

    parameter: str
    companion: str
    calls: tuple[OpCall, ...]
    product: Tensor | None
    inner: frozenset[int]

    @property
    def results(self) -> list[Tensor]:
        """The weight on the tape."""
        return [call.outputs[0] for call in self.calls]


@per_graph
def normed_weights(analysis: Analysis) -> dict[str, NormedWeight]:
    """Return the normed weights of a graph by the names of their parameters."""
    return _find(analysis)


def weight_values(analysis: Analysis, name: str, *, differentiable: bool = False) -> Tensor:
    """Return the values of a parameter, or of the normed weight that is computed from it; of its shape either way.

    Args:
        analysis: that of the graph.
        name: the parameter's name.
        differentiable: whether gradients flow back to the parameters.
    """
    normed = normed_weights(analysis).get(name)
    tensor = analysis.parameters[name].tensor
    if not differentiable:
        tensor = tensor.detach()
    if normed is None or tensor.is_meta:
        return tensor
    return computed_values(analysis, normed.results[0], differentiable=differentiable).to(tensor.dtype)


def computed_values(analysis: Analysis, tensor: Tensor, *, differentiable: bool = False) -> Tensor:
    """Return the values of a tensor of the tape that is computed from parameters and buffers alone."""
    values = {e.fake: e.tensor if differentiable else e.tensor.detach() for e in analysis.parameters.values()}
    return _evaluated(analysis, tensor, values, lambda call: (call.func, call.arguments), differentiable)


def with_solved_lengths(analysis: Analysis, maps: IndexMaps, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters and their companions for which the computed weights are the wanted ones.

    Args:
        analysis: that of the graph at the old sizes.
        maps: the kept and new indices.
        tensors: the new tensors by name; those of normed weights are the weights that are wanted.
    """
    result: dict[str, Tensor] = {}
    for name, normed in normed_weights(analysis).items():
        if name in tensors and not tensors[name].is_meta:
            solved = _solved_length if normed.product is None else _solved_vector
            result |= solved(analysis, maps, normed, {**tensors, **result})
    return result


def _restored(analysis: Analysis, maps: IndexMaps, normed: NormedWeight, wanted: Tensor, scale: Tensor) -> Tensor:
    """Return the parameter for a wanted weight: entries that are as they were keep every digit."""
    entry = analysis.parameters[normed.parameter]
    old, used = entry.tensor.detach(), weight_values(analysis, normed.parameter)
    for dim, axis in enumerate(entry.axes):
        if maps.changes(axis):
            places = torch.from_numpy(np.maximum(maps.indices(axis), 0)).to(old.device)
            old, used = old.index_select(dim, places), used.index_select(dim, places)
    return torch.where((wanted == used) | (scale == 0), old, (wanted * scale).to(old.dtype))


def _solved_length(
    analysis: Analysis, maps: IndexMaps, normed: NormedWeight, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Give each slice of a weight norm the length it shall have, and its direction the scale that it had."""
    entry, companion = (analysis.parameters[name] for name in (normed.parameter, normed.companion))
    dim = weight_norm_dim(normed.calls[0])
    old, gain = entry.tensor.detach(), companion.tensor.detach()
    filled = tensors.get(normed.companion, gain)
    kept = None if dim is None or not maps.changes(entry.axes[dim]) else maps.indices(entry.axes[dim])

    def moved(per_slice: Tensor, new: Tensor | float) -> Tensor:
        """Return old numbers per slice in their new places, and another in new slices."""
        if kept is None or dim is None:
            return per_slice
        places = torch.from_numpy(np.maximum(kept, 0)).to(per_slice.device)
        shape = [-1 if d == dim else 1 for d in range(per_slice.dim())]
        is_new = torch.from_numpy(kept == NEW).to(per_slice.device).view(shape)
        return torch.where(is_new, new, per_slice.index_select(dim, places))

    # A length of zero leaves nothing to take the direction from: it stays what it was.
    scale = moved(torch.where(gain == 0, 0.0, _length(old, dim) / gain), 1.0)
    direction = _restored(analysis, maps, normed, tensors[normed.parameter], scale)
    lengths = moved(gain / _length(old, dim), 0.0) * _length(direction, dim)
    if kept is not None:
        lengths = torch.where(moved(torch.zeros_like(gain), 1.0) == 1.0, filled, lengths)
    # A slice of zeros would be divided by its norm of zero; its length is zero already.
    direction = torch.where(_length(direction, dim) == 0, 1.0, direction)
    return {normed.parameter: direction.to(old.dtype), normed.companion: lengths.reshape(filled.shape).to(gain.dtype)}


def _length(tensor: Tensor, dim: int | None) -> Tensor:
    """Return the norm of each slice along a dim, or of all, with as many dims as a weight norm's gain."""
    wide = tensor.to(accumulation_dtype(tensor))
    if dim is None:
        whole: Tensor = torch.linalg.vector_norm(wide)
        return whole
    others = [d for d in range(tensor.dim()) if d != dim]
    slices: Tensor = torch.linalg.vector_norm(wide, dim=others, keepdim=True) if others else wide.abs()
    return slices


def _solved_vector(
    analysis: Analysis, maps: IndexMaps, normed: NormedWeight, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Give the left vector of a spectral norm the length at which the estimated norm stays what it was.

    Training normalises the vector again before it uses it.
    """
    assert normed.product is not None
    norm = computed_values(analysis, normed.calls[0].arguments["other"])
    weight = _restored(analysis, maps, normed, tensors[normed.parameter], norm)
    values = {e.fake: tensors.get(name, e.tensor.detach()) for name, e in analysis.parameters.items()}
    values[analysis.parameters[normed.parameter].fake] = weight
    product = _evaluated(analysis, normed.product, values, lambda call: resized_call(call, maps))
    vector = values[analysis.parameters[normed.companion].fake]
    if abs(float(vector @ product)) < _ALIGNED * float(vector.norm() * product.norm()):
        vector = product  # what is left of the vector points elsewhere: this is where the next iteration leads
    estimate = vector @ product
    return {normed.parameter: weight} | ({normed.companion: vector * (norm / estimate)} if float(estimate) != 0 else {})


# -- finding them --------------------------------------------------------------------------------------------------


def _find(analysis: Analysis) -> dict[str, NormedWeight]:
    tape = def_use(analysis)
    by_name: dict[str, list[NormedWeight]] = {}
    for call in analysis.calls:
        found = _weight_norm(call, analysis.names) or _spectral_norm(call, tape.producers, analysis)
        if found is not None:
            by_name.setdefault(found.parameter, []).append(found)
    result, shown = {}, analysis.outputs
    for name, several in by_name.items():
        inner = frozenset().union(*(one.inner for one in several))
        used = [tape.consumers_of(analysis.parameters[own].fake) for own in (name, several[0].companion)]
        alone = all(call.index in inner for calls in used for call in calls)
        alone &= not any(analysis.parameters[own].fake is one for own in (name, several[0].companion) for one in shown)
        if alone and len({(one.companion, one.product is None) for one in several}) == 1:
            calls = tuple(call for one in several for call in one.calls)
            result[name] = NormedWeight(name, several[0].companion, calls, several[0].product, inner)
    return result


def _weight_norm(call: OpCall, names: Mapping[Tensor, str]) -> NormedWeight | None:
    if as_family(call.func, WeightNorm) is None:
        return None
    direction, length = (names.get(call.arguments[key]) for key in ("v", "g"))
    if direction is None or length is None:
        return None
    return NormedWeight(direction, length, (call,), None, frozenset({call.index}))


def _spectral_norm(call: OpCall, producers: Mapping[Tensor, OpCall], analysis: Analysis) -> NormedWeight | None:
    """Recognise W / (u . (W v)) with buffers u and v."""
    names = analysis.names
    if not is_arithmetic(call.func, Arithmetic.QUOTIENT) or call.arguments["self"] not in names:
        return None
    norm = producers.get(call.arguments["other"])
    if norm is None or not _is_product(norm, "k,k->"):
        return None
    name = names[call.arguments["self"]]
    for vector, product in (norm.inputs, norm.inputs[::-1]):
        companion = names.get(_original(vector, producers))
        producer = producers.get(product)
        if companion is None or producer is None or not _is_product(producer, "ik,k->i"):
            continue
        inner = {call.index, *_ancestry(norm, producers)}
        sources = {names.get(tensor) for index in inner for tensor in analysis.calls[index].inputs} - {None}
        buffers = [own for own in sources if own != name]
        if name in sources and not any(isinstance(analysis.parameters[str(b)].tensor, nn.Parameter) for b in buffers):
            return NormedWeight(name, companion, (call,), product, frozenset(inner))
    return None


def _is_product(call: OpCall, formula: str) -> bool:
    product = as_family(call.func, Product)
    return product is not None and product.formula == formula and product.added is None


def _original(tensor: Tensor, producers: Mapping[Tensor, OpCall]) -> Tensor:
    while (call := producers.get(tensor)) is not None and is_move(call.func, Move.COPY):
        tensor = call.inputs[0]
    return tensor


def _ancestry(call: OpCall, producers: Mapping[Tensor, OpCall]) -> Iterator[int]:
    yield call.index
    for tensor in call.inputs:
        producer = producers.get(tensor)
        if producer is not None and producer.index < call.index:
            yield from _ancestry(producer, producers)


def _evaluated(
    analysis: Analysis,
    tensor: Tensor,
    values: Mapping[Tensor, Tensor],
    version: Callable[[OpCall], tuple[torch._ops.OpOverload, dict[str, object]]],
    differentiable: bool = False,
) -> Tensor:
    """Run the ops that a tensor of the tape comes from on other values."""
    needed, chosen = {tensor}, []
    for call in reversed(analysis.calls):
        if any(output in needed for output in call.outputs):
            chosen.append(call)
            needed.update(call.inputs)
    known = dict(values)
    with nullcontext() if differentiable else plain_kernels():
        for call in reversed(chosen):
            if call.func._schema.is_mutable:
                known |= {output: known[output].clone() for output in call.outputs if output in known}
            func, arguments = version(call)
            args, kwargs = unbind(func, _with_values(arguments, known))
            known |= zip(call.outputs, tensors_in(func(*args, **kwargs)), strict=True)
    return known[tensor]


def _with_values(arguments: dict[str, object], known: Mapping[Tensor, Tensor]) -> dict[str, object]:
    result: dict[str, object] = pytree.tree_map(
        lambda leaf: known[leaf] if isinstance(leaf, Tensor) else leaf, arguments
    )
    return result
